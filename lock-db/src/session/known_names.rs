//! The names whose rows this process has seen, as far as it remembers.

use std::cell::RefCell;
use std::hash::{BuildHasher, RandomState};

use crate::name::Name;

/// How many names it remembers at most. They take 64 KiB, however long they are.
const PLACES: usize = 8192;

/// Of each name only its hash, in one of these places. A new name takes that of the one that was used
/// longest ago. With one place a name, two names in use could displace each other again and again.
const PLACES_EACH: usize = 4;
const SETS: usize = PLACES / PLACES_EACH;

/// A memory of fixed size.
///
/// It may be wrong in both directions. A name that it has forgotten costs the server a look for the
/// row. A name that it knows although its row is gone costs the process another statement.
pub(super) struct KnownNames {
    /// In each set, the one that was used last comes first. Zero is an empty place.
    sets: RefCell<Box<[[u64; PLACES_EACH]]>>,
    state: RandomState,
}

impl Default for KnownNames {
    fn default() -> Self {
        Self { sets: RefCell::new(vec![[0; PLACES_EACH]; SETS].into()), state: RandomState::new() }
    }
}

impl KnownNames {
    pub(super) fn contains(&self, name: &Name) -> bool {
        self.with_set(name, |set, hash| set.contains(&hash))
    }

    pub(super) fn insert(&self, name: &Name) {
        self.with_set(name, |set, hash| {
            let last = set.iter().position(|found| *found == hash).unwrap_or(PLACES_EACH - 1);
            if let Some(moved) = set.get_mut(..=last) {
                moved.rotate_right(1);
            }
            set[0] = hash;
        });
    }

    pub(super) fn remove(&self, name: &Name) {
        self.with_set(name, |set, hash| {
            for found in set.iter_mut().filter(|found| **found == hash) {
                *found = 0;
            }
        });
    }

    fn with_set<T: Default>(&self, name: &Name, work: impl FnOnce(&mut [u64; PLACES_EACH], u64) -> T) -> T {
        let hash = self.state.hash_one(&**name).max(1);
        let number = usize::try_from(hash % SETS as u64).unwrap_or(0);
        self.sets.borrow_mut().get_mut(number).map(|set| work(set, hash)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name;

    fn name(number: usize) -> Name {
        name::check("", &format!("name {number}")).expect("a valid name")
    }

    #[test]
    fn most_of_the_last_names_are_known() {
        let known = KnownNames::default();
        for number in 0..4 * PLACES {
            known.insert(&name(number));
            assert!(known.contains(&name(number)));
        }
        let last = 4 * PLACES - 64..4 * PLACES;
        assert!(last.filter(|number| known.contains(&name(*number))).count() > 32);
        assert!((0..64).filter(|number| known.contains(&name(*number))).count() < 32);
    }

    #[test]
    fn names_in_use_do_not_displace_each_other() {
        let known = KnownNames::default();
        let missed = |number: usize| {
            let is_new = !known.contains(&name(number));
            known.insert(&name(number));
            is_new
        };
        // Of 256 names in 2048 sets, more than four are in one set about once in 2000 times.
        let mut rounds = (0..3).map(|_| (0..256).filter(|number| missed(*number)).count());
        assert_eq!(rounds.next(), Some(256));
        assert!(rounds.all(|missed| missed <= 5));
    }

    #[test]
    fn a_removed_name_is_not_known() {
        let known = KnownNames::default();
        assert!(!known.contains(&name(1)));
        known.insert(&name(1));
        known.remove(&name(1));
        assert!(!known.contains(&name(1)));
    }
}
