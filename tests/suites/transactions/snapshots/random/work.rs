//! What the actors of a world do under a lock: they increment its counter, and order in a round that has no order yet.

use std::time::Duration;

use lock_tests::{Backend, TestDatabase};

use super::ledger::{Violation, Work};
use super::schedule::Actor;
use super::world::{Name, Stage};

/// How long a request may wait, in milliseconds.
const WAITS: [u64; 3] = [10, 40, 120];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Task {
    Look,
    Increment,
    Order,
    IncrementAndOrder,
}

/// How long a request may wait.
pub fn random_wait(actor: &mut Actor<'_>) -> Duration {
    Duration::from_millis(actor.random.pick(&WAITS))
}

impl<T: TestDatabase> Stage<'_, T> {
    /// Reads and writes what the lock protects. What the actor reads must be current, unless it `may_be_late`.
    pub async fn work(
        &self,
        actor: &mut Actor<'_>,
        connection: &mut <T::Database as sqlx::Database>::Connection,
        name: &Name,
        may_be_late: bool,
        work: &mut Work,
    ) -> sqlx::Result<()> {
        let task = actor.random.pick(&[Task::Look, Task::Increment, Task::Order, Task::IncrementAndOrder]);
        let round = actor.random.pick(&name.rounds());
        let (mut n, mut orders) = (0, 0);
        if task != Task::Order {
            actor.step(format!("reads counter {}", name.counter)).await;
            let sql = format!("SELECT n FROM counters WHERE id = {}", name.counter);
            n = self.read_current(actor, connection, &sql, may_be_late).await?;
        }
        if task != Task::Increment {
            actor.step(format!("counts orders of round {round}")).await;
            let sql = format!("SELECT COUNT(*) FROM orders WHERE round = {round}");
            orders = self.read_current(actor, connection, &sql, may_be_late).await?;
        }
        if matches!(task, Task::Increment | Task::IncrementAndOrder) {
            actor.step(format!("writes {} to counter {}", n + 1, name.counter)).await;
            let sql = format!("UPDATE counters SET n = {} WHERE id = {}", n + 1, name.counter);
            T::Database::run(connection, &sql).await?;
            work.increments.push((name.counter, n));
        }
        if matches!(task, Task::Order | Task::IncrementAndOrder) && orders == 0 {
            actor.step(format!("orders in round {round}")).await;
            let sql = format!("INSERT INTO orders VALUES ({round}, {})", self.next_customer());
            T::Database::run(connection, &sql).await?;
            work.orders.push(round);
        }
        Ok(())
    }

    async fn read_current(
        &self,
        actor: &Actor<'_>,
        connection: &mut <T::Database as sqlx::Database>::Connection,
        sql: &str,
        may_be_late: bool,
    ) -> sqlx::Result<i64> {
        let read = T::Database::find_number(connection, sql).await?;
        let committed = self.committed(sql).await;
        actor.note(format!("… {read:?}"));
        if read != committed && !may_be_late {
            let old = format!("{}: {sql}: {read:?}, committed is {committed:?}", actor.name);
            self.ledger.violation(Violation::OldData(old));
        }
        read.ok_or(sqlx::Error::RowNotFound)
    }

    /// An answer that must not be.
    pub fn unexpected(&self, actor: &Actor<'_>, what: &str, error: &impl std::fmt::Debug) {
        let unexpected = format!("{}: {what}: {error:?}", actor.name);
        self.ledger.violation(Violation::Unexpected(unexpected));
    }
}
