//! What the model finds when a rule is left out: each of these shows that the search would notice.

use lock_models::{Mutation, Protocol, property};
use stateright::{Checker, HasDiscoveries, Model};

/// Searches, shortest first, until there is a counterexample to this property.
#[track_caller]
fn breaks(mutation: Mutation, property: &'static str, protocol: Protocol) {
    let intact = Protocol { mutation: None, ..protocol.clone() };
    let mutated = Protocol { mutation: Some(mutation), ..protocol };
    let until = HasDiscoveries::AllOf([property].into());
    let search = mutated.checker().finish_when(until).spawn_bfs().join();
    let Some(path) = search.discovery(property) else {
        panic!("{mutation:?} breaks nothing within {} states", search.unique_state_count());
    };
    let actions = path.into_actions();
    println!("{mutation:?}: \"{property}\" does not hold after {} steps:", actions.len());
    for action in &actions {
        println!("    {action:?}");
    }
    // Not because of anything else: the same steps are harmless, as far as they can be gone, with the rule.
    let mut states = intact.init_states();
    for action in actions {
        let Some(state) = states.pop() else { break };
        let mut possible = Vec::new();
        intact.actions(&state, &mut possible);
        let next = possible.contains(&action).then(|| intact.next_state(&state, action)).flatten();
        let holds = intact.property(property).condition;
        assert!(next.as_ref().is_none_or(|state| holds(&intact, state)));
        states.extend(next);
    }
}

#[test]
fn release_without_the_secret() {
    breaks(Mutation::ReleaseWithoutSecret, property::OWN_ROW_ONLY, Protocol::default());
    breaks(Mutation::ReleaseWithoutSecret, property::HOLDERS_HOLD, Protocol::default());
}

#[test]
fn renewal_without_the_secret() {
    breaks(Mutation::RenewalWithoutSecret, property::OWN_ROW_ONLY, Protocol::default());
    breaks(Mutation::RenewalWithoutSecret, property::HOLDERS_HOLD, Protocol::default());
}

#[test]
fn renewal_of_a_released_row() {
    breaks(Mutation::RenewalOfReleased, property::NOTHING_LEFT, Protocol::default());
}

#[test]
fn expiry_by_the_clients_clock() {
    breaks(Mutation::ExpiryByClientClock, property::ONE_LEASE, Protocol::default());
    breaks(Mutation::ExpiryByClientClock, property::HOLDERS_HOLD, Protocol::default());
}

#[test]
fn a_guard_that_does_not_lock_the_row() {
    let protocol = Protocol { transactions: 1, ..Protocol::default() };
    breaks(Mutation::GuardWithoutLock, property::COMMITS_ARE_SERIAL, protocol);
}

/// An acquire that was made again, because its connection was given up, may arrive once more when the lease is over.
#[test]
fn a_guard_that_does_not_compare_the_fencing_token() {
    let protocol = Protocol { transactions: 1, losses: 1, late: 1, ..Protocol::default() };
    breaks(Mutation::GuardBySecretAlone, property::COMMITS_ARE_SERIAL, protocol);
}

#[test]
fn a_deadline_that_counts_from_the_answer() {
    breaks(Mutation::DeadlineFromTheAnswer, property::HOLDERS_HOLD, Protocol::default());
}

#[test]
fn a_deadline_without_a_margin_for_late_clocks() {
    let protocol = Protocol { late_clocks: true, ..Protocol::default() };
    let search = protocol.checker().spawn_bfs().join();
    assert!(search.discovery(property::HOLDERS_HOLD).is_some(), "the whole TTL is relied on");
}

#[test]
fn an_acquire_that_is_not_idempotent() {
    let protocol = Protocol { losses: 1, ..Protocol::default() };
    breaks(Mutation::AcquireNotIdempotent, property::NOT_REFUSED_BY_ITSELF, protocol);
}

#[test]
fn an_acquire_that_undoes_nothing() {
    let protocol = Protocol { losses: 1, ..Protocol::default() };
    breaks(Mutation::NothingUndone, property::NOTHING_LEFT, protocol);
}

#[test]
fn a_fencing_token_that_starts_over_with_the_row() {
    let protocol = Protocol { cleanings: 1, ..Protocol::default() };
    breaks(Mutation::TokenOfTheRowAlone, property::TOKENS_GROW, protocol);
}

#[test]
fn a_fencing_token_that_follows_the_clock_back() {
    let protocol = Protocol { clock_stands_still: true, ..Protocol::default() };
    breaks(Mutation::TokenOfTheClockAlone, property::TOKENS_GROW, protocol);
}

#[test]
fn a_release_in_a_transaction_that_does_not_doubt() {
    let protocol = Protocol { transactions: 1, releases_in: true, ..Protocol::default() };
    breaks(Mutation::ReleaseInWithoutDoubt, property::HOLDERS_HOLD, protocol);
}

#[test]
fn a_doubt_that_a_renewal_ends_while_the_release_is_under_way() {
    let protocol = Protocol { transactions: 1, releases_in: true, ..Protocol::default() };
    breaks(Mutation::DoubtEndsWhileReleasing, property::HOLDERS_HOLD, protocol);
}

#[test]
fn a_hand_off_during_a_transaction() {
    let protocol = Protocol { transactions: 1, hands: 2, ..Protocol::default() };
    breaks(Mutation::HandOnDuringTransaction, property::COMMITS_ARE_SERIAL, protocol);
}

/// All holders of a lease have its secret, so the guard can't tell a late one from the present one.
#[test]
fn a_hand_off_after_a_commit_without_an_answer() {
    let protocol = Protocol { transactions: 1, hands: 2, losses: 1, ..Protocol::default() };
    breaks(Mutation::HandOnAfterLostCommit, property::COMMITS_ARE_SERIAL, protocol);
}

/// Both are guarded by the same lease.
#[test]
fn a_transaction_after_a_commit_without_an_answer() {
    let protocol = Protocol { transactions: 2, losses: 1, ..Protocol::default() };
    breaks(Mutation::BeginAfterLostCommit, property::COMMITS_ARE_IN_ORDER, protocol);
}

#[test]
fn a_takeover_without_notice() {
    let protocol = Protocol { foreign_locks: 1, ..Protocol::default() };
    breaks(Mutation::TakeoverWithoutNotice, property::HOLDERS_HOLD, protocol);
}

#[test]
fn a_notice_that_the_holder_does_not_read() {
    let protocol = Protocol { foreign_locks: 2, ..Protocol::default() };
    breaks(Mutation::NoticeUnread, property::HOLDERS_HOLD, protocol);
}

/// Also of what was relied on after a look.
#[test]
fn a_notice_without_a_margin_for_late_clocks() {
    let protocol =
        Protocol { foreign_locks: 1, late_clocks: true, ttl: 3, reliable: 2, ..Protocol::default() };
    let search = protocol.checker().spawn_bfs().join();
    assert!(search.discovery(property::HOLDERS_HOLD).is_some(), "the whole notice is relied on");
}

#[test]
fn a_guard_by_a_lease_that_was_released() {
    let protocol = Protocol { snapshots: 1, transactions: 1, losses: 1, ..Protocol::default() };
    breaks(Mutation::GuardByReleased, property::SNAPSHOTS_ARE_NEW, protocol);
}

#[test]
fn a_holder_that_is_ruled_out_under_its_guard() {
    let protocol = Protocol { snapshots: 1, transactions: 1, ..Protocol::default() };
    breaks(Mutation::SettledUnderGuard, property::SNAPSHOTS_ARE_NEW, protocol);
}

#[test]
fn a_snapshot_that_is_judged_by_the_token_alone() {
    let protocol = Protocol { snapshots: 1, transactions: 1, ..Protocol::default() };
    breaks(Mutation::SnapshotByTokenAlone, property::SNAPSHOTS_ARE_NEW, protocol);
}

#[test]
fn a_grant_that_is_answered_before_it_is_on_disk() {
    let protocol = Protocol { crashes: 1, ..Protocol::default() };
    breaks(Mutation::AnsweredBeforeFlush, property::HOLDERS_HOLD, protocol);
}

/// As behind a pooler that hides the restart.
#[test]
fn a_flush_that_does_not_notice_a_crash() {
    let protocol = Protocol { crashes: 1, ..Protocol::default() };
    breaks(Mutation::FlushAfterCrash, property::HOLDERS_HOLD, protocol);
}
