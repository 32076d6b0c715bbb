//! What transactions and the `Locks` itself ask of the session about the table and its rows.

use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::task::spawn_local;
use tokio::time::sleep;

use super::actor::Actor;
use super::retry::{PAUSE, patiently, twice};
use crate::database::{Failure, LeaseKey, LockRow, PruneScope, Server};
use crate::error::Action;
use crate::name::Name;
use crate::options::LONGEST;
use crate::{CheckReport, Error, Kind};

/// How long the session tries to mark a row. An open transaction of the caller waits for it.
const MARK_PATIENCE: Duration = Duration::from_secs(1);

impl Actor {
    pub(super) async fn locate(&self, anew: bool) -> Result<Server, Error> {
        let found = twice(async || self.worker.locate(anew).await).await;
        found.map_err(|failure| failure.into_error(Action::FindTable, None))
    }

    pub(super) async fn read_row(&self, name: &Name) -> Result<Option<LockRow>, Error> {
        let row = patiently(async || self.worker.read(name).await).await;
        row.map_err(|failure| failure.into_error(Action::ReadRow, Some(name)))
    }

    pub(super) async fn migrate(&self) -> Result<(), Error> {
        // On a cluster other nodes migrate at the same time. Conflicts with their migrations are
        // temporary.
        let migrated = patiently(async || self.worker.migrate().await).await;
        migrated.map_err(|failure| failure.into_error(Action::Migrate, None))?;
        // The ledger of migrations is not enough: the table itself has to fit.
        self.check_fit().await
    }

    /// Returns the row, which is created if it is missing.
    pub(super) async fn ensure_row(
        &self,
        name: &Name,
        kind: Kind,
        instead_of: Option<i64>,
    ) -> Result<LockRow, Error> {
        let failed = |failure: Failure| failure.into_error(Action::MakeRow, Some(name));
        let (mut missing, mut in_the_way) = (false, None);
        loop {
            let row = patiently(async || match instead_of {
                None => self.worker.ensure(name, kind).await,
                Some(_) => self.worker.read(name).await,
            });
            let row = row.await.map_err(failed)?;
            if let Some(row) = row {
                if row.kind == kind {
                    return Ok(row);
                }
                return Err(Error::WrongKind { name: name.given(), wanted: kind, found: row.kind });
            }
            if missing {
                // A transaction, perhaps the caller's own, has locked the place where the row
                // belongs, or the whole table.
                let stale = || Error::Serialization { name: name.given(), source: None };
                return Err(in_the_way.map_or_else(stale, failed));
            }
            missing = true;
            if let Some(gone) = instead_of
                && self.is_last_id(gone).await.map_err(failed)?
            {
                return Err(Error::Serialization { name: name.given(), source: None });
            }
            // Without `instead_of`, this says why it was not created above.
            match twice(async || self.worker.create(name, kind).await).await {
                // Another process may be creating the row: the next read shows it.
                Err(failure) if failure.passes() => in_the_way = Some(failure),
                Err(failure) => return Err(failed(failure)),
                Ok(_) => {}
            }
        }
    }

    /// Whether no row has a larger id. New rows then belong where a row with this id would be.
    async fn is_last_id(&self, id: i64) -> Result<bool, Failure> {
        let scope = PruneScope { prefix: "".into(), older_than: LONGEST };
        Ok(twice(async || self.worker.read_part(scope.clone(), id).await).await?.last.is_none())
    }

    /// Makes sure that nothing of the last holder of a lock that is not held any more can be
    /// committed, unless a transaction of that holder is still open.
    pub(super) async fn settle(&self, name: &Name) -> Result<(), Error> {
        let settled = self.rule_out_last_holder(name).await;
        settled.map_err(|failure| failure.into_error(Action::TakeOver, Some(name)))
    }

    async fn rule_out_last_holder(&self, name: &Name) -> Result<(), Failure> {
        let Some(row) = twice(async || self.worker.read(name).await).await? else { return Ok(()) };
        if row.notice_is_due() && self.worker.give_notice(std::slice::from_ref(name)).await? > 0 {
            sleep(row.notice()).await;
            self.worker.settle(name).await?;
        } else if row.is_free() && !row.is_settled() {
            self.worker.settle(name).await?;
        }
        Ok(())
    }

    /// Tries again while other transactions have the row locked, such as guarded ones of the same
    /// lease.
    pub(super) async fn mark(&self, lease: LeaseKey) -> Result<(), Error> {
        let name = lease.row.name.clone();
        let started = Instant::now();
        loop {
            let may_wait = started.elapsed() < MARK_PATIENCE;
            match twice(async || self.worker.mark(lease.clone()).await).await {
                Ok(false) if may_wait => {}
                Err(failure) if may_wait && failure.passes() => {}
                // The lease is not ours any more, or the row is locked for long. The guard of the
                // transaction finds out which.
                Ok(_) => return Ok(()),
                Err(failure) => return Err(failure.into_error(Action::Verify, Some(&name))),
            }
            sleep(PAUSE).await;
        }
    }

    /// Wakes up the next process after a transaction has released a lock.
    pub(super) fn notify_next(self: &Rc<Self>, name: &Name) {
        let (actor, name) = (Rc::clone(self), name.clone());
        drop(spawn_local(async move {
            if let Ok(Some(row)) = actor.worker.read(&name).await
                && row.is_free()
                && let Some(notification) = row.first_waiter()
            {
                actor.worker.notify(notification);
            }
        }));
    }

    /// Checks that the table can be used. It needs no right that a role that only migrates lacks.
    async fn check_fit(&self) -> Result<(), Error> {
        let found = patiently(async || self.worker.locate(true).await).await;
        found.map(drop).map_err(|failure| failure.into_error(Action::FindTable, None))
    }

    pub(super) async fn check(&self, prunes: bool) -> Result<CheckReport, Error> {
        let checked = patiently(async || self.worker.check(prunes).await).await;
        checked.map_err(|failure| failure.into_error(Action::Check, None))
    }
}
