//! The names whose rows this process has seen, as far as it remembers.

use std::cell::RefCell;
use std::hash::{BuildHasher, RandomState};

use crate::name::Name;

/// How many names it remembers at most. They take 64 KiB, however long they are.
const PLACES: usize = 8192;

/// A memory of fixed size: of each name only its hash, in a place that another name may take.
///
/// It may be wrong in both directions. A name that it has forgotten costs the server a look for the
/// row. A name that it knows although its row is gone costs the process another statement.
pub(super) struct KnownNames {
    hashes: RefCell<Box<[u64]>>,
    state: RandomState,
}

impl Default for KnownNames {
    fn default() -> Self {
        Self { hashes: RefCell::new(vec![0; PLACES].into()), state: RandomState::new() }
    }
}

impl KnownNames {
    pub(super) fn contains(&self, name: &Name) -> bool {
        let (place, hash) = self.place(name);
        self.hashes.borrow().get(place) == Some(&hash)
    }

    pub(super) fn insert(&self, name: &Name) {
        let (place, hash) = self.place(name);
        if let Some(found) = self.hashes.borrow_mut().get_mut(place) {
            *found = hash;
        }
    }

    pub(super) fn remove(&self, name: &Name) {
        let (place, hash) = self.place(name);
        if let Some(found) = self.hashes.borrow_mut().get_mut(place).filter(|found| **found == hash) {
            *found = 0;
        }
    }

    fn place(&self, name: &Name) -> (usize, u64) {
        // Zero is an empty place.
        let hash = self.state.hash_one(&**name).max(1);
        (usize::try_from(hash % PLACES as u64).unwrap_or(0), hash)
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
    fn a_removed_name_is_not_known() {
        let known = KnownNames::default();
        assert!(!known.contains(&name(1)));
        known.insert(&name(1));
        known.remove(&name(1));
        assert!(!known.contains(&name(1)));
    }
}
