//! The queue of a row, in its column `waiters`: the processes that wait for the lock, in their
//! order.
//!
//! The column holds ASCII text: at most 64 entries of 56 characters each, without separators, the
//! first waiter first. An empty text is an empty queue. An entry is laid out as follows, with
//! positions that count from 1 as in SQL:
//!
//! | Position | Length | Field    | Content                                                   |
//! |----------|--------|----------|-----------------------------------------------------------|
//! | 1–32     | 32     | secret   | identifies the process, which uses one for all its queues |
//! | 33–48    | 16     | deadline | decimal, padded with zeros: the time until the entry is   |
//! |          |        |          | valid, in microseconds since 1970 by the database's clock |
//! | 49–56    | 8      | listener | hexadecimal, padded with zeros: the listener id that a    |
//! |          |        |          | release notifies; 0 means none                            |
//!
//! This module is the only one that knows these numbers. The statements of each database contain
//! them as well; its macros (`queue.rs`) make them of [`layout!`].

use std::fmt::Write as _;
use std::time::Duration;

use crate::options::micros;

/// The numbers of the layout, as literals for statements. Positions count from 1.
macro_rules! layout {
    (secret) => {
        32
    };
    (time) => {
        16
    };
    (listener_at) => {
        49
    };
    (listener) => {
        8
    };
    (entry) => {
        56
    };
    (second_entry_at) => {
        57
    };
    (full) => {
        3584
    };
    (lasts) => {
        2000000
    };
}

const MOST: usize = 64;
const SECRET: usize = layout!(secret);
const UNTIL: usize = layout!(time);
const LISTENER: usize = layout!(listener);
const ENTRY: usize = layout!(entry);

/// Length of the longest queue.
pub(super) const LONGEST: usize = layout!(full);

/// How long an entry is valid unless its process extends it. A free lock waits this long for a
/// first waiter that has died.
pub(crate) const LASTS: Duration = Duration::from_micros(layout!(lasts));

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct WaitQueue(Vec<Waiter>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Waiter {
    secret: String,
    until: i64,
    listener: u32,
}

impl WaitQueue {
    /// Parses the entries that are valid now. Text that is not in this format is dropped.
    pub(crate) fn parse(text: &str, now: i64) -> Self {
        let places = text.as_bytes().chunks_exact(ENTRY).filter_map(|place| {
            let place = std::str::from_utf8(place).ok()?;
            let (secret, rest) = place.split_at_checked(SECRET)?;
            let (until, listener) = rest.split_at_checked(UNTIL)?;
            let (until, listener) = (until.parse().ok()?, u32::from_str_radix(listener, 16).ok()?);
            // A deadline further ahead than this was written before the clock was set back.
            let lasts = until > now && until <= now.saturating_add(2 * micros(LASTS));
            lasts.then(|| Waiter { secret: secret.to_owned(), until, listener })
        });
        Self(places.collect())
    }

    pub(crate) fn text(&self) -> String {
        let mut text = String::with_capacity(self.0.len() * ENTRY);
        for Waiter { secret, until, listener } in &self.0 {
            let _infallible = write!(text, "{secret:0>SECRET$}{until:0>UNTIL$}{listener:0>LISTENER$x}");
        }
        text
    }

    pub(crate) fn position(&self, secret: &str) -> Option<usize> {
        self.0.iter().position(|waiter| waiter.secret == secret)
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

    /// Appends an entry. Extends an existing one if less than half of its time is left, or if its
    /// listener has changed. `false`: nothing has changed.
    pub(crate) fn enqueue(&mut self, secret: &str, now: i64, listener: u32) -> bool {
        let until = now.saturating_add(micros(LASTS));
        match self.position(secret) {
            Some(position) => {
                let waiter = &mut self.0[position];
                let is_old = waiter.until < now.saturating_add(micros(LASTS / 2));
                if is_old || waiter.listener != listener {
                    (waiter.until, waiter.listener) = (until, listener);
                    return true;
                }
                false
            }
            None if self.has_room() => {
                self.0.push(Waiter { secret: secret.to_owned(), until, listener });
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_700_000_000_000_000;

    fn secret(number: usize) -> String {
        format!("{number:032x}")
    }

    #[test]
    fn places_stand_in_order_and_are_read_as_they_were_written() {
        let mut waiters = WaitQueue::default();
        assert!(waiters.enqueue(&secret(1), NOW, 7));
        assert!(waiters.enqueue(&secret(2), NOW, 0));
        assert!(!waiters.enqueue(&secret(1), NOW + 1, 7), "young enough");
        let text = waiters.text();
        assert_eq!(text.len(), 2 * ENTRY);
        assert!(text.starts_with(&format!("{}{}00000007", secret(1), NOW + micros(LASTS))));
        assert_eq!(WaitQueue::parse(&text, NOW), waiters);
        assert_eq!(waiters.position(&secret(2)), Some(1));
    }

    #[test]
    fn a_place_ends_unless_it_is_kept() {
        let mut waiters = WaitQueue::default();
        waiters.enqueue(&secret(1), NOW, 0);
        waiters.enqueue(&secret(2), NOW, 0);
        let later = NOW + micros(LASTS) - 1;
        assert!(waiters.enqueue(&secret(2), later, 0));
        let waiters = WaitQueue::parse(&waiters.text(), later + 1);
        assert_eq!((waiters.position(&secret(1)), waiters.position(&secret(2))), (None, Some(0)));
        let clock_was_set_back = NOW - micros(Duration::from_hours(1));
        assert!(WaitQueue::parse(&waiters.text(), clock_was_set_back).is_empty());
    }

    #[test]
    fn a_full_queue_takes_nobody_and_foreign_text_is_no_place() {
        let mut waiters = WaitQueue::default();
        for number in 0..MOST {
            assert!(waiters.enqueue(&secret(number), NOW, 0));
        }
        assert!(!waiters.enqueue(&secret(MOST), NOW, 0));
        assert_eq!(waiters.text().len(), 3584, "as long as the column of MySQL");
        for foreign in ["x", &"x".repeat(ENTRY), &"ü".repeat(ENTRY), &"9".repeat(ENTRY)] {
            assert!(WaitQueue::parse(foreign, NOW).is_empty(), "{foreign}");
        }
    }
}
