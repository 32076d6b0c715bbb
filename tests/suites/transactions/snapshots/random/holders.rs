//! The actors of a world that hold locks for longer than a transaction, or in transactions that lock-db begins.

use std::fmt::Display;
use std::time::Duration;

use lock_db::{Error, GuardedTransaction, Kind, Lease, RowGuard};
use lock_tests::{Backend, TestDatabase};
use sqlx::Transaction;

use super::ledger::Work;
use super::schedule::Actor;
use super::work::random_wait;
use super::world::{Member, Name, Stage};
use crate::snapshots::level::{begin, set_level_of_session};

/// So long that no lease expires or is renewed.
const LONG: Duration = Duration::from_mins(10);

/// How a holder of a lease writes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Guarded,
    Verified,
    /// Only while the lease can't be lost.
    Plain,
}

/// An open transaction of a holder of a lease.
enum Open<DB: Backend> {
    Guarded(GuardedTransaction<DB>),
    Verified(Transaction<'static, DB>),
    Plain(Transaction<'static, DB>),
}

impl<DB: Backend> Open<DB> {
    fn connection(&mut self) -> &mut DB::Connection {
        match self {
            Self::Guarded(transaction) => transaction,
            Self::Verified(transaction) | Self::Plain(transaction) => transaction,
        }
    }

    async fn roll_back(self) {
        match self {
            Self::Guarded(transaction) => drop(transaction.rollback().await),
            Self::Verified(transaction) | Self::Plain(transaction) => drop(transaction.rollback().await),
        }
    }

    async fn commit(self, actor: &mut Actor<'_>, lease: &Lease<DB>) -> Result<(), String> {
        match self {
            Self::Guarded(transaction) => {
                actor.step("commits").await;
                transaction.commit().await.map_err(|error| error.to_string())
            }
            Self::Verified(mut transaction) => {
                actor.step("verifies").await;
                if let Err(error) = lease.verify_in(&mut transaction).await {
                    drop(transaction.rollback().await);
                    return Err(error.to_string());
                }
                actor.step("commits").await;
                transaction.commit().await.map_err(|error| error.to_string())
            }
            Self::Plain(transaction) => {
                actor.step("commits").await;
                transaction.commit().await.map_err(|error| error.to_string())
            }
        }
    }
}

impl<T: TestDatabase> Stage<'_, T> {
    pub async fn holders(&self, mut actor: Actor<'_>, member: &Member<T::Database>) {
        let level = actor.random.pick(&self.world.levels);
        let mut connection = member.pool.acquire().await.unwrap();
        set_level_of_session::<T::Database>(&mut connection, level).await.unwrap();
        drop(connection);
        for _ in 0..=actor.random.below(3) {
            let name = &self.world.names[actor.random.below(self.world.names.len())];
            if name.kind == Kind::Row {
                self.hold_row_lock(&mut actor, member, name).await;
            } else {
                self.hold_lease(&mut actor, member, name).await;
            }
        }
        actor.done();
    }

    // -------------------------------------------------------------------------------------------------------- row locks

    async fn hold_row_lock(&self, actor: &mut Actor<'_>, member: &Member<T::Database>, name: &Name) {
        let lock = member.locks.row_lock(&name.text).wait(random_wait(actor));
        let taken = if actor.one_in(3) {
            actor.step(format!("tries {}", name.text)).await;
            lock.try_acquire().await
        } else {
            actor.step(format!("asks for {}", name.text)).await;
            lock.acquire().await.map(Some)
        };
        let Some(mut guard) = self.granted(actor, taken) else { return };
        let mut work = Work::default();
        let worked = self.work(actor, &mut guard, name, false, &mut work).await;
        match (worked, actor.random.below(6)) {
            (Err(error), _) => {
                actor.note(format!("… {error}"));
                drop(guard.rollback().await);
            }
            (Ok(()), 0) => {
                actor.step("rolls back").await;
                drop(guard.rollback().await);
            }
            (Ok(()), 1) => {
                actor.step("drops its guard").await;
                drop::<RowGuard<T::Database>>(guard);
            }
            (Ok(()), _) => {
                actor.step("commits").await;
                self.note_commit(actor, guard.commit().await, work);
            }
        }
    }

    // ----------------------------------------------------------------------------------------------------------- leases

    async fn hold_lease(&self, actor: &mut Actor<'_>, member: &Member<T::Database>, name: &Name) {
        let at_least = Duration::from_millis(actor.random.pick(&[0, 0, 0, 30]));
        let lock = member.locks.insert_lock(&name.text).ttl(LONG).at_least(at_least).wait(random_wait(actor));
        let taken = if actor.one_in(3) {
            actor.step(format!("tries {}", name.text)).await;
            lock.try_acquire().await
        } else {
            actor.step(format!("asks for {}", name.text)).await;
            lock.acquire().await.map(Some)
        };
        let Some(lease) = self.granted(actor, taken) else { return };
        if self.world.has_late_holders && !actor.one_in(3) {
            return self.be_late(actor, member, lease, name).await;
        }
        for _ in 0..actor.random.below(3) {
            let way = actor.random.pick(&[Way::Guarded, Way::Verified, Way::Plain]);
            let Some(open) = self.begin(actor, member, &lease, way).await else { return };
            if let Some((open, work)) = self.work_in(actor, open, name, false).await {
                let committed = open.commit(actor, &lease).await;
                self.note_commit(actor, committed, work);
            }
        }
        self.give_up(actor, member, lease, name).await;
    }

    async fn give_up(
        &self,
        actor: &mut Actor<'_>,
        member: &Member<T::Database>,
        lease: Lease<T::Database>,
        name: &Name,
    ) {
        match actor.random.below(5) {
            0 => {
                actor.step("drops its lease").await;
                drop(lease);
            }
            1 => self.commit_and_release(actor, member, lease, name).await,
            2 => self.release_in(actor, member, lease, name).await,
            _ => {
                actor.step("releases").await;
                if let Err(error) = lease.release().await {
                    self.unexpected(actor, "releases", &error);
                }
            }
        }
    }

    async fn commit_and_release(
        &self,
        actor: &mut Actor<'_>,
        member: &Member<T::Database>,
        lease: Lease<T::Database>,
        name: &Name,
    ) {
        let Some(open) = self.begin(actor, member, &lease, Way::Guarded).await else { return };
        if let Some((Open::Guarded(transaction), work)) = self.work_in(actor, open, name, false).await {
            actor.step("commits and releases").await;
            self.note_commit(actor, lease.commit_and_release(transaction).await, work);
        }
    }

    async fn release_in(
        &self,
        actor: &mut Actor<'_>,
        member: &Member<T::Database>,
        lease: Lease<T::Database>,
        name: &Name,
    ) {
        let way = actor.random.pick(&[Way::Guarded, Way::Plain]);
        let Some(open) = self.begin(actor, member, &lease, way).await else { return };
        let Some((mut open, work)) = self.work_in(actor, open, name, false).await else { return };
        actor.step("releases in its transaction").await;
        match lease.release_in(open.connection()).await {
            Ok(()) if !actor.one_in(4) => {
                let committed = open.commit(actor, &lease).await;
                self.note_commit(actor, committed, work);
            }
            released => {
                actor.step(format!("rolls back after {released:?}")).await;
                open.roll_back().await;
            }
        }
        actor.step("drops its lease").await;
        drop(lease);
    }

    /// The lease expires, as if its holder had been paused, and the holder tries to commit all the same.
    async fn be_late(
        &self,
        actor: &mut Actor<'_>,
        member: &Member<T::Database>,
        lease: Lease<T::Database>,
        name: &Name,
    ) {
        let way = actor.random.pick(&[Way::Guarded, Way::Verified]);
        // On SQLite a guarded transaction is the only writer, so the row can't be changed after it has begun.
        let expires_first = T::NAME == "sqlite" || actor.one_in(3);
        if expires_first {
            self.expire(actor, &lease).await;
        }
        let Some(open) = self.begin(actor, member, &lease, way).await else { return };
        let worked = self.work_in(actor, open, name, true).await;
        if !expires_first {
            self.expire(actor, &lease).await;
        }
        if let Some((open, work)) = worked {
            let committed = open.commit(actor, &lease).await;
            let is_committed = self.note_commit(actor, committed, work);
            self.ledger.count(
                |tally| {
                    if is_committed { tally.late_commits += 1 } else { tally.late_refusals += 1 }
                },
            );
        }
        if actor.one_in(3) {
            actor.step("drops its lease").await;
            drop(lease);
        } else {
            actor.note("never releases its lease");
            self.kept.borrow_mut().push(lease);
        }
    }

    async fn expire(&self, actor: &mut Actor<'_>, lease: &Lease<T::Database>) {
        actor.step("is paused until its lease has expired").await;
        let (name, secret) = (lease.name(), lease.secret_key());
        let past = format!(
            "UPDATE distributed_lock SET expire_time = '2001-01-01 00:00:00'
            WHERE lock_name = '{name}' AND secret_key = '{secret}'"
        );
        assert_eq!(self.database.run(&past).await, 1);
    }

    // ------------------------------------------------------------------------------------------------------------ steps

    async fn begin(
        &self,
        actor: &mut Actor<'_>,
        member: &Member<T::Database>,
        lease: &Lease<T::Database>,
        way: Way,
    ) -> Option<Open<T::Database>> {
        if way == Way::Guarded {
            actor.step("begins a guarded transaction").await;
            let begun = lease.begin().await.map_err(|error| self.unexpected(actor, "begins", &error));
            return begun.ok().map(Open::Guarded);
        }
        let level = actor.random.pick(&self.world.levels);
        actor.step(format!("begins a transaction of its own at {level}")).await;
        let transaction = begin(&member.pool, level).await.unwrap();
        Some(if way == Way::Verified { Open::Verified(transaction) } else { Open::Plain(transaction) })
    }

    /// `None`: a statement failed, and the transaction was rolled back.
    async fn work_in(
        &self,
        actor: &mut Actor<'_>,
        mut open: Open<T::Database>,
        name: &Name,
        may_be_late: bool,
    ) -> Option<(Open<T::Database>, Work)> {
        let mut work = Work::default();
        match self.work(actor, open.connection(), name, may_be_late, &mut work).await {
            Ok(()) => Some((open, work)),
            Err(error) => {
                actor.note(format!("… {error}"));
                open.roll_back().await;
                None
            }
        }
    }

    fn granted<H>(&self, actor: &Actor<'_>, taken: Result<Option<H>, Error>) -> Option<H> {
        match taken {
            Ok(Some(held)) => {
                actor.note("… has it");
                return Some(held);
            }
            Ok(None) | Err(Error::Timeout { .. }) => actor.note("… is taken"),
            // Perhaps: it may be any writer.
            Err(error @ (Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. }))
                if T::NAME == "sqlite" && error.is_retryable() =>
            {
                actor.note("… can't be had");
            }
            // Its transaction was the victim of others that it met on the way.
            Err(error @ (Error::Deadlock { .. } | Error::Serialization { .. })) => {
                actor.note(format!("… {error:?}"));
            }
            Err(error) => self.unexpected(actor, "asks for a lock", &error),
        }
        None
    }

    /// Whether it was committed.
    fn note_commit<E: Display>(&self, actor: &Actor<'_>, committed: Result<(), E>, work: Work) -> bool {
        match committed {
            Ok(()) => {
                self.ledger.acknowledge(work);
                self.ledger.count(|tally| tally.committed_by_holders += 1);
                true
            }
            Err(error) => {
                actor.note(format!("… {error}"));
                false
            }
        }
    }
}
