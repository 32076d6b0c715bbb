//! What goes to a database and comes back, whichever it is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

use super::Server;
use crate::limits::micros;
use crate::name::Name;
use crate::secret::Secret;
use crate::{Kind, LockInfo};

/// An attempt to take a lease.
#[derive(Debug, Clone)]
pub struct Claim {
    pub name: Name,
    pub secret: Secret,
    pub owner: Arc<str>,
    pub ttl: Duration,
    /// With what its process stands in the queue of the row. A claim without it leaves a free lock to nobody.
    pub place: Option<Secret>,
}

/// A lease that is given back.
#[derive(Debug, Clone)]
pub struct Return {
    pub name: Name,
    pub secret: Secret,
    /// When more callers of this process wait: they stand behind those of others who wait already.
    pub place: Option<Place>,
}

/// A place in the queue of a row: see [`Waiters`].
#[derive(Debug, Clone)]
pub struct Place {
    pub secret: Secret,
    /// Whom a release calls; zero for nobody.
    pub listener: u32,
}

impl Place {
    /// As SQL binds it; empty for none.
    pub(super) fn parts(place: Option<&Self>) -> (&str, String) {
        place.map_or(("", String::new()), |place| (place.secret.as_str(), format!("{:08x}", place.listener)))
    }
}

/// What became of returns and claims, in their order.
#[derive(Debug)]
pub struct Exchanged {
    pub returns: Vec<Standing>,
    pub grants: Vec<Option<Grant>>,
    /// Whom to wake up, now that these rows are free.
    pub calls: Vec<Call>,
}

impl Exchanged {
    /// When something was in the way of all of them, and nothing was done.
    #[cfg(feature = "mysql")]
    pub(super) fn nothing(returns: &[Return], claims: &[Claim]) -> Self {
        Self {
            returns: vec![Standing::Busy; returns.len()],
            grants: vec![None; claims.len()],
            calls: Vec::new(),
        }
    }
}

/// A process that waits for a row that is free now, and can be woken up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    pub listener: u32,
    /// Of the row.
    pub id: i64,
}

impl Call {
    /// As a place in the queue of a row names the listener: in hexadecimal, zero for none.
    #[cfg(feature = "postgres")]
    pub(super) fn parse(listener: Option<&str>, id: i64) -> Option<Self> {
        let listener = u32::from_str_radix(listener?, 16).ok()?;
        (listener > 0).then_some(Self { listener, id })
    }
}

/// What became of a release.
#[derive(Debug, Clone, Copy)]
pub struct Released {
    pub standing: Standing,
    pub call: Option<Call>,
}

impl From<Standing> for Released {
    fn from(standing: Standing) -> Self {
        Self { standing, call: None }
    }
}

/// A lease that was taken.
#[derive(Debug, Clone, Copy)]
pub struct Grant {
    /// Of the row.
    pub id: i64,
    /// The last of those that belong to this grant.
    pub fencing_token: i64,
    /// How many belong to it, one at least: those since the grant before, which the clock has gone over meanwhile.
    pub numbers: i64,
    /// Whether other processes stand in the queue.
    pub others_wait: bool,
}

/// A lease, as the statements in a transaction name it.
#[derive(Debug, Clone)]
pub struct LeaseKey {
    pub row: RowKey,
    pub secret: Secret,
    /// Beside the secret, which a late copy of the request for the lease may bring back long after others have had it.
    pub fencing_token: i64,
    /// What `previous_token` has to be at least in the snapshot of a transaction that this lease guards: zero, or the number of a holder
    /// that got the lease by hand. What that one can see of the row is otherwise the same before and after.
    pub mark: i64,
    pub ttl: Duration,
    /// By which it was granted.
    pub server: Server,
}

/// What a guard found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guarded {
    /// The lock is ours, and stays so to the end of the transaction.
    Ours,
    /// It was ours when the transaction was committed, which it is already: the COMMIT of its handle finds nothing to do.
    Committed {
        /// Whom to wake up, if the lock was released with it.
        call: Option<Call>,
    },
    /// It is not ours any more; or the transaction sees the row as it was before the lease was granted.
    NotOurs,
    /// It is ours, but the transaction sees the row as it was before the lease was granted.
    Stale,
    /// The marked transaction has ended already.
    Ended,
    /// The transaction has another table of that name before it. Nothing of the lock's was done.
    Elsewhere,
}

#[cfg(any(feature = "postgres", feature = "sqlite"))]
impl Guarded {
    pub(super) fn when(ours: bool) -> Self {
        if ours { Self::Ours } else { Self::NotOurs }
    }
}

/// A lease to be renewed.
#[derive(Debug, Clone)]
pub struct Renewal {
    /// Of the row.
    pub id: i64,
    pub secret: Secret,
    pub fencing_token: i64,
    pub ttl: Duration,
}

/// What became of renewals.
#[derive(Debug)]
pub struct Renewed {
    /// In their order.
    pub standings: Vec<Standing>,
    /// From just before what was not renewed was looked at. `None`: as old as the request.
    pub looked: Option<Instant>,
}

/// What the row said about a lease of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It was ours, and what was asked for was done.
    Ours,
    /// It is ours, with more of its TTL left than its holder relies on. Whether it was renewed just now was not told.
    StillOurs,
    /// It is ours, but another transaction has the row locked: nothing was done, ask again.
    Busy,
    /// As `Busy`, and a takeover has given notice: see [`LockRow::notice_is_due`].
    Challenged,
    /// It is not ours any more.
    NotOurs,
}

/// A wish for a row, in a transaction.
#[derive(Debug, Clone)]
pub struct RowClaim {
    pub row: RowKey,
    pub kind: Kind,
    pub owner: Arc<str>,
    pub secret: Secret,
    /// When the row was made, by which it is told from one of another server: where its id is used.
    pub created: i64,
    /// Whether lock-db itself began the transaction, which therefore is in the right database.
    pub is_own: bool,
    /// Whether nobody waits for it.
    pub is_try: bool,
}

/// Which row to lock.
#[derive(Debug, Clone)]
pub struct RowKey {
    pub name: Name,
    /// As it was read last; not used where the transaction makes the row.
    pub id: i64,
}

/// What became of an attempt to lock a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowAttempt {
    /// It is locked until the transaction ends.
    Locked {
        /// The number that this wrote into the row.
        fencing_token: i64,
        /// The secret that was there before.
        before: String,
        /// What it wrote as its own, if that was drawn by the server.
        secret: Option<Secret>,
    },
    /// Another transaction has it.
    Busy,
    /// Another transaction has the whole table.
    TableLocked,
    /// There is no such row, as far as this transaction can see.
    Missing,
    /// The row is there and locked, but the transaction's snapshot is older than what its last holder committed.
    Stale,
    /// It was found and locked, and writing it had no effect.
    Unwritten,
    /// The name is used as another kind of lock.
    WrongKind,
    /// A lease holds it. `usable`: the row is let go, and the transaction is as usable as before.
    Leased { usable: bool },
    /// No lease holds it any more, but its last holder has not been ruled out yet: see [`LockRow::is_settled`].
    Unsettled { usable: bool },
    /// The transaction is in a database that is not the one of the table. Nothing was done in it.
    ForeignTransaction,
}

/// A row as it was read.
#[derive(Debug, Clone)]
pub struct LockRow {
    pub id: i64,
    pub kind: Kind,
    pub secret_key: String,
    pub owner: String,
    pub fencing_token: i64,
    /// All times in microseconds since 1970, by the database's clock.
    pub created: i64,
    pub acquired: i64,
    pub expires: i64,
    /// Until `expires`; zero or less when that is past.
    pub remaining: i64,
    /// How long the deadline lies ahead at most, when nothing is wrong with the clock: the TTL of the present lease; below
    /// zero for how long a lock was to be kept by `at_least` when it was given back; zero once a takeover has given notice, and when the row is settled.
    pub ttl: i64,
    /// The processes that wait: see [`Waiters`].
    pub waiters: String,
}

/// How long a takeover gives notice, at most. The rest of the time it is a fifth of the TTL.
const LONGEST_NOTICE: i64 = 1_000_000;
/// How much further ahead than its TTL a deadline may lie before the clock counts as set back.
const CLOCK_SLACK: i64 = 2_000_000;

impl LockRow {
    /// Whether anybody may take it now: released, kept for long enough, or run out after a takeover gave notice.
    pub(crate) fn is_free(&self) -> bool {
        self.remaining <= 0 && (self.expires == 0 || self.ttl <= 0)
    }

    /// Whether it is held by this acquisition and grant.
    pub(crate) fn is_of(&self, secret: &Secret, fencing_token: i64) -> bool {
        self.secret_key == secret.as_str() && self.fencing_token == fencing_token && self.expires != 0
    }

    /// How long it stays as it is without another renewal; zero when it is free, or when notice may be given.
    pub(crate) fn remaining(&self) -> Duration {
        let micros = if self.ttl > 0 { self.remaining - notice(self.ttl) } else { self.remaining };
        Duration::from_micros(u64::try_from(micros).unwrap_or(0))
    }

    /// Whether no transaction of its last holder can be committed any more, and the row says so. What such a transaction has
    /// written is older than this state of the row.
    pub(crate) fn is_settled(&self) -> bool {
        self.expires == 0 && self.ttl == 0
    }

    /// Whether a takeover is to give notice now, or the deadline lies further ahead than can be.
    ///
    /// A lease that ran out may still be held: when its row is locked by another transaction, its holder can't renew it, but
    /// can read that nobody has given notice. So it is taken in two steps. A takeover gives notice, for which it needs the row; then
    /// the holder has a moment in which to renew.
    pub(crate) fn notice_is_due(&self) -> bool {
        let is_over = self.ttl > 0 && self.expires != 0 && self.remaining <= notice(self.ttl);
        is_over || (self.expires != 0 && self.remaining > self.ttl.abs() + CLOCK_SLACK)
    }

    /// How long a takeover gives notice, when that is due.
    pub(crate) fn notice(&self) -> Duration {
        Duration::from_micros(u64::try_from(notice(self.ttl)).unwrap_or(0))
    }

    /// Whom a release would call.
    pub(crate) fn first_waiter(&self) -> Option<Call> {
        let listener = u32::from_str_radix(self.waiters.get(48..56)?, 16).ok()?;
        (listener > 0).then_some(Call { listener, id: self.id })
    }

    /// When it was read, by the database's clock, in microseconds since 1970.
    pub(crate) fn now(&self) -> i64 {
        self.expires.saturating_sub(self.remaining)
    }

    pub(crate) fn into_info(self, name: &Name) -> LockInfo {
        let held = self.kind == Kind::Insert && self.remaining > 0;
        LockInfo {
            name: name.given(),
            kind: self.kind,
            owner: self.owner,
            fencing_token: self.fencing_token,
            created_at: timestamp(self.created),
            acquired_at: timestamp(self.acquired),
            held_until: held.then(|| timestamp(self.expires)),
            finished_at: (held && self.ttl < 0).then(|| timestamp(self.expires.saturating_add(self.ttl))),
            is_here: false,
        }
    }
}

/// For a TTL in microseconds. The statements `GIVE_NOTICE` say the same.
fn notice(ttl: i64) -> i64 {
    (ttl / 5).min(LONGEST_NOTICE)
}

/// How long a holder may rely on a row that has just been read, was locked by another transaction, and told of no notice.
pub(crate) fn reliable_without_notice(ttl: Duration) -> Duration {
    Duration::from_micros(u64::try_from(notice(micros(ttl))).unwrap_or(0)) * 9 / 10
}

fn timestamp(micros: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(micros).unwrap_or_default()
}
