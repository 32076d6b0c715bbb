//! The names whose rows this process has seen, as far as it remembers.

use std::cell::RefCell;
use std::collections::HashSet;

use crate::name::Name;

/// How many names each of the two sets holds.
const MOST: usize = 8192;

/// A memory of limited size. It holds the last `MOST` names at least, and twice as many at most.
///
/// It may be wrong in both directions. A name that it has forgotten costs the server a look for the
/// row. A name whose row was deleted costs the process another statement.
#[derive(Default)]
pub(super) struct KnownNames {
    sets: RefCell<(HashSet<Name>, HashSet<Name>)>,
}

impl KnownNames {
    pub(super) fn contains(&self, name: &Name) -> bool {
        let (young, old) = &*self.sets.borrow();
        young.contains(name) || old.contains(name)
    }

    pub(super) fn insert(&self, name: &Name) {
        let (young, old) = &mut *self.sets.borrow_mut();
        if young.len() >= MOST {
            *old = std::mem::take(young);
        }
        if !young.contains(name) {
            young.insert(name.clone());
        }
    }

    pub(super) fn remove(&self, name: &Name) {
        let (young, old) = &mut *self.sets.borrow_mut();
        young.remove(name);
        old.remove(name);
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
    fn the_last_names_are_known_and_the_number_is_limited() {
        let known = KnownNames::default();
        for number in 0..5 * MOST {
            assert!(!known.contains(&name(number)));
            known.insert(&name(number));
        }
        for number in 4 * MOST..5 * MOST {
            assert!(known.contains(&name(number)), "{number}");
        }
        assert!(!known.contains(&name(0)));
        let (young, old) = &*known.sets.borrow();
        assert!(young.len() + old.len() <= 2 * MOST);
    }

    #[test]
    fn a_removed_name_is_not_known() {
        let known = KnownNames::default();
        known.insert(&name(1));
        known.remove(&name(1));
        assert!(!known.contains(&name(1)));
    }
}
