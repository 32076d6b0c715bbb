//! The queue of a row, in its column `waiters`: the processes that wait for the lock, in their
//! order.
//!
//! The column holds ASCII text: at most 64 entries of 96 characters each, without separators, the
//! first waiter first. An empty text is an empty queue. An entry is laid out as follows, with
//! positions that count from 1 as in SQL:
//!
//! | Position | Length | Field    | Content                                                   |
//! |----------|--------|----------|-----------------------------------------------------------|
//! | 1        | 1      | version  | `1`, the version of this format                           |
//! | 2–33     | 32     | secret   | identifies the process, which uses one for all its queues |
//! | 34–46    | 13     | since    | when the process enqueued                                 |
//! | 47–59    | 13     | until    | when the entry expires, unless the process extends it     |
//! | 60–88    | 29     | owner    | the process, for people: see [`short_owner`]              |
//! | 89–96    | 8      | listener | the listener id that a release notifies, in hexadecimal;  |
//! |          |        |          | 0 means none                                              |
//!
//! Times are in milliseconds since 1970 by the database's clock, in decimal. Numbers are padded
//! with zeros, the owner with blanks.
//!
//! Version and secret together are the *key* of an entry. Statements find an entry by its key, and
//! so never one of another version.
//!
//! This module is the only one that knows these numbers. The statements of each database contain
//! them as well; its macros (`queue.rs`) make them of [`layout!`].
//!
//! Up to about 19 entries a row of PostgreSQL stays below 2 kB, beyond which the server compresses
//! the column. That takes several times as long as the rest of the statement. So a longer owner
//! would have a price.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use super::Notification;
use crate::options::micros;
use crate::secret::Secret;

/// The numbers of the layout, as literals for statements. Positions count from 1, times are in
/// milliseconds.
macro_rules! layout {
    (key) => {
        33
    };
    (time) => {
        13
    };
    (owner) => {
        29
    };
    (listener) => {
        8
    };
    (listener_at) => {
        89
    };
    (entry) => {
        96
    };
    (second_entry_at) => {
        97
    };
    (until_after_key) => {
        46
    };
    (from_until) => {
        50
    };
    (full) => {
        6144
    };
    (lasts) => {
        2000
    };
}

const VERSION: char = '1';
const MOST: usize = 64;
const KEY: usize = layout!(key);
const TIME: usize = layout!(time);
const OWNER: usize = layout!(owner);
const LISTENER: usize = layout!(listener);
const ENTRY: usize = KEY + TIME + TIME + OWNER + LISTENER;

/// Length of the longest queue.
pub(super) const LONGEST: usize = MOST * ENTRY;

// What the statements have as literals follows from the lengths of the fields.
const _: () = assert!(
    layout!(entry) == ENTRY
        && layout!(second_entry_at) == ENTRY + 1
        && layout!(listener_at) == ENTRY - LISTENER + 1
        && layout!(until_after_key) == KEY + TIME
        && layout!(from_until) == ENTRY - KEY - TIME
        && layout!(full) == LONGEST
);

/// How long an entry is valid unless its process extends it. A free lock waits this long for a
/// first waiter that has died.
pub(crate) const LASTS: Duration = Duration::from_millis(layout!(lasts));

/// What a process writes into a queue. The times are added by the database's clock.
#[derive(Debug, Clone)]
pub struct QueueEntry {
    pub secret: Secret,
    pub owner: Arc<str>,
    /// Listener id that a release notifies; 0 means none.
    pub listener: u32,
}

impl QueueEntry {
    /// The parts of an entry before and behind its times, as SQL binds them. Both are empty for no
    /// entry.
    pub(super) fn parts(entry: Option<&Self>) -> (String, String) {
        entry.map_or_else(Default::default, |Self { secret, owner, listener }| {
            (key(secret), format!("{:OWNER$}{listener:0>LISTENER$x}", short_owner(owner)))
        })
    }
}

/// What SQL finds an entry by: the version of the format, and the secret of the process.
pub(super) fn key(secret: &Secret) -> String {
    format!("{VERSION}{}", secret.as_str())
}

/// An owner (host, process id and label) in the length that an entry has for it. Without the label,
/// if it is too long, and then with a `~` for its middle: hosts differ at the beginning or at the
/// end. Has no characters that would need escaping in SQL.
fn short_owner(owner: &str) -> String {
    let mut owner: String = owner
        .chars()
        .map(|one| if one.is_ascii_alphanumeric() || "-._/:@+ ".contains(one) { one } else { '?' })
        .collect();
    if owner.len() > OWNER
        && let Some((label, _)) = owner.match_indices('/').nth(1)
    {
        owner.truncate(label);
    }
    if owner.len() > OWNER {
        let beginning = OWNER / 2;
        owner.replace_range(beginning..owner.len() - (OWNER - beginning - 1), "~");
    }
    owner
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct WaitQueue(Vec<Waiter>);

/// An entry as it was read. Times are in milliseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Waiter {
    secret: String,
    since: i64,
    until: i64,
    owner: String,
    listener: u32,
}

impl Waiter {
    /// `None` if the text is not in this version of the format.
    fn parse(entry: &[u8]) -> Option<Self> {
        let entry = std::str::from_utf8(entry).ok()?.strip_prefix(VERSION)?;
        let (secret, entry) = entry.split_at_checked(KEY - VERSION.len_utf8())?;
        let (since, entry) = entry.split_at_checked(TIME)?;
        let (until, entry) = entry.split_at_checked(TIME)?;
        let (owner, listener) = entry.split_at_checked(OWNER)?;
        Some(Self {
            secret: secret.to_owned(),
            since: since.parse().ok()?,
            until: until.parse().ok()?,
            owner: owner.trim_end().to_owned(),
            listener: u32::from_str_radix(listener, 16).ok()?,
        })
    }
}

impl WaitQueue {
    /// Parses the entries that are valid at `now`, in microseconds since 1970. Text that is not in
    /// this version of the format is dropped.
    pub(crate) fn parse(text: &str, now: i64) -> Self {
        let now = millis(now);
        // A deadline further ahead than this was written before the clock was set back.
        let furthest = now.saturating_add(2 * millis(micros(LASTS)));
        let entries = text.as_bytes().chunks_exact(ENTRY).filter_map(Waiter::parse);
        Self(entries.filter(|entry| entry.until > now && entry.until <= furthest).collect())
    }

    pub(crate) fn text(&self) -> String {
        let mut text = String::with_capacity(self.0.len() * ENTRY);
        for Waiter { secret, since, until, owner, listener } in &self.0 {
            let _infallible = write!(
                text,
                "{VERSION}{secret}{since:0>TIME$}{until:0>TIME$}{owner:OWNER$}{listener:0>LISTENER$x}"
            );
        }
        text
    }

    pub(crate) fn position(&self, secret: &Secret) -> Option<usize> {
        self.0.iter().position(|waiter| waiter.secret == secret.as_str())
    }

    /// The entries for people.
    pub(crate) fn waiting(&self) -> Vec<crate::Waiter> {
        let waiting = |Waiter { owner, since, .. }: &Waiter| crate::Waiter {
            owner: owner.clone(),
            since: super::lock_row::timestamp(since.saturating_mul(1000)),
        };
        self.0.iter().map(waiting).collect()
    }

    pub(crate) fn has_room(&self) -> bool {
        self.0.len() < MOST
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Appends an entry at `now`, in microseconds since 1970. Extends an existing one if less than
    /// half of its time is left, or if its listener has changed. `false`: nothing has changed.
    pub(crate) fn enqueue(&mut self, entry: &QueueEntry, now: i64) -> bool {
        let QueueEntry { secret, owner, listener } = entry;
        let (now, lasts) = (millis(now), millis(micros(LASTS)));
        let until = now.saturating_add(lasts);
        match self.position(secret) {
            Some(position) => {
                let waiter = &mut self.0[position];
                let is_old = waiter.until < now.saturating_add(lasts / 2);
                if is_old || waiter.listener != *listener {
                    (waiter.until, waiter.listener) = (until, *listener);
                    return true;
                }
                false
            }
            None if self.has_room() => {
                let (secret, owner) = (secret.as_str().to_owned(), short_owner(owner));
                self.0.push(Waiter { secret, since: now, until, owner, listener: *listener });
                true
            }
            None => false,
        }
    }
}

/// Whether the queue in this text begins with an entry of the process.
pub(crate) fn begins_with(text: &str, secret: &Secret) -> bool {
    text.strip_prefix(VERSION).is_some_and(|text| text.starts_with(secret.as_str()))
}

/// Whom a release of the row would notify: the first entry in this text, whether or not it has
/// expired.
pub(super) fn first_notification(text: &str, id: i64) -> Option<Notification> {
    let Waiter { listener, .. } = Waiter::parse(text.as_bytes().get(..ENTRY)?)?;
    (listener > 0).then_some(Notification { listener, id })
}

fn millis(micros: i64) -> i64 {
    micros / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_700_000_000_000_000;

    fn entry(listener: u32) -> QueueEntry {
        QueueEntry { secret: Secret::generate().unwrap(), owner: "host/4711/billing".into(), listener }
    }

    #[test]
    fn entries_keep_their_order_and_are_read_as_they_were_written() {
        let (first, second) = (entry(7), entry(0));
        let mut queue = WaitQueue::default();
        assert!(queue.enqueue(&first, NOW));
        assert!(queue.enqueue(&second, NOW));
        assert!(!queue.enqueue(&first, NOW + 1_000), "young enough");
        let text = queue.text();
        assert_eq!(text.len(), 2 * ENTRY);
        let secret = first.secret.as_str();
        let expected = format!("1{secret}17000000000001700000002000host/4711/billing            00000007");
        assert_eq!(text.get(..ENTRY), Some(&*expected));
        assert_eq!(WaitQueue::parse(&text, NOW), queue);
        assert_eq!(queue.position(&second.secret), Some(1));
        assert!(begins_with(&text, &first.secret) && !begins_with(&text, &second.secret));
        assert_eq!(first_notification(&text, 3), Some(Notification { listener: 7, id: 3 }));
        assert_eq!(first_notification(&text[ENTRY..], 3), None, "it listens to nothing");
        assert_eq!(first_notification("", 3), None);
        assert_eq!(first_notification(&text.replacen(VERSION, "2", 1), 3), None, "it is of another version");
    }

    #[test]
    fn what_sql_joins_is_an_entry() {
        let one = entry(0xabcd);
        let (key, rest) = QueueEntry::parts(Some(&one));
        let now = NOW / 1000;
        let mut queue = WaitQueue::default();
        queue.enqueue(&one, NOW);
        assert_eq!(format!("{key}{now}{}{rest}", now + layout!(lasts)), queue.text());
        assert_eq!(key, super::key(&one.secret));
        assert_eq!(QueueEntry::parts(None), (String::new(), String::new()));
    }

    #[test]
    fn an_entry_ends_unless_it_is_extended_and_says_since_when_it_waits() {
        let (first, second) = (entry(0), entry(0));
        let mut queue = WaitQueue::default();
        queue.enqueue(&first, NOW);
        queue.enqueue(&second, NOW);
        let later = NOW + micros(LASTS) - 1_000;
        assert!(queue.enqueue(&second, later));
        let queue = WaitQueue::parse(&queue.text(), later + 1_000);
        assert_eq!((queue.position(&first.secret), queue.position(&second.secret)), (None, Some(0)));
        assert_eq!(queue.0[0].since, NOW / 1000);
        let clock_was_set_back = NOW - micros(Duration::from_hours(1));
        assert!(WaitQueue::parse(&queue.text(), clock_was_set_back).is_empty());
    }

    #[test]
    fn a_full_queue_takes_no_entry_and_text_in_another_format_is_dropped() {
        let mut queue = WaitQueue::default();
        for _ in 0..MOST {
            assert!(queue.enqueue(&entry(0), NOW));
        }
        assert!(!queue.enqueue(&entry(0), NOW));
        assert_eq!(queue.text().len(), LONGEST);
        let later_version = queue.text().replacen(VERSION, "2", 1);
        assert_eq!(WaitQueue::parse(&later_version, NOW).len(), MOST - 1);
        for foreign in ["x", &"x".repeat(ENTRY), &"1".repeat(ENTRY), &"ü".repeat(ENTRY), &"9".repeat(ENTRY)]
        {
            assert!(WaitQueue::parse(foreign, NOW).is_empty(), "{foreign}");
        }
    }

    #[test]
    fn a_long_owner_keeps_what_tells_hosts_apart() {
        for (owner, expected) in [
            ("web/17/billing", "web/17/billing"),
            ("0123456789ab/1/a service with a long label", "0123456789ab/1"),
            ("checkout-service-6d4cf56db6-x7k2p/1/checkout", "checkout-servi~f56db6-x7k2p/1"),
            ("ip-10-0-0-12.eu-west-1.compute.internal/4711", "ip-10-0-0-12.e~.internal/4711"),
            ("büro's/17", "b?ro?s/17"),
        ] {
            let short = short_owner(owner);
            assert_eq!(short, expected);
            assert!(short.len() <= OWNER);
        }
    }
}
