//! The obstacles between an attempt and its lock, and the errors made from them.

use std::time::Duration;

use super::{ACTION, AcquireAttempt, OFTEN_ENOUGH};
use crate::Error;
use crate::database::Failure;
use crate::database::{Fault, LockRow, Probe};
use crate::error::WaitingFor;
use crate::name::Name;
use crate::session::local_queue::Front;

/// The obstacle, as far as the database has reported it.
pub(super) enum Obstacle {
    /// The database has not answered.
    Unknown,
    /// A holder, or requests that are ahead in the queue.
    Held(Name, LockRow),
    /// Another transaction has the row locked.
    RowLocked(Name, LockRow),
    /// Another transaction has created the row.
    Transaction(Name),
    /// The database itself.
    Failure(Failure),
    /// The network is so slow that too little of the TTL is left after a grant.
    Network(Duration),
}

impl AcquireAttempt {
    /// Records the holder for this caller, and for those that wait behind it.
    pub(super) fn set_holder(&mut self, name: Name, row: LockRow) {
        let info = Box::new(row.clone().into_info(&name));
        self.actor.queues.learn(&name, Front::IsHeldElsewhere(Some(info)));
        self.last = Obstacle::Held(name, row);
    }

    pub(super) fn set_failure(&mut self, failure: Failure) {
        for claim in &self.claims {
            self.actor.queues.learn(&claim.name, Front::Fails(failure.clone()));
        }
        self.last = Obstacle::Failure(failure);
    }

    /// Whether free rows could not be taken because another transaction has one of them locked. If
    /// every probe finds all of them unlocked, they can't be written at all.
    pub(super) async fn find_locked(&mut self, rows: Vec<(Name, LockRow)>) -> Result<bool, Error> {
        for (name, row) in self.likely_locked(rows).await? {
            match self.actor.worker.probe(&name).await {
                Ok(Probe::Locked) => {
                    self.met.not_locked = 0;
                    self.answered.set(true);
                    self.actor.queues.learn(&name, Front::IsHeldElsewhere(None));
                    self.last = Obstacle::RowLocked(name, row);
                    return Ok(true);
                }
                Ok(Probe::Free | Probe::Nothing) => {}
                Err(failure) if failure.passes() || failure.fault == Fault::Disconnected => {
                    self.answered.set(true);
                    self.set_failure(failure);
                    return Ok(false);
                }
                Err(failure) => return Err(failure.into_error(ACTION, Some(&name))),
            }
        }
        self.met.not_locked += 1;
        if self.met.not_locked >= OFTEN_ENOUGH {
            let failure = (self.actor.not_written)();
            self.set_failure(failure.clone());
            return Err(failure.into_error(ACTION, self.name()));
        }
        Ok(false)
    }

    /// Returns the first of several rows that may be locked.
    async fn likely_locked(&mut self, rows: Vec<(Name, LockRow)>) -> Result<Vec<(Name, LockRow)>, Error> {
        if rows.len() < 2 {
            return Ok(rows);
        }
        let names: Vec<Name> = rows.iter().map(|(name, _)| name.clone()).collect();
        match self.actor.worker.unlocked(&names).await {
            Ok(unlocked) => {
                Ok(rows.into_iter().find(|(name, _)| !unlocked.contains(&**name)).into_iter().collect())
            }
            // The probe fails the same way, and reports it.
            Err(_) => Ok(rows.into_iter().take(1).collect()),
        }
    }

    /// The name to show in messages.
    fn name(&self) -> Option<&Name> {
        self.claims.first().map(|claim| &claim.name)
    }

    /// Like `name`, but finds the name that a failure is about among several.
    pub(super) fn name_for(&self, failure: &Failure) -> Option<&Name> {
        let mut names = self.claims.iter().map(|claim| &claim.name);
        let is_odd = |name: &&Name| failure.fault == Fault::Unstorable && !name.is_ascii();
        names.find(is_odd).or_else(|| self.name())
    }

    /// A database that was unreachable until the end is reported instead of the timeout.
    pub(super) fn timed_out(&mut self) -> Error {
        let waited = self.started.elapsed();
        let (name, row) = match std::mem::replace(&mut self.last, Obstacle::Unknown) {
            Obstacle::Held(name, row) | Obstacle::RowLocked(name, row) => (name, Some(row)),
            Obstacle::Transaction(name) => (name, None),
            Obstacle::Failure(failure) => {
                return failure.into_error(ACTION, self.name()).within(self.wait.limit());
            }
            // One slow answer may be chance.
            Obstacle::Network(took) if self.met.late < 2 => {
                let failure = self.actor.worker.no_answer(took);
                return failure.into_error(ACTION, self.name()).within(self.wait.limit());
            }
            Obstacle::Network(took) => {
                let name = self.name().map(Name::given).unwrap_or_default();
                let ttl = self.claims.first().map_or(Duration::ZERO, |claim| claim.ttl);
                return Error::TtlTooShort { name, ttl, took };
            }
            Obstacle::Unknown => {
                return self.actor.worker.no_answer(waited).into_error(ACTION, self.name());
            }
        };
        let held_by = row.map(|row| Box::new(row.into_info(&name)));
        Error::Timeout { name: name.given(), waited, waiting_for: WaitingFor::Lock, held_by }
    }
}
