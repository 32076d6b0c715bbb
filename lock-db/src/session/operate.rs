//! What operators ask: lists of locks, who holds them, and the end of a lease by force.

use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::actor::Actor;
use super::connection::Worker;
use super::retry::{PAUSE, patiently, twice};
use crate::database::{Failure, Fault, ListPage, LockRow};
use crate::error::{Action, Loss};
use crate::name::Name;
use crate::{Error, Kind, LockInfo, RowHolder};

/// How long a forced release waits for a row that another transaction has locked.
const PATIENCE: Duration = Duration::from_secs(1);

impl Actor {
    /// The lock of a name, and who holds it.
    pub(super) async fn info(&self, name: &Name) -> Result<Option<LockInfo>, Error> {
        let read = async |worker: &Worker| worker.read(name).await;
        let failed = |failure: Failure| failure.into_error(Action::ReadRow, Some(name));
        let Some(row) = self.on_second(read).await.map_err(failed)? else { return Ok(None) };
        // A lease may also be kept by a transaction (`acquire_in`).
        let may_be_locked = row.kind == Kind::Row || row.is_free();
        let ids = may_be_locked.then_some(row.id).into_iter().collect();
        let holders = self.row_holders(ids).await.map_err(failed)?;
        Ok(Some(self.describe(name, row, &holders)))
    }

    /// A page of locks, without the prefix of this `Locks`, which has `prefix` bytes. Also returns the
    /// last name that was looked at, if there may be more.
    pub(super) async fn list(
        &self,
        page: &ListPage,
        prefix: usize,
    ) -> Result<(Vec<LockInfo>, Option<String>), Error> {
        let failed = |failure: Failure| failure.into_error(Action::List, None);
        let read = async |worker: &Worker| worker.list(page.clone()).await;
        let (rows, end) = self.on_second(read).await.map_err(failed)?;
        let row_locks = rows.iter().filter(|(_, row)| row.kind == Kind::Row);
        let ids = row_locks.map(|(_, row)| row.id).collect();
        let holders = self.row_holders(ids).await.map_err(failed)?;
        let describe = |(name, row)| self.describe(&Name::found(name, prefix), row, &holders);
        Ok((rows.into_iter().map(describe).collect(), end))
    }

    async fn row_holders(&self, ids: Vec<i64>) -> Result<HashMap<i64, RowHolder>, Failure> {
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        self.on_second(async |worker: &Worker| worker.row_holders(ids.clone()).await).await
    }

    /// Uses the renewal connection, so that no acquire waits. If that one can't be had, the other one; not
    /// if the server is silent, or a hook of the application is in the way.
    async fn on_second<T>(
        &self,
        operation: impl AsyncFn(&Worker) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        patiently(async || match twice(async || operation(&self.renewals).await).await {
            Err(failure)
                if failure.fault == Fault::Disconnected && !failure.is_silence() && !failure.is_hook() =>
            {
                twice(async || operation(&self.worker).await).await
            }
            answer => answer,
        })
        .await
    }

    fn describe(&self, name: &Name, row: LockRow, holders: &HashMap<i64, RowHolder>) -> LockInfo {
        let is_here =
            self.leases.borrow().values().any(|held| row.is_of(&held.state.key.secret, row.fencing_token));
        let (id, now) = (row.id, row.time());
        let mut info = row.into_info(name);
        info.is_here = is_here;
        let holder = holders.get(&id).cloned();
        info.row_holder = match holder {
            None if info.kind == Kind::Row => Some(RowHolder::Unlocked),
            // Nothing says that a transaction has a free lease.
            Some(RowHolder::Unknown(_)) if info.kind != Kind::Row => None,
            holder => holder,
        };
        if let Some(RowHolder::Session(session)) = &info.row_holder {
            info.held_for = session.since.and_then(|since| (now - since).to_std().ok());
        }
        info
    }

    /// Ends a lease if its grant has this number. `false`: it is not the present one.
    pub(super) async fn force_release(
        self: &Rc<Self>,
        name: &Name,
        fencing_token: i64,
    ) -> Result<bool, Error> {
        let failed = |failure: Failure| failure.into_error(Action::ForceRelease, Some(name));
        let started = Instant::now();
        let mut tried: Option<LockRow> = None;
        loop {
            let row = patiently(async || self.worker.read(name).await).await.map_err(failed)?;
            let Some(row) = row else { return Ok(false) };
            let was_forced = |before: &mut LockRow| {
                let by_force = before.fencing_token.saturating_add(1);
                row.is_just_forced(before.fencing_token) || row.previous_token == by_force
            };
            if let Some(before) = tried.take_if(was_forced) {
                // The answer was lost.
                self.after_a_forced_release(name, &before);
                return Ok(true);
            }
            if row.kind != Kind::Insert {
                return Err(Error::WrongKind { name: name.given(), wanted: Kind::Insert, found: row.kind });
            }
            if !row.is_grant(fencing_token) {
                return Ok(false);
            }
            match twice(async || self.worker.force_release(name, row.clone()).await).await {
                Ok(true) => {
                    self.after_a_forced_release(name, &row);
                    return Ok(true);
                }
                Ok(false) => {}
                Err(failure) if failure.is_busy() => {}
                Err(failure) => return Err(failed(failure)),
            }
            tried = Some(row);
            if started.elapsed() > PATIENCE {
                let reason = "a transaction that its holder has verified, or another one, has its row locked: end that \
                              transaction, or wait for its end";
                return Err(Error::other(Action::ForceRelease, Some(name.given()), true, reason));
            }
            sleep(PAUSE).await;
        }
    }

    fn after_a_forced_release(self: &Rc<Self>, name: &Name, row: &LockRow) {
        let by = self.queues.owner();
        tracing::warn!(
            lock.name = %name, lock.fencing_token = row.fencing_token, owner = row.owner, by = &*by,
            "lock released by force: its holder is told, and can't commit under it"
        );
        let ours = self.leases.borrow().iter().find_map(|(number, held)| {
            row.is_of(&held.state.key.secret, held.state.key.fencing_token).then_some(*number)
        });
        if let Some(number) = ours {
            self.lose(number, Loss::ForceReleased);
        }
        if let Some(notification) = row.first_waiter() {
            self.worker.notify(notification);
        }
    }

    /// Whether another process is in the queue of a lease.
    pub(super) async fn is_wanted(&self, name: &Name) -> Result<bool, Error> {
        let row = patiently(async || self.worker.read(name).await).await;
        let row = row.map_err(|failure| failure.into_error(Action::ReadRow, Some(name)))?;
        Ok(row.is_some_and(|row| row.others_wait(self.queues.queue_secret())))
    }
}
