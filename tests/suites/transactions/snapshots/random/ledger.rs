//! What the actors of a world were told, and whether the database agrees.

use std::cell::RefCell;
use std::fmt;

use lock_tests::TestDatabase;

use super::world::{Name, World};

/// What one transaction has done, which counts when it is committed.
#[derive(Debug, Default)]
pub struct Work {
    /// The counter, and what it was before.
    pub increments: Vec<(i64, i64)>,
    /// The rounds in which it ordered.
    pub orders: Vec<i64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    /// The counter is not what was committed.
    LostUpdate(String),
    /// A second order in a round, by a transaction that saw none.
    SecondOrder(String),
    /// A holder reads something else than what is committed.
    OldData(String),
    /// A transaction without an old snapshot was refused because of one.
    RefusedWithoutReason(String),
    /// An answer that is neither the lock, nor that it is taken, nor a refusal.
    Unexpected(String),
}

#[derive(Debug, Default, Clone)]
pub struct Tally {
    pub worlds: u64,
    pub committed_in_transactions: u64,
    pub refused_in_transactions: u64,
    /// How often one found a lock taken.
    pub taken_in_transactions: u64,
    pub committed_by_holders: u64,
    pub late_commits: u64,
    pub late_refusals: u64,
}

#[derive(Debug, Default)]
pub struct Ledger {
    committed: RefCell<Work>,
    pub violations: RefCell<Vec<Violation>>,
    pub tally: RefCell<Tally>,
}

impl Ledger {
    /// The transaction was committed, as its actor was told.
    pub fn acknowledge(&self, work: Work) {
        let mut committed = self.committed.borrow_mut();
        committed.increments.extend(work.increments);
        committed.orders.extend(work.orders);
    }

    pub fn violation(&self, violation: Violation) {
        self.violations.borrow_mut().push(violation);
    }

    pub fn count(&self, what: impl FnOnce(&mut Tally)) {
        what(&mut self.tally.borrow_mut());
    }

    /// Compares what was acknowledged with what is there.
    pub async fn check<T: TestDatabase>(&self, database: &T, world: &World) {
        for name in &world.names {
            self.check_counter(database, name).await;
            for round in name.rounds() {
                self.check_round(database, round).await;
            }
        }
    }

    async fn check_counter<T: TestDatabase>(&self, database: &T, name: &Name) {
        let n = database.number(&format!("SELECT n FROM counters WHERE id = {}", name.counter)).await;
        let mut before: Vec<i64> = {
            let committed = self.committed.borrow();
            let increments = committed.increments.iter().filter(|(counter, _)| *counter == name.counter);
            increments.map(|(_, before)| *before).collect()
        };
        before.sort_unstable();
        // Each saw what the one before it had left.
        let is_a_chain = before.iter().zip(0..).all(|(before, expected)| *before == expected);
        if !is_a_chain || i64::try_from(before.len()).unwrap() != n {
            let lost = format!("counter of {}: {n}, committed on top of {before:?}", name.text);
            self.violation(Violation::LostUpdate(lost));
        }
    }

    async fn check_round<T: TestDatabase>(&self, database: &T, round: i64) {
        let orders = database.number(&format!("SELECT COUNT(*) FROM orders WHERE round = {round}")).await;
        let committed = self.committed.borrow().orders.iter().filter(|other| **other == round).count();
        if orders > 1 || i64::try_from(committed).unwrap() != orders {
            let second = format!("round {round}: {orders} orders, {committed} were committed");
            self.violation(Violation::SecondOrder(second));
        }
    }
}

impl Tally {
    pub fn add(&mut self, other: &Self) {
        self.worlds += other.worlds;
        self.committed_in_transactions += other.committed_in_transactions;
        self.refused_in_transactions += other.refused_in_transactions;
        self.taken_in_transactions += other.taken_in_transactions;
        self.committed_by_holders += other.committed_by_holders;
        self.late_commits += other.late_commits;
        self.late_refusals += other.late_refusals;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} worlds; transactions that take locks: {} committed, {} refused, {} found one taken; transactions of \
             holders: {} committed; late ones: {} committed, {} refused",
            self.worlds,
            self.committed_in_transactions,
            self.refused_in_transactions,
            self.taken_in_transactions,
            self.committed_by_holders,
            self.late_commits,
            self.late_refusals,
        )
    }
}
