//! The lines in which a worker says what it does, as it does it: a worker that is killed has said all that it had begun.

use std::collections::BTreeMap;
use std::fmt;

use super::history::{Deed, Hold, Moment, Outcome};

lock_tests::cases! {
    in modules: tests
}

/// One line of one client of a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) client: u64,
    pub(crate) at: Moment,
    pub(crate) what: What,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum What {
    /// It asks for a lock.
    Asks {
        name: String,
    },
    /// It has the lock, since before `at`. Row locks have no token.
    Granted {
        token: Option<i64>,
    },
    /// It did not get it.
    Denied,
    /// It had the lock at `at`, by all that a holder can know.
    Held,
    /// It was told that the lock is lost.
    Told,
    /// It is about to commit a transaction, which began after `called`.
    Commits {
        called: Moment,
        previous: i64,
        value: Option<i64>,
    },
    Committed,
    Refused,
    Unknown,
    /// It gives the lock up, in whatever way.
    Ends,
}

/// Ends every line: one that was cut off by a kill has none.
const END: &str = ";";

impl fmt::Display for Event {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { client, at, what } = self;
        write!(formatter, "{client} {at} ")?;
        match what {
            What::Asks { name } => write!(formatter, "asks {name}"),
            What::Granted { token } => write!(formatter, "granted {}", token.unwrap_or(0)),
            What::Denied => write!(formatter, "denied"),
            What::Held => write!(formatter, "held"),
            What::Told => write!(formatter, "told"),
            What::Commits { called, previous, value } => {
                write!(formatter, "commits {called} {previous} {}", value.unwrap_or(0))
            }
            What::Committed => write!(formatter, "committed"),
            What::Refused => write!(formatter, "refused"),
            What::Unknown => write!(formatter, "unknown"),
            What::Ends => write!(formatter, "ends"),
        }?;
        write!(formatter, " {END}")
    }
}

impl Event {
    /// `None` when the line is not whole.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split(' ').collect();
        let [client, at, ref what @ .., END] = words[..] else { return None };
        let number = |word: &str| word.parse::<i64>().ok();
        let unless_zero = |word: &str| number(word).map(|number| Some(number).filter(|number| *number != 0));
        let what = match *what {
            ["asks", name] => What::Asks { name: name.to_owned() },
            ["granted", token] => What::Granted { token: unless_zero(token)? },
            ["denied"] => What::Denied,
            ["held"] => What::Held,
            ["told"] => What::Told,
            ["commits", called, previous, value] => What::Commits {
                called: called.parse().ok()?,
                previous: number(previous)?,
                value: unless_zero(value)?,
            },
            ["committed"] => What::Committed,
            ["refused"] => What::Refused,
            ["unknown"] => What::Unknown,
            ["ends"] => What::Ends,
            _ => return None,
        };
        Some(Self { client: client.parse().ok()?, at: at.parse().ok()?, what })
    }
}

/// Makes holds and deeds of what the clients say.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    clients: BTreeMap<u64, Client>,
    pub(crate) holds: Vec<Hold>,
    pub(crate) deeds: Vec<Deed>,
    pub(crate) operations: u64,
}

#[derive(Debug, Default)]
struct Client {
    asks: Option<(String, Moment)>,
    /// By their numbers in the recorder.
    hold: Option<usize>,
    deed: Option<usize>,
}

impl Recorder {
    pub(crate) fn note(&mut self, event: Event) {
        let Event { client: number, at, what } = event;
        let client = self.clients.entry(number).or_default();
        match what {
            What::Asks { name } => {
                self.operations += 1;
                client.asks = Some((name, at));
            }
            What::Denied => client.asks = None,
            What::Granted { token } => {
                let (name, asked) = client.asks.take().expect("it has asked");
                client.hold = Some(self.holds.len());
                self.holds.push(Hold {
                    client: number,
                    name,
                    token,
                    asked,
                    granted: at,
                    held: None,
                    told: None,
                    held_again: false,
                });
            }
            What::Held => {
                let hold = &mut self.holds[client.hold.expect("it has the lock")];
                hold.held = hold.held.max(Some(at));
                hold.held_again |= hold.told.is_some();
            }
            What::Told => {
                let hold = &mut self.holds[client.hold.expect("it had the lock")];
                hold.told = hold.told.or(Some(at));
            }
            What::Commits { called, previous, value } => {
                self.operations += 1;
                let hold = &self.holds[client.hold.expect("it has the lock")];
                client.deed = Some(self.deeds.len());
                self.deeds.push(Deed {
                    client: number,
                    register: hold.name.clone(),
                    token: hold.token,
                    called,
                    returned: None,
                    previous,
                    value,
                    outcome: Outcome::Unknown,
                });
            }
            What::Committed | What::Refused | What::Unknown => {
                let deed = &mut self.deeds[client.deed.take().expect("it has committed")];
                deed.outcome = match what {
                    What::Committed => Outcome::Committed,
                    What::Refused => Outcome::Refused,
                    _ => Outcome::Unknown,
                };
                // One whose outcome is unknown may still be carried out.
                deed.returned = Some(at).filter(|_| deed.outcome != Outcome::Unknown);
            }
            What::Ends => {
                self.operations += 1;
                client.hold = None;
            }
        }
    }

    /// The names of the locks that these clients have.
    pub(crate) fn held_by(&self, is_one: impl Fn(u64) -> bool) -> Vec<String> {
        let theirs = self.clients.iter().filter(|(number, _)| is_one(**number));
        theirs.filter_map(|(_, client)| Some(self.holds[client.hold?].name.clone())).collect()
    }
}

mod tests {
    use super::*;

    lock_tests::cases! {
        without a database:
        a_truncated_line_is_not_read,
    }

    fn a_truncated_line_is_not_read() {
        let all = [
            What::Asks { name: "lease-1".into() },
            What::Granted { token: Some(1_700_000_000_000_001) },
            What::Granted { token: None },
            What::Denied,
            What::Held,
            What::Told,
            What::Commits { called: 17, previous: 0, value: Some(4_000_001) },
            What::Commits { called: 17, previous: 9, value: None },
            What::Committed,
            What::Refused,
            What::Unknown,
            What::Ends,
        ];
        for what in all {
            let event = Event { client: 11, at: u64::MAX, what };
            let line = event.to_string();
            assert_eq!(Event::parse(&line).as_ref(), Some(&event));
            for length in 0..line.len() {
                assert_eq!(Event::parse(&line[..length]), None, "{}", &line[..length]);
            }
        }
    }
}
