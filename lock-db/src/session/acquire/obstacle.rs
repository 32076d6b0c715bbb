//! What keeps a lock from an attempt, and what the caller is told in the end.

use std::time::Duration;

use super::{ACTION, Attempt, OFTEN_ENOUGH};
use crate::Error;
use crate::database::{Fault, LockRow, Probe};
use crate::error::{Failure, WaitingFor};
use crate::name::Name;
use crate::session::queues::Front;

/// What keeps the lock from us, as far as the database has told.
pub(super) enum Obstacle {
    /// It has not told anything.
    Unknown,
    /// A holder, or those who are to have it before us.
    Held(Name, LockRow),
    /// Another transaction that has the row locked.
    RowLocked(Name, LockRow),
    /// One that has made the row.
    Transaction(Name),
    /// The database itself.
    Failure(Failure),
    /// A network on which a grant takes so long that too little is left of its TTL.
    Network(Duration),
}

impl Attempt {
    /// Notes who is in the way, for this caller and for those that wait behind it.
    pub(super) fn is_held_by(&mut self, name: Name, row: LockRow) {
        let info = Box::new(row.clone().into_info(&name));
        self.core.queues.learn(&name, Front::IsHeldElsewhere(Some(info)));
        self.last = Obstacle::Held(name, row);
    }

    pub(super) fn fails(&mut self, failure: Failure) {
        for claim in &self.claims {
            self.core.queues.learn(&claim.name, Front::Fails(failure.another()));
        }
        self.last = Obstacle::Failure(failure);
    }

    /// Whether free rows could not be had because another transaction has one of them locked. If none was, each time that somebody
    /// looked, they can't be written at all.
    pub(super) async fn is_one_locked(&mut self, rows: Vec<(Name, LockRow)>) -> Result<bool, Error> {
        for (name, row) in self.likely_locked(rows).await? {
            match self.core.lane.probe(&name).await {
                Ok(Probe::Locked) => {
                    self.met.not_locked = 0;
                    self.answered.set(true);
                    self.core.queues.learn(&name, Front::IsHeldElsewhere(None));
                    self.last = Obstacle::RowLocked(name, row);
                    return Ok(true);
                }
                Ok(Probe::Free | Probe::Nothing) => {}
                Err(failure) if failure.passes() || failure.fault == Fault::Disconnected => {
                    self.answered.set(true);
                    self.fails(failure);
                    return Ok(false);
                }
                Err(failure) => return Err(failure.into_error(ACTION, Some(&name))),
            }
        }
        self.met.not_locked += 1;
        if self.met.not_locked >= OFTEN_ENOUGH {
            let failure = (self.core.not_written)();
            self.fails(failure.another());
            return Err(failure.into_error(ACTION, self.name()));
        }
        Ok(false)
    }

    /// The first of several rows that may be locked.
    async fn likely_locked(&mut self, rows: Vec<(Name, LockRow)>) -> Result<Vec<(Name, LockRow)>, Error> {
        if rows.len() < 2 {
            return Ok(rows);
        }
        let names: Vec<Name> = rows.iter().map(|(name, _)| name.clone()).collect();
        match self.core.lane.unlocked(&names).await {
            Ok(unlocked) => {
                Ok(rows.into_iter().find(|(name, _)| !unlocked.contains(&**name)).into_iter().collect())
            }
            // The probe meets the same, and tells.
            Err(_) => Ok(rows.into_iter().take(1).collect()),
        }
    }

    /// For messages.
    fn name(&self) -> Option<&Name> {
        self.claims.first().map(|claim| &claim.name)
    }

    /// The same where it may be about one of several.
    pub(super) fn name_for(&self, failure: &Failure) -> Option<&Name> {
        let mut names = self.claims.iter().map(|claim| &claim.name);
        let is_odd = |name: &&Name| failure.fault == Fault::Unstorable && !name.is_ascii();
        names.find(is_odd).or_else(|| self.name())
    }

    /// A database that was away to the end is worth more words than the wait.
    pub(super) fn timed_out(&mut self) -> Error {
        let waited = self.started.elapsed();
        let (name, row) = match std::mem::replace(&mut self.last, Obstacle::Unknown) {
            Obstacle::Held(name, row) | Obstacle::RowLocked(name, row) => (name, Some(row)),
            Obstacle::Transaction(name) => (name, None),
            Obstacle::Failure(failure) => return failure.into_error(ACTION, self.name()).within(self.wait),
            Obstacle::Network(took) => {
                let name = self.name().map(Name::given).unwrap_or_default();
                let ttl = self.claims.first().map_or(Duration::ZERO, |claim| claim.ttl);
                return Error::TtlTooShort { name, ttl, took };
            }
            Obstacle::Unknown => {
                return self.core.lane.no_answer(waited).into_error(ACTION, self.name());
            }
        };
        let held_by = row.map(|row| Box::new(row.into_info(&name)));
        Error::Timeout { name: name.given(), waited, waiting_for: WaitingFor::Lock, held_by }
    }
}
