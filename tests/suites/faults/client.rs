//! A client of a worker: takes a lock, works under it, gives it up in one way or another, and says what it does.

use std::sync::Arc;
use std::time::Duration;

use lock_db::Locks;
use lock_tests::{Backend, Random};
use sqlx::Pool;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::events::{Event, What};
use super::history::{Moment, Outcome, now};
use super::subject::{Subject, SubjectLease, outcome};
use super::worker::Contract;

/// Few, so that everybody wants the same.
pub(crate) const LEASES: [&str; 5] = ["lease-1", "lease-2", "lease-3", "lease-4", "lease-5"];
pub(crate) const ROW_LOCKS: [&str; 3] = ["row-1", "row-2", "row-3"];

pub(crate) struct Client<DB: Backend> {
    number: u64,
    random: Random,
    subject: Arc<Subject<DB>>,
    locks: Locks<DB>,
    pool: Pool<DB>,
    contract: Contract,
    written: i64,
}

impl<DB: Backend> Client<DB> {
    pub(crate) fn new(
        number: u64,
        random: Random,
        subject: Subject<DB>,
        locks: Locks<DB>,
        pool: Pool<DB>,
        contract: Contract,
    ) -> Self {
        Self { number, random, subject: Arc::new(subject), locks, pool, contract, written: 0 }
    }

    pub(crate) async fn work(mut self, stopped: watch::Receiver<bool>) {
        while !*stopped.borrow() {
            if self.contract.mistake.is_some() || self.random.below(10) < 7 {
                self.work_under_a_lease().await;
            } else if self.random.below(2) == 0 {
                self.work_under_a_row_lock().await;
            } else {
                self.work_in_a_transaction_of_its_own().await;
            }
            // Also where the database refuses at once.
            self.rest(1, 15).await;
        }
    }

    fn say(&self, what: What) {
        self.say_at(now(), what);
    }

    /// In one piece, and on its way before anything else is done.
    fn say_at(&self, at: Moment, what: What) {
        lock_tests::say_to_parent(Event { client: self.number, at, what });
    }

    async fn rest(&mut self, from: u64, to: u64) {
        sleep(self.random.millis(from, to)).await;
    }

    fn wait(&mut self) -> Duration {
        if self.random.below(4) == 0 { Duration::ZERO } else { self.random.millis(200, 2500) }
    }

    fn next_value(&mut self) -> i64 {
        self.written += 1;
        i64::try_from(self.number).unwrap() * 1_000_000 + self.written
    }

    // ----------------------------------------------------------------------------------------------- leases

    async fn work_under_a_lease(&mut self) {
        let (name, wait) = (self.random.pick(&LEASES), self.wait());
        // A caller that goes away in the middle of it.
        let patience = if self.random.below(10) == 0 { self.random.millis(1, 30) } else { Duration::MAX };
        self.say(What::Asks { name: name.to_owned() });
        let subject = Arc::clone(&self.subject);
        let Ok(Some(lease)) = timeout(patience, subject.acquire(name, self.contract.ttl, wait)).await else {
            return self.say(What::Denied);
        };
        self.say(What::Granted { token: Some(lease.token()) });
        let (mut was_told, mut in_doubt) = (self.look(&lease), false);
        for _ in 0..1 + self.random.below(4) {
            if was_told {
                break;
            }
            match self.random.below(4) {
                // Long enough for a renewal, now and then.
                0 => {
                    let rest =
                        if self.random.below(4) == 0 { self.contract.ttl } else { Duration::from_millis(20) };
                    if timeout(rest, lease.lost()).await.is_ok() {
                        self.say(What::Told);
                        was_told = true;
                    }
                }
                kind => {
                    if self.do_business(&lease, name, kind > 1).await == Some(Outcome::Unknown) {
                        // The commit may still arrive, and passes as long as the lease is the current one: under
                        // the same lease nobody knows whether what he reads next is from before it.
                        in_doubt = true;
                        break;
                    }
                }
            }
            was_told |= self.look(&lease);
        }
        // Whoever lost it tries all the same.
        if was_told && !in_doubt {
            self.do_business(&lease, name, true).await;
        }
        match self.random.below(4) {
            1 if !in_doubt => self.end_with_business(lease, name).await,
            0 => {
                self.say(What::Ends);
                drop(lease);
            }
            _ => {
                self.say(What::Ends);
                lease.release().await;
            }
        }
    }

    /// Whether it is lost.
    fn look(&self, lease: &SubjectLease<DB>) -> bool {
        let at = now();
        if lease.is_held() {
            self.say_at(at, What::Held);
            return false;
        }
        self.say(What::Told);
        true
    }

    /// `None`: it came to no commit.
    async fn do_business(&mut self, lease: &SubjectLease<DB>, name: &str, writes: bool) -> Option<Outcome> {
        let called = now();
        let mut transaction = lease.begin().await?;
        // What is not committed is rolled back by dropping it.
        let (previous, value) = self.change_register(&mut transaction, name, writes).await.ok()?;
        self.say(What::Commits { called, previous, value });
        let outcome = lease.commit(transaction).await;
        self.say_outcome(outcome);
        Some(outcome)
    }

    async fn end_with_business(&mut self, lease: SubjectLease<DB>, name: &str) {
        let called = now();
        let Some(mut transaction) = lease.begin().await else { return self.say(What::Ends) };
        let Ok((previous, value)) = self.change_register(&mut transaction, name, true).await else {
            return self.say(What::Ends);
        };
        self.say(What::Commits { called, previous, value });
        let outcome = lease.commit_and_release(transaction).await;
        self.say_outcome(outcome);
        self.say(What::Ends);
    }

    fn say_outcome(&self, outcome: Outcome) {
        self.say(match outcome {
            Outcome::Committed => What::Committed,
            Outcome::Refused => What::Refused,
            Outcome::Unknown => What::Unknown,
        });
    }

    /// Reads the register, and writes to it what nobody else writes. The note beside it says of every value which one it
    /// came after.
    async fn change_register(
        &mut self,
        connection: &mut DB::Connection,
        name: &str,
        writes: bool,
    ) -> sqlx::Result<(i64, Option<i64>)> {
        let read = format!("SELECT value FROM register WHERE name = '{name}'");
        let previous = DB::find_number(connection, &read).await?.expect("the register is there");
        if self.random.below(3) == 0 {
            self.rest(0, 10).await;
        }
        if !writes {
            return Ok((previous, None));
        }
        let value = self.next_value();
        let write = format!("UPDATE register SET value = {value} WHERE name = '{name}'");
        DB::run(connection, &write).await?;
        let note = format!("INSERT INTO kept (name, previous, value) VALUES ('{name}', {previous}, {value})");
        DB::run(connection, &note).await?;
        Ok((previous, Some(value)))
    }

    // -------------------------------------------------------------------------------------------- row locks

    async fn work_under_a_row_lock(&mut self) {
        let (name, wait) = (self.random.pick(&ROW_LOCKS), self.wait());
        let patience = if self.random.below(10) == 0 { self.random.millis(1, 30) } else { Duration::MAX };
        self.say(What::Asks { name: name.to_owned() });
        let request = self.locks.row_lock(name).wait(wait);
        let acquire = async {
            if wait.is_zero() {
                request.try_acquire().await.ok().flatten()
            } else {
                request.acquire().await.ok()
            }
        };
        let Ok(Some(mut guard)) = timeout(patience, acquire).await else {
            return self.say(What::Denied);
        };
        self.say(What::Granted { token: None });
        let called = now();
        let writes = self.random.below(3) > 0;
        if let Ok((previous, value)) = self.change_register(&mut guard, name, writes).await {
            self.rest(0, 20).await;
            let at = now();
            let read = format!("SELECT value FROM register WHERE name = '{name}'");
            if DB::find_number(&mut guard, &read).await.is_ok() {
                self.say_at(at, What::Held);
            }
            if self.random.below(5) > 0 {
                let at = now();
                self.say_at(at, What::Commits { called, previous, value });
                let outcome = outcome(guard.commit().await);
                if outcome == Outcome::Committed {
                    self.say_at(at, What::Held);
                }
                self.say_outcome(outcome);
            } else {
                drop(guard);
            }
        }
        self.say(What::Ends);
    }

    /// Whose commit ends the lock, without lock-db. Now and then it has a second lock, which it takes together with the first.
    async fn work_in_a_transaction_of_its_own(&mut self) {
        let (name, wait) = (self.random.pick(&ROW_LOCKS), self.wait());
        let other = self.random.pick(&ROW_LOCKS);
        let patience = if self.random.below(10) == 0 { self.random.millis(1, 30) } else { Duration::MAX };
        // What is not committed is rolled back by dropping it.
        let Ok(mut transaction) = self.pool.begin().await else { return };
        self.say(What::Asks { name: name.to_owned() });
        let locks = self.locks.clone();
        let acquire = async {
            match (name == other, wait.is_zero()) {
                (true, true) => locks
                    .row_lock(name)
                    .try_acquire_in(&mut transaction)
                    .await
                    .is_ok_and(|held| held.is_some()),
                (true, false) => locks.row_lock(name).wait(wait).acquire_in(&mut transaction).await.is_ok(),
                (false, _) => {
                    locks.row_locks([name, other]).wait(wait).acquire_in(&mut transaction).await.is_ok()
                }
            }
        };
        if timeout(patience, acquire).await != Ok(true) {
            return self.say(What::Denied);
        }
        self.say(What::Granted { token: None });
        let called = now();
        let writes = self.random.below(3) > 0;
        if let Ok((previous, value)) = self.change_register(&mut transaction, name, writes).await {
            self.rest(0, 20).await;
            let at = now();
            let read = format!("SELECT value FROM register WHERE name = '{name}'");
            let goes_on = DB::find_number(&mut transaction, &read).await.is_ok();
            if goes_on {
                self.say_at(at, What::Held);
            }
            if goes_on && self.random.below(5) > 0 {
                let at = now();
                self.say_at(at, What::Commits { called, previous, value });
                let outcome = transaction.commit().await.map_or(Outcome::Unknown, |()| Outcome::Committed);
                if outcome == Outcome::Committed {
                    self.say_at(at, What::Held);
                }
                self.say_outcome(outcome);
            }
        }
        self.say(What::Ends);
    }
}
