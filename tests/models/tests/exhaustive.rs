//! Every state that the protocol can reach within the bounds of each test.

use std::time::Instant;

use lock_models::{Protocol, State};
use stateright::{Checker, Model};

/// Searches everything. Clients are alike, so states that differ in who is who count once.
#[track_caller]
fn holds(protocol: Protocol) {
    let started = Instant::now();
    let search =
        protocol.clone().checker().threads(2).symmetry_fn(State::with_clients_in_order).spawn_dfs().join();
    let (states, ways, longest) = (search.unique_state_count(), search.state_count(), search.max_depth());
    println!(
        "{states} states, reached in {ways} ways of up to {longest} steps, in {:.1?}: {protocol:?}",
        started.elapsed()
    );
    search.assert_properties();
}

fn three_clients() -> Protocol {
    Protocol { clients: 3, ..Protocol::default() }
}

#[test]
fn three_clients_with_a_transaction_each() {
    holds(Protocol { transactions: 1, losses: 1, ..three_clients() });
}

#[test]
fn three_clients_that_release_with_their_commits() {
    holds(Protocol { transactions: 1, releases_in: true, ..three_clients() });
}

#[test]
fn three_clients_and_a_request_that_arrives_late() {
    holds(Protocol { losses: 1, late: 1, ..three_clients() });
}

#[test]
fn two_clients_that_come_back_and_a_request_that_arrives_late() {
    holds(Protocol { acquisitions: 2, transactions: 1, losses: 1, late: 1, ..Protocol::default() });
}

#[test]
fn two_clients_that_release_with_their_commits_and_a_request_that_arrives_late() {
    holds(Protocol { transactions: 1, releases_in: true, losses: 1, late: 1, ..Protocol::default() });
}

/// Of no use to a holder, but no reason to commit what was overtaken.
#[test]
fn a_row_that_is_cleaned_away_while_it_is_held() {
    holds(Protocol {
        acquisitions: 2,
        transactions: 1,
        cleanings: 1,
        cleans_held_rows: true,
        ..Protocol::default()
    });
}

#[test]
fn a_row_that_is_cleaned_away_while_it_is_free() {
    holds(Protocol { acquisitions: 2, transactions: 1, cleanings: 1, ..Protocol::default() });
}

#[test]
fn clocks_of_clients_that_are_late() {
    holds(Protocol {
        transactions: 1,
        releases_in: true,
        late_clocks: true,
        ttl: 3,
        reliable: 2,
        ..Protocol::default()
    });
}

#[test]
fn a_clock_of_the_database_that_was_set_back() {
    holds(Protocol { acquisitions: 2, transactions: 1, clock_stands_still: true, ..Protocol::default() });
}

#[test]
fn a_lease_from_hand_to_hand_and_a_commit_without_an_answer() {
    holds(Protocol { transactions: 2, hands: 3, losses: 1, ..Protocol::default() });
}

#[test]
fn a_lease_from_hand_to_hand_between_three_clients() {
    holds(Protocol { transactions: 1, hands: 2, ..three_clients() });
}

/// It can't be renewed meanwhile.
#[test]
fn a_row_that_others_lock() {
    holds(Protocol { foreign_locks: 2, transactions: 1, losses: 1, ..Protocol::default() });
}

#[test]
fn a_row_that_others_lock_and_clocks_that_are_late() {
    holds(Protocol {
        foreign_locks: 2,
        late_clocks: true,
        ttl: 3,
        reliable: 2,
        notice: 2,
        reliable_notice: 1,
        ..Protocol::default()
    });
}

#[test]
fn a_row_that_others_lock_between_three_clients() {
    holds(Protocol { foreign_locks: 1, ..three_clients() });
}

#[test]
fn snapshots_and_guarded_commits_without_an_answer() {
    holds(Protocol { snapshots: 1, transactions: 1, losses: 1, ..Protocol::default() });
}

#[test]
fn snapshots_and_releases_with_commits() {
    holds(Protocol { snapshots: 1, transactions: 1, releases_in: true, ..Protocol::default() });
}

#[test]
fn snapshots_and_holders_that_come_back() {
    holds(Protocol { snapshots: 2, acquisitions: 2, ..Protocol::default() });
}

/// A grant is committed before it is on disk.
#[test]
fn a_server_that_is_killed() {
    holds(Protocol { crashes: 2, acquisitions: 2, ..Protocol::default() });
    holds(Protocol { crashes: 1, transactions: 1, releases_in: true, ..Protocol::default() });
}

#[test]
fn a_server_that_is_killed_and_answers_that_are_lost() {
    holds(Protocol { crashes: 1, transactions: 1, losses: 1, ..Protocol::default() });
}
