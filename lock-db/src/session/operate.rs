//! What operators ask: lists of locks, who holds them, and the end of a lease by force.

use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::actor::Actor;
use super::connection::Worker;
use super::retry::{PAUSE, patiently};
use crate::database::{Failure, ListPage, LockRow};
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
        let Some(row) = self.on_either(true, read).await.map_err(failed)? else { return Ok(None) };
        let holders = self.row_holders(std::iter::once(&row)).await.map_err(failed)?;
        Ok(Some(self.describe(name, row, &holders)))
    }

    /// A page of locks, without the prefix of this `Locks`, which has `prefix` bytes.
    pub(super) async fn list(&self, page: &ListPage, prefix: usize) -> Result<Vec<LockInfo>, Error> {
        let failed = |failure: Failure| failure.into_error(Action::List, None);
        let read = async |worker: &Worker| worker.list(page.clone()).await;
        let rows = self.on_either(true, read).await.map_err(failed)?;
        let holders = self.row_holders(rows.iter().map(|(_, row)| row)).await.map_err(failed)?;
        let describe = |(name, row)| self.describe(&Name::found(name, prefix), row, &holders);
        Ok(rows.into_iter().map(describe).collect())
    }

    async fn row_holders<'a>(
        &self,
        rows: impl Iterator<Item = &'a LockRow>,
    ) -> Result<HashMap<i64, RowHolder>, Failure> {
        let ids: Vec<i64> = rows.filter(|row| row.kind == Kind::Row).map(|row| row.id).collect();
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        self.on_either(true, async |worker: &Worker| worker.row_holders(ids.clone()).await).await
    }

    fn describe(&self, name: &Name, row: LockRow, holders: &HashMap<i64, RowHolder>) -> LockInfo {
        let is_here =
            self.leases.borrow().values().any(|held| row.is_of(&held.state.key.secret, row.fencing_token));
        let (id, now) = (row.id, row.time());
        let mut info = row.into_info(name);
        info.is_here = is_here;
        if info.kind == Kind::Row {
            let holder = holders.get(&id).cloned().unwrap_or(RowHolder::Nobody);
            if let RowHolder::Session(session) = &holder {
                info.held_for = session.since.and_then(|since| (now - since).to_std().ok());
            }
            info.row_holder = Some(holder);
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
        loop {
            let row = patiently(async || self.worker.read(name).await).await.map_err(failed)?;
            let Some(row) = row else { return Ok(false) };
            if row.kind == Kind::Row {
                return Err(Error::WrongKind { name: name.given(), wanted: Kind::Insert, found: row.kind });
            }
            if !row.is_grant(fencing_token) {
                return Ok(false);
            }
            if patiently(async || self.worker.force_release(name, row.clone()).await).await.map_err(failed)? {
                self.after_a_forced_release(name, &row);
                return Ok(true);
            }
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
