//! The actors of a world that take locks in their transactions.

use lock_db::{Error, HeldInTransaction, Kind};
use lock_tests::{Backend, TestDatabase};
use sqlx::Transaction;

use super::ledger::{Violation, Work};
use super::schedule::Actor;
use super::work::random_wait;
use super::world::{Lock, Member, Name, Stage};
use crate::snapshots::level::{Level, begin};

/// Why a transaction ends without a commit.
enum Stop {
    /// Others have the lock.
    Taken,
    /// The transaction is too old for the lock, or the victim of a deadlock: it must not be able to commit.
    Refused,
    /// One of its own statements failed.
    Failed,
}

impl<T: TestDatabase> Stage<'_, T> {
    pub async fn transactions(&self, mut actor: Actor<'_>, member: &Member<T::Database>) {
        for _ in 0..=actor.random.below(3) {
            self.transaction(&mut actor, member).await;
        }
        actor.done();
    }

    async fn transaction(&self, actor: &mut Actor<'_>, member: &Member<T::Database>) {
        let level = actor.random.pick(&self.world.levels);
        actor.step(format!("begins at {level}")).await;
        let mut transaction = begin(&member.pool, level).await.unwrap();
        match self.in_transaction(actor, member, level, &mut transaction).await {
            Ok(work) if !actor.one_in(8) => {
                actor.step("commits").await;
                match transaction.commit().await {
                    Ok(()) => {
                        self.ledger.acknowledge(work);
                        self.ledger.count(|tally| tally.committed_in_transactions += 1);
                    }
                    Err(error) => actor.note(format!("… {error}")),
                }
            }
            Err(Stop::Refused) if T::NAME != "sqlite" && actor.one_in(2) => {
                self.swallow_refusal(actor, transaction).await;
            }
            _ => {
                actor.step("rolls back").await;
                drop(transaction.rollback().await);
            }
        }
    }

    async fn in_transaction(
        &self,
        actor: &mut Actor<'_>,
        member: &Member<T::Database>,
        level: Level,
        transaction: &mut Transaction<'static, T::Database>,
    ) -> Result<Work, Stop> {
        for _ in 0..actor.random.pick(&[0, 1, 1, 2]) {
            self.read_something(actor, transaction).await?;
        }
        let mut work = Work::default();
        for names in self.choose_names(actor) {
            match self.take(actor, member, level, &names, transaction).await {
                Ok(()) => {}
                // What it did under the locks before stands.
                Err(Stop::Taken) if !work.increments.is_empty() && actor.one_in(2) => return Ok(work),
                Err(stop) => return Err(stop),
            }
            for name in names {
                let worked = self.work(actor, transaction, name, false, &mut work).await;
                worked.map_err(|error| failed(actor, error))?;
            }
        }
        Ok(work)
    }

    /// One name, both together, or one after the other.
    fn choose_names(&self, actor: &mut Actor<'_>) -> Vec<Vec<&Name>> {
        let names = &self.world.names;
        let together = names.iter().all(|name| name.kind == names[0].kind);
        match actor.random.below(3) {
            0 => vec![vec![&names[actor.random.below(names.len())]]],
            1 if together => vec![names.iter().collect()],
            _ => names.iter().map(|name| vec![name]).collect(),
        }
    }

    async fn read_something(
        &self,
        actor: &mut Actor<'_>,
        transaction: &mut Transaction<'static, T::Database>,
    ) -> Result<(), Stop> {
        let name = &self.world.names[actor.random.below(self.world.names.len())];
        let sql = match actor.random.below(3) {
            0 => format!("SELECT n FROM counters WHERE id = {}", name.counter),
            1 => format!("SELECT COUNT(*) FROM orders WHERE round = {}", name.rounds()[0]),
            _ => "SELECT COUNT(*) FROM locks_by_hand".to_owned(),
        };
        actor.step(format!("reads without a lock: {sql}")).await;
        let read = T::Database::find_number(transaction, &sql).await;
        actor.note(format!("… {:?}", read.map_err(|error| failed(actor, error))?));
        Ok(())
    }

    async fn take(
        &self,
        actor: &mut Actor<'_>,
        member: &Member<T::Database>,
        level: Level,
        names: &[&Name],
        transaction: &mut Transaction<'static, T::Database>,
    ) -> Result<(), Stop> {
        if self.world.lock == Lock::ByHand {
            return take_by_hand::<T::Database>(actor, names, transaction).await;
        }
        for _ in 0..3 {
            match self.ask(actor, member, names, transaction).await {
                Ok(true) => {
                    actor.note("… has it");
                    return Ok(());
                }
                Ok(false) | Err(Error::Timeout { .. }) => {
                    actor.note("… is taken");
                    self.ledger.count(|tally| tally.taken_in_transactions += 1);
                }
                // Somebody else writes, and SQLite does not say whether under the lock; or a busy machine has not answered in time.
                Err(error @ (Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. }))
                    if error.is_retryable() =>
                {
                    actor.note(format!("… {error}"));
                    self.ledger.count(|tally| tally.taken_in_transactions += 1);
                }
                Err(error) => {
                    actor.note(format!("… {error:?}"));
                    self.check_refusal(actor, level, names[0].kind, &error);
                    return Err(Stop::Refused);
                }
            }
            if actor.one_in(3) {
                break;
            }
        }
        Err(Stop::Taken)
    }

    /// Whether it has them.
    async fn ask(
        &self,
        actor: &mut Actor<'_>,
        member: &Member<T::Database>,
        names: &[&Name],
        transaction: &mut Transaction<'static, T::Database>,
    ) -> Result<bool, Error> {
        let wait = random_wait(actor);
        let texts = names.iter().map(|name| name.text.as_str());
        let text = &names[0].text;
        let is_one = names.len() == 1;
        match (names[0].kind, actor.random.below(3)) {
            (Kind::Row, 0) => {
                actor.step(format!("tries {names:?}")).await;
                if is_one {
                    return Ok(member.locks.row_lock(text).try_acquire_in(transaction).await?.is_some());
                }
                Ok(member.locks.row_locks(texts).try_acquire_in(transaction).await?.is_some())
            }
            (Kind::Row, 1) if is_one => {
                actor.step(format!("asks for {text}")).await;
                has(member.locks.row_lock(text).wait(wait).acquire_in(transaction).await.map(|one| vec![one]))
            }
            (Kind::Row, _) => {
                actor.step(format!("asks for {names:?}")).await;
                has(member.locks.row_locks(texts).wait(wait).acquire_in(transaction).await)
            }
            (_, 0) if is_one => {
                actor.step(format!("tries {text}")).await;
                Ok(member.locks.insert_lock(text).try_acquire_in(transaction).await?.is_some())
            }
            (_, 1) if is_one => {
                actor.step(format!("asks for {text}")).await;
                has(member
                    .locks
                    .insert_lock(text)
                    .wait(wait)
                    .acquire_in(transaction)
                    .await
                    .map(|one| vec![one]))
            }
            _ => {
                actor.step(format!("asks for {names:?}")).await;
                has(member.locks.insert_locks(texts).wait(wait).acquire_in(transaction).await)
            }
        }
    }

    fn check_refusal(&self, actor: &Actor<'_>, level: Level, kind: Kind, error: &Error) {
        match error {
            Error::Deadlock { .. } => {}
            Error::Serialization { .. } => {
                self.ledger.count(|tally| tally.refused_in_transactions += 1);
                // On InnoDB also when a lease is granted between the look and the lock.
                let may_be_beaten = kind == Kind::Insert && T::NAME != "postgres";
                if level.has_a_snapshot_for_each_statement() && !may_be_beaten {
                    let refused = format!("{} at {level}: {error:?}", actor.name);
                    self.ledger.violation(Violation::RefusedWithoutReason(refused));
                }
            }
            _ => self.unexpected(actor, "asks for a lock", error),
        }
    }

    /// Goes on after a refusal, as code does that swallows the error. Nothing of it may be there in the end.
    async fn swallow_refusal(
        &self,
        actor: &mut Actor<'_>,
        mut transaction: Transaction<'static, T::Database>,
    ) {
        let name = &self.world.names[0];
        actor.step("writes after its refusal").await;
        let write = format!("UPDATE counters SET n = n + 100 WHERE id = {}", name.counter);
        let written = T::Database::run(&mut transaction, &write).await;
        let order = format!("INSERT INTO orders VALUES ({}, {})", name.rounds()[0], self.next_customer());
        let ordered = T::Database::run(&mut transaction, &order).await;
        actor.note(format!("… written: {}, ordered: {}", written.is_ok(), ordered.is_ok()));
        actor.step("commits after its refusal").await;
        actor.note(format!("… committed: {}", transaction.commit().await.is_ok()));
    }
}

fn failed(actor: &Actor<'_>, error: sqlx::Error) -> Stop {
    actor.note(format!("… {error}"));
    Stop::Failed
}

fn has(taken: Result<Vec<HeldInTransaction>, Error>) -> Result<bool, Error> {
    taken.map(|_| true)
}

async fn take_by_hand<DB: Backend>(
    actor: &mut Actor<'_>,
    names: &[&Name],
    transaction: &mut DB::Connection,
) -> Result<(), Stop> {
    for name in names {
        actor.step(format!("locks {} by hand", name.counter)).await;
        let lock = format!("SELECT id FROM locks_by_hand WHERE id = {} FOR UPDATE", name.counter);
        DB::find_number(transaction, &lock).await.map_err(|error| failed(actor, error))?;
        actor.note("… has it");
    }
    Ok(())
}
