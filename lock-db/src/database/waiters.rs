//! The queue in the row of a lock: which processes wait for it, the first one first.
//!
//! A place is 56 characters: the secret with which the process will take the lock, until when the place lasts (microseconds
//! since 1970 by the database's clock, 16 digits), and whom a release calls (8 hexadecimal digits, zeros for nobody). So
//! the statements find the first one without knowing the rest.

use std::fmt::Write as _;
use std::time::Duration;

use crate::limits::micros;

/// What the columns hold.
const MOST: usize = 64;
const SECRET: usize = 32;
const UNTIL: usize = 16;
const LISTENER: usize = 8;
const PLACE: usize = SECRET + UNTIL + LISTENER;

/// How long a place lasts without a sign of its process: so long a free lock may wait for one that has died.
pub(crate) const LASTS: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Waiters(Vec<Waiter>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Waiter {
    secret: String,
    until: i64,
    listener: u32,
}

impl Waiters {
    /// Those whose place lasts now. What was written by somebody who does not know this form is dropped.
    pub(crate) fn parse(text: &str, now: i64) -> Self {
        let places = text.as_bytes().chunks_exact(PLACE).filter_map(|place| {
            let place = std::str::from_utf8(place).ok()?;
            let (secret, rest) = place.split_at_checked(SECRET)?;
            let (until, listener) = rest.split_at_checked(UNTIL)?;
            let (until, listener) = (until.parse().ok()?, u32::from_str_radix(listener, 16).ok()?);
            // One that lasts longer than any place was given out before the clock was set back.
            let lasts = until > now && until <= now.saturating_add(2 * micros(LASTS));
            lasts.then(|| Waiter { secret: secret.to_owned(), until, listener })
        });
        Self(places.collect())
    }

    pub(crate) fn text(&self) -> String {
        let mut text = String::with_capacity(self.0.len() * PLACE);
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

    /// Takes a place, or keeps it for longer when half of its time is over. `false`: nothing has changed.
    pub(crate) fn stand(&mut self, secret: &str, now: i64, listener: u32) -> bool {
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
        let mut waiters = Waiters::default();
        assert!(waiters.stand(&secret(1), NOW, 7));
        assert!(waiters.stand(&secret(2), NOW, 0));
        assert!(!waiters.stand(&secret(1), NOW + 1, 7), "young enough");
        let text = waiters.text();
        assert_eq!(text.len(), 2 * PLACE);
        assert!(text.starts_with(&format!("{}{}00000007", secret(1), NOW + micros(LASTS))));
        assert_eq!(Waiters::parse(&text, NOW), waiters);
        assert_eq!(waiters.position(&secret(2)), Some(1));
    }

    #[test]
    fn a_place_ends_unless_it_is_kept() {
        let mut waiters = Waiters::default();
        waiters.stand(&secret(1), NOW, 0);
        waiters.stand(&secret(2), NOW, 0);
        let later = NOW + micros(LASTS) - 1;
        assert!(waiters.stand(&secret(2), later, 0));
        let waiters = Waiters::parse(&waiters.text(), later + 1);
        assert_eq!((waiters.position(&secret(1)), waiters.position(&secret(2))), (None, Some(0)));
        let clock_was_set_back = NOW - micros(Duration::from_hours(1));
        assert!(Waiters::parse(&waiters.text(), clock_was_set_back).is_empty());
    }

    #[test]
    fn a_full_queue_takes_nobody_and_foreign_text_is_no_place() {
        let mut waiters = Waiters::default();
        for number in 0..MOST {
            assert!(waiters.stand(&secret(number), NOW, 0));
        }
        assert!(!waiters.stand(&secret(MOST), NOW, 0));
        assert_eq!(waiters.text().len(), 3584, "as long as the column of MySQL");
        for foreign in ["x", &"x".repeat(PLACE), &"ü".repeat(PLACE), &"9".repeat(PLACE)] {
            assert!(Waiters::parse(foreign, NOW).is_empty(), "{foreign}");
        }
    }
}
