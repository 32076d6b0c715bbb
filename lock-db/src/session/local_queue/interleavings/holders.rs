//! Which callers hold what, and the checks of it.

use super::*;

/// Which caller holds what, as the callers see it.
#[derive(Default)]
pub(super) struct Holders {
    pub(super) names: std::sync::Mutex<BTreeMap<Name, Inside>>,
}

#[derive(Default)]
pub(super) struct Inside {
    pub(super) now: Vec<(Arc<LeaseState>, i64)>,
    pub(super) last_fencing_token: i64,
    /// By the number of the lease: how many more holders it may have, and its token range.
    pub(super) left: BTreeMap<u64, (u32, std::ops::RangeInclusive<i64>)>,
    /// Leases that must not get another holder: they were lost, or a commit may still be carried
    /// out under them.
    pub(super) over: BTreeSet<u64>,
}

impl Holders {
    pub(super) fn may_have(&self, lease: &LeaseState, tokens: u32, holders: u32) {
        let last = lease.key.fencing_token;
        let of_the_grant = last - i64::from(tokens) + 1..=last;
        let mut names = self.names.lock().unwrap();
        let inside = names.entry(lease.key.row.name.clone()).or_default();
        inside.left.insert(lease.number, (holders, of_the_grant));
    }

    pub(super) fn enter(&self, handle: &LeaseHandle) {
        let (before, last, holders) = {
            let mut names = self.names.lock().unwrap();
            let inside = names.get_mut(handle.name()).unwrap();
            let before = inside.now.clone();
            inside.now.push((Arc::clone(&handle.lease), handle.fencing_token));
            let last = inside.last_fencing_token;
            inside.last_fencing_token = last.max(handle.fencing_token);
            let (left, of_the_grant) = inside.left.get_mut(&handle.lease.number).unwrap();
            assert!(of_the_grant.contains(&handle.fencing_token), "a fencing token of another grant");
            assert!(!inside.over.contains(&handle.lease.number), "lost, or a former holder may still commit");
            let holders = left.checked_sub(1);
            *left = left.saturating_sub(1);
            (before, last, holders)
        };
        assert!(holders.is_some(), "the lease went too far");
        // A loss is final, so a loss from before this point is still visible now.
        for (other, _) in before {
            let same = Arc::ptr_eq(&other, &handle.lease);
            assert!(!same, "two hold one lease");
            assert!(other.loss().is_some() || handle.lease.loss().is_some(), "two hold the lock");
        }
        if handle.fencing_token <= last {
            assert!(handle.lease.loss().is_some(), "the fencing token did not grow");
        }
    }

    pub(super) fn leave(&self, handle: &LeaseHandle) {
        let mut names = self.names.lock().unwrap();
        names
            .get_mut(handle.name())
            .unwrap()
            .now
            .retain(|(_, fencing_token)| *fencing_token != handle.fencing_token);
    }

    pub(super) fn is_over(&self, handle: &LeaseHandle) {
        let mut names = self.names.lock().unwrap();
        names.get_mut(handle.name()).unwrap().over.insert(handle.lease.number);
    }
}
