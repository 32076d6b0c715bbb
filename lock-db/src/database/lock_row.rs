//! A row of the table as it was read, and what it says.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::types::{LeaseKey, Notification};
use super::wait_queue::{self, WaitQueue};
use crate::error::Loss;
use crate::name::Name;
use crate::options::{MOST_HOLDERS, SHORTEST_PRUNE, micros};
use crate::secret::Secret;
use crate::{Holder, Kind, LockInfo, RowHolder};

/// A row as it was read.
#[derive(Debug, Clone)]
pub struct LockRow {
    pub id: i64,
    pub kind: Kind,
    pub secret_key: String,
    pub owner: String,
    pub fencing_token: i64,
    /// All times are in microseconds since 1970, by the database's clock.
    pub created: i64,
    pub acquired: i64,
    pub expires: i64,
    /// Time until `expires`; zero or less if that has passed.
    pub remaining: i64,
    /// How far ahead the deadline can be, if the clock is right:
    ///
    /// - the TTL of the present lease;
    /// - negative: how long `at_least` keeps the lock after the release;
    /// - zero once a takeover has given notice, and when the row is settled.
    pub ttl: i64,
    /// The processes that wait: see [`WaitQueue`](super::WaitQueue).
    pub waiters: String,
    /// The token of the grant before, or one more if that grant was forced to end.
    pub previous_token: i64,
}

/// What a row whose lease was ended by force has in place of a secret.
pub(super) const FORCED: &str = "forced";
/// How long a takeover gives notice, at most. For shorter TTLs it is a fifth of the TTL.
const LONGEST_NOTICE: i64 = 1_000_000;
/// How far a deadline may be ahead of now beyond its TTL. Beyond that, the clock counts as set
/// back.
const CLOCK_SLACK: i64 = 2_000_000;

impl LockRow {
    /// Whether any process may take it now. It was released, its minimum hold time is over, or it
    /// expired after a takeover gave notice.
    pub(crate) fn is_free(&self) -> bool {
        self.remaining <= 0 && (self.expires == 0 || self.ttl <= 0)
    }

    /// Whether this acquisition and this grant hold it.
    pub(crate) fn is_of(&self, secret: &Secret, fencing_token: i64) -> bool {
        self.secret_key == secret.as_str() && self.fencing_token == fencing_token && self.expires != 0
    }

    /// How long it stays as it is without another renewal. Zero when it is free, or when notice may
    /// be given.
    pub(crate) fn remaining(&self) -> Duration {
        let micros = if self.ttl > 0 { self.remaining - notice(self.ttl) } else { self.remaining };
        Duration::from_micros(u64::try_from(micros).unwrap_or(0))
    }

    /// Whether another process may remove it: it was not used for the shortest time after which
    /// rows are removed.
    pub(crate) fn may_be_removed(&self) -> bool {
        let used = self.created.max(self.acquired).max(self.expires);
        self.now().saturating_sub(used) >= micros(SHORTEST_PRUNE)
    }

    /// Whether no transaction of the last holder can commit any more, and the row says so.
    /// Everything that such a transaction has written is older than this state of the row.
    pub(crate) fn is_settled(&self) -> bool {
        self.expires == 0 && self.ttl == 0
    }

    /// Whether a takeover should give notice now, or the deadline is further ahead than it can be.
    ///
    /// An expired lease may still be held: its holder can't renew it while another transaction has
    /// the row locked, but can read that no notice was given. A takeover therefore has two steps.
    /// It gives notice, for which it needs the row. Then the holder has a short time in which to
    /// renew.
    pub(crate) fn notice_is_due(&self) -> bool {
        let is_over = self.ttl > 0 && self.expires != 0 && self.remaining <= notice(self.ttl);
        is_over || (self.expires != 0 && self.remaining > self.ttl.abs() + CLOCK_SLACK)
    }

    /// How long a takeover gives notice, when that is due.
    pub(crate) fn notice(&self) -> Duration {
        Duration::from_micros(u64::try_from(notice(self.ttl)).unwrap_or(0))
    }

    /// The process that a release would notify.
    pub(crate) fn first_waiter(&self) -> Option<Notification> {
        wait_queue::first_notification(&self.waiters, self.id)
    }

    /// When it was read: microseconds since 1970, by the database's clock.
    pub(crate) fn now(&self) -> i64 {
        self.expires.saturating_sub(self.remaining)
    }

    /// Whether the present grant has this number. A lease that is handed on within its process has a
    /// range of numbers, which ends with that of the row. An earlier grant never has one of them.
    pub(crate) fn is_grant(&self, fencing_token: i64) -> bool {
        let is_in_range = self.previous_token > 0
            && fencing_token > self.previous_token
            && fencing_token < self.fencing_token
            && self.fencing_token.saturating_sub(fencing_token) < 4 * i64::from(MOST_HOLDERS);
        self.expires != 0 && (fencing_token == self.fencing_token || is_in_range)
    }

    /// What has become of a lease that this row does not hold any more.
    pub(crate) fn loss_of(&self, lease: &LeaseKey) -> Loss {
        if self.secret_key == lease.secret.as_str() {
            if self.expires == 0 { Loss::ReleasedByHand } else { Loss::TakenOver }
        } else if self.is_just_forced(lease.fencing_token)
            || self.previous_token == lease.fencing_token.saturating_add(1)
        {
            Loss::ForceReleased
        } else {
            Loss::TakenOver
        }
    }

    /// Whether the grant with this token was ended by force, and no other one followed.
    pub(crate) fn is_just_forced(&self, fencing_token: i64) -> bool {
        self.secret_key == FORCED && self.fencing_token == fencing_token.saturating_add(1)
    }

    /// Whether the lock was granted to another holder after this one.
    pub(crate) fn has_new_holder(&self, before: &LeaseKey) -> bool {
        self.fencing_token > before.fencing_token && self.secret_key != FORCED
    }

    /// When it was read, by the database's clock.
    pub(crate) fn time(&self) -> DateTime<Utc> {
        timestamp(self.now())
    }

    /// Whether a process waits in the queue, other than that with this secret.
    pub(crate) fn others_wait(&self, own: &Secret) -> bool {
        let queue = WaitQueue::parse(&self.waiters, self.now());
        queue.len() > usize::from(queue.position(own).is_some())
    }

    pub(crate) fn into_info(self, name: &Name) -> LockInfo {
        let held = self.kind != Kind::Row && self.remaining > 0;
        let now = self.now();
        let time = |micros: i64| Duration::from_micros(u64::try_from(micros).unwrap_or(0));
        let expires_in = held.then(|| time(self.remaining));
        let since = timestamp(self.acquired);
        let holder = held.then(|| Holder {
            owner: self.owner.clone(),
            fencing_token: self.fencing_token,
            since,
            expires_in,
        });
        LockInfo {
            name: name.given(),
            kind: self.kind,
            fencing_token: self.fencing_token,
            created_at: timestamp(self.created),
            acquired_at: since,
            held_until: held.then(|| timestamp(self.expires)),
            expires_in,
            held_for: held.then(|| time(now.saturating_sub(self.acquired))),
            finished_at: (held && self.ttl < 0).then(|| timestamp(self.expires.saturating_add(self.ttl))),
            holders: holder.into_iter().collect(),
            waiting: WaitQueue::parse(&self.waiters, now).waiting(),
            row_holder: (self.kind == Kind::Row)
                .then(|| RowHolder::Unknown("the table does not show it".to_owned())),
            is_here: false,
            owner: self.owner,
        }
    }
}

/// Length of the notice for a TTL, both in microseconds. The `GIVE_NOTICE` statements compute the
/// same.
fn notice(ttl: i64) -> i64 {
    (ttl / 5).min(LONGEST_NOTICE)
}

/// How long a holder may rely on a row that has just been read, was locked by another transaction,
/// and showed no notice.
pub(crate) fn reliable_without_notice(ttl: Duration) -> Duration {
    Duration::from_micros(u64::try_from(notice(micros(ttl))).unwrap_or(0)) * 9 / 10
}

pub(super) fn timestamp(micros: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(micros).unwrap_or_default()
}
