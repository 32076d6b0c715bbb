//! A process that plays parts, of the holder or of the taker, and the lines in which it talks with the test.

use std::fmt;
use std::time::Duration;

use lock_db::{Error, Lease, Locks};
use lock_tests::{Backend, Parent};
use sqlx::Pool;

pub(crate) const LEVELS: [&str; 3] = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"];
/// How long it waits for the lock.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where the holder is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    Acquired,
    Begun,
    Read,
    Written,
    /// Behind a guard of its own, before the commit.
    Verified,
    /// Some time after it went to commit: before, behind or between guard and commit, or when it was done.
    Committing,
    /// Some time after it was told to begin.
    Anywhere,
}

impl Place {
    pub(crate) const ALL: [Self; 7] = [
        Self::Acquired,
        Self::Begun,
        Self::Read,
        Self::Written,
        Self::Verified,
        Self::Committing,
        Self::Anywhere,
    ];

    /// Whether the holder waits there; else it runs on until it is stopped.
    pub(crate) fn is_exact(self) -> bool {
        !matches!(self, Self::Committing | Self::Anywhere)
    }
}

/// How a transaction is made and committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Guarded,
    GuardedAndReleased,
    /// The caller's own transaction, with `verify_in` as its last statement.
    Verified,
    /// Nothing but the lease protects it.
    Plain,
}

impl Way {
    pub(crate) const ALL: [Self; 4] = [Self::Guarded, Self::GuardedAndReleased, Self::Verified, Self::Plain];
}

/// What a player is told to do: one transaction under the lock, which adds one to a business row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pub(crate) way: Way,
    pub(crate) level: usize,
    pub(crate) row: i64,
    pub(crate) ttl: Duration,
    /// Of a holder; takers are not stopped, but say when they have the lock.
    pub(crate) place: Option<Place>,
}

impl fmt::Display for Part {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { way, level, row, ttl, place } = self;
        write!(formatter, "{way:?} {level} {row} {} {place:?}", ttl.as_millis())
    }
}

impl Part {
    pub(crate) fn parse(line: &str) -> Self {
        let words: Vec<&str> = line.split(' ').collect();
        let [way, level, row, ttl, place] = words[..] else { panic!("no part: {line}") };
        Self {
            way: Way::ALL.into_iter().find(|known| format!("{known:?}") == way).expect("a way"),
            level: level.parse().expect("a number"),
            row: row.parse().expect("a number"),
            ttl: Duration::from_millis(ttl.parse().expect("a number")),
            place: Place::ALL.into_iter().find(|known| format!("{:?}", Some(known)) == place),
        }
    }
}

/// The role of a child.
pub(crate) async fn player<DB: Backend>(mut parent: Parent) {
    let pool = lock_tests::pool::<DB>(parent.url(), 1).await;
    let locks = Locks::new(pool.clone());
    parent.say("ready");
    while let Some(line) = parent.hear().await {
        let part = Part::parse(&line);
        if DB::NAME != "SQLite" {
            let scope =
                if DB::NAME == "PostgreSQL" { "CHARACTERISTICS AS TRANSACTION" } else { "TRANSACTION" };
            let set = format!("SET SESSION {scope} ISOLATION LEVEL {}", LEVELS[part.level]);
            DB::run(&mut pool.acquire().await.unwrap(), &set).await.unwrap();
        }
        let report = match locks.insert_lock("business").ttl(part.ttl).wait(PATIENCE).acquire().await {
            Ok(lease) => {
                let token = lease.fencing_token();
                if part.place.is_none() {
                    parent.say(Line::Taken { token });
                }
                let mut stage = Stage { parent: &mut parent, pool: &pool, part, token };
                Line::Ended { token, outcome: stage.play(lease).await }
            }
            Err(error) => Line::Ended { token: 0, outcome: Outcome::Refused(label(&error)) },
        };
        parent.say(report);
    }
    locks.close().await;
}

/// A transaction of a player.
struct Stage<'a, DB: Backend> {
    parent: &'a mut Parent,
    pool: &'a Pool<DB>,
    part: Part,
    token: i64,
}

impl<DB: Backend> Stage<'_, DB> {
    async fn play(&mut self, lease: Lease<DB>) -> Outcome {
        self.passes(Place::Acquired).await;
        let (lease, outcome) = match self.part.way {
            Way::Guarded | Way::GuardedAndReleased => self.play_guarded(lease).await,
            Way::Verified | Way::Plain => {
                let outcome = self.play_in_own_transaction(&lease).await;
                (Some(lease), outcome)
            }
        };
        if let Some(lease) = lease {
            // It may be lost, and what that means was seen by then.
            let _released = lease.release().await;
        }
        outcome
    }

    async fn play_guarded(&mut self, lease: Lease<DB>) -> (Option<Lease<DB>>, Outcome) {
        let mut transaction = match lease.begin().await {
            Ok(transaction) => transaction,
            Err(error) => return (Some(lease), Outcome::Refused(label(&error))),
        };
        self.passes(Place::Begun).await;
        if let Err(error) = self.work(&mut transaction).await {
            let _rolled_back = transaction.rollback().await;
            return (Some(lease), Outcome::Refused(statement_label(&error)));
        }
        self.passes(Place::Committing).await;
        let (lease, committed) = match self.part.way {
            Way::GuardedAndReleased => (None, lease.commit_and_release(transaction).await),
            _ => (Some(lease), transaction.commit().await),
        };
        let outcome = match committed {
            Ok(()) => Outcome::Committed,
            Err(
                error @ (Error::Database { .. } | Error::Unreachable { .. } | Error::CommitUnknown { .. }),
            ) => Outcome::Unknown(label(&error)),
            Err(error) => Outcome::Refused(label(&error)),
        };
        (lease, outcome)
    }

    async fn play_in_own_transaction(&mut self, lease: &Lease<DB>) -> Outcome {
        let mut transaction = self.pool.begin().await.unwrap();
        self.passes(Place::Begun).await;
        let mut refused = self.work(&mut transaction).await.err().map(|error| statement_label(&error));
        if refused.is_none() {
            self.passes(Place::Committing).await;
            if self.part.way == Way::Verified {
                refused = lease.verify_in(&mut transaction).await.err().map(|error| label(&error));
            }
        }
        if let Some(refused) = refused {
            let _rolled_back = transaction.rollback().await;
            return Outcome::Refused(refused);
        }
        self.passes(Place::Verified).await;
        match transaction.commit().await {
            Ok(()) => Outcome::Committed,
            Err(error @ sqlx::Error::Database(_)) => Outcome::Refused(statement_label(&error)),
            Err(error) => Outcome::Unknown(error.to_string()),
        }
    }

    /// Reads, adds, writes: what must not be done by two at a time.
    async fn work(&mut self, connection: &mut DB::Connection) -> sqlx::Result<()> {
        let (row, token) = (self.part.row, self.token);
        let read = format!("SELECT n FROM business WHERE id = {row}");
        let n = DB::find_number(connection, &read).await?.expect("the row is there");
        self.passes(Place::Read).await;
        let write = format!("UPDATE business SET n = {} WHERE id = {row}", n + 1);
        DB::run(connection, &write).await?;
        let note = format!("INSERT INTO history VALUES ({token}, {row}, {})", n + 1);
        DB::run(connection, &note).await?;
        self.passes(Place::Written).await;
        Ok(())
    }

    async fn passes(&mut self, place: Place) {
        if self.part.place == Some(place) {
            self.parent.say(Line::Here);
            if place.is_exact() {
                self.parent.hear().await;
            }
        }
    }
}

fn label(error: &Error) -> String {
    match error {
        Error::Lost { reason, .. } => format!("Lost({reason:?})"),
        Error::Deadlock { source, .. } => format!("Deadlock ({})", statement_label(source)),
        Error::Serialization { source: Some(source), .. } => {
            format!("Serialization ({})", statement_label(source))
        }
        Error::Database { source, .. }
        | Error::Unreachable { source, .. }
        | Error::Refused { source, .. } => {
            format!("Database ({})", statement_label(source))
        }
        other => format!("{other:?}"),
    }
}

fn statement_label(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(error) => {
            format!("sqlx: {} {}", error.code().unwrap_or_default(), error.message())
        }
        other => format!("sqlx: {other}"),
    }
}

/// What a player says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Line {
    Here,
    Taken { token: i64 },
    Ended { token: i64, outcome: Outcome },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Committed,
    /// Nothing of it may be seen.
    Refused(String),
    /// It may have been committed or not.
    Unknown(String),
}

impl fmt::Display for Line {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here => formatter.write_str("here"),
            Self::Taken { token } => write!(formatter, "taken {token}"),
            Self::Ended { token, outcome: Outcome::Committed } => write!(formatter, "committed {token}"),
            Self::Ended { token, outcome: Outcome::Refused(why) } => {
                write!(formatter, "refused {token} {}", why.replace('\n', " "))
            }
            Self::Ended { token, outcome: Outcome::Unknown(why) } => {
                write!(formatter, "unknown {token} {}", why.replace('\n', " "))
            }
        }
    }
}

impl Line {
    pub(crate) fn parse(line: &str) -> Self {
        let mut words = line.splitn(3, ' ');
        let what = words.next();
        let token = words.next().map_or(0, |token| token.parse().expect("a fencing token"));
        let why = words.next().unwrap_or_default().to_owned();
        match what {
            Some("here") => Self::Here,
            Some("taken") => Self::Taken { token },
            Some("committed") => Self::Ended { token, outcome: Outcome::Committed },
            Some("refused") => Self::Ended { token, outcome: Outcome::Refused(why) },
            Some("unknown") => Self::Ended { token, outcome: Outcome::Unknown(why) },
            _ => panic!("a player said: {line}"),
        }
    }
}
