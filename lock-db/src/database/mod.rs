//! What lock-db needs of a database: one small trait, implemented once a database. SQL and error codes live in those
//! files and nowhere else; nothing here or below knows about waiting, renewing or guards.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};

pub(crate) use self::waiters::Waiters;
use crate::secret::Secret;
use crate::{Kind, LockInfo};

#[cfg(feature = "mysql")]
mod mysql;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "sqlite")]
mod sqlite;
mod waiters;

mod sealed {
    pub trait Sealed {}
    #[cfg(feature = "postgres")]
    impl Sealed for sqlx::Postgres {}
    #[cfg(feature = "mysql")]
    impl Sealed for sqlx::MySql {}
    #[cfg(feature = "sqlite")]
    impl Sealed for sqlx::Sqlite {}
}

/// A database that can keep locks: `sqlx::Postgres`, `sqlx::MySql` (MySQL 8.0 and MariaDB 10.6 or later) and
/// `sqlx::Sqlite`, each with the cargo feature of its name. Sealed: the methods are no part of the public interface.
///
/// Every method is one step on one connection. On a private one none of them waits for a row that somebody else has
/// locked, and `lock_row` waits no longer than its `slice`.
pub trait LockDatabase: sealed::Sealed + sqlx::Database + Sized {
    /// The folder of the migrations.
    #[doc(hidden)]
    const FOLDER: &'static str;
    /// Whether `lock_row` makes a missing row itself, in the caller's transaction. Elsewhere it must not: on
    /// PostgreSQL and InnoDB an INSERT there would make others wait for the whole transaction, or deadlock.
    #[doc(hidden)]
    const ROW_IS_MADE_IN_TRANSACTION: bool;

    /// Whether connections with these options can see the same database at all.
    #[doc(hidden)]
    fn check_options(_options: &<Self::Connection as sqlx::Connection>::Options) -> Result<(), crate::Error> {
        Ok(())
    }

    /// The statement that begins a marked transaction: one that the `commit_…` methods can tell from what comes after its
    /// end. What is sent after an end that its owner has not seen is refused or rolled back, as far as the database can
    /// do that.
    #[doc(hidden)]
    const BEGIN_MARKED: &'static str;
    /// The same for a guarded transaction.
    #[doc(hidden)]
    const BEGIN_GUARDED: &'static str = Self::BEGIN_MARKED;

    /// Whether the `commit_…` methods commit, so that nobody knows the outcome when their answer is lost.
    #[doc(hidden)]
    const COMMITS_WITH_CHECK: bool = false;

    /// Sets up a private connection, once, before its first use, and answers what kind of server it leads to.
    #[doc(hidden)]
    fn prepare(connection: &mut Self::Connection) -> impl Future<Output = sqlx::Result<Server>> + Send;

    /// A private connection on which the server can call us.
    #[doc(hidden)]
    type Listening: Send;

    /// Whether this database calls at all.
    #[doc(hidden)]
    const CALLS: bool = false;

    /// Whether a connection can wait on the server until another one is done with a row, where nobody is called: whoever has
    /// the lock of a row has its baton too, if all goes well, and the next one waits for that.
    #[doc(hidden)]
    const BATONS: bool = false;

    /// Waits for the baton of a row, a second at most. Those who wait get it in the order in which they came.
    #[doc(hidden)]
    fn take_baton(
        _connection: &mut Self::Connection,
        _row: i64,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send {
        async { Ok(false) }
    }

    /// Gives it to the next one.
    #[doc(hidden)]
    fn give_baton(
        _connection: &mut Self::Connection,
        _row: i64,
    ) -> impl Future<Output = sqlx::Result<()>> + Send {
        async { Ok(()) }
    }

    /// Makes such a connection, like those of the pool.
    #[doc(hidden)]
    fn connect_listening(
        pool: &sqlx::Pool<Self>,
    ) -> impl Future<Output = sqlx::Result<Self::Listening>> + Send;

    /// Hears the calls to this listener from now on.
    #[doc(hidden)]
    fn listen(
        listening: &mut Self::Listening,
        listener: u32,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// For other statements.
    #[doc(hidden)]
    fn listening_connection(
        listening: &mut Self::Listening,
    ) -> impl Future<Output = sqlx::Result<&mut Self::Connection>> + Send;

    /// Waits for a call: the lock with this row is free. Cancel safe.
    #[doc(hidden)]
    fn called(listening: &mut Self::Listening) -> impl Future<Output = sqlx::Result<i64>> + Send;

    /// Applies the migrations that are missing, one process at a time. Leaves no lock behind but on the connection
    /// itself, which the caller closes when this failed.
    #[doc(hidden)]
    fn migrate(connection: &mut Self::Connection) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Fails unless the table has all the columns that are used. `Some`: what else is wrong with it.
    #[doc(hidden)]
    fn check_schema(
        connection: &mut Self::Connection,
    ) -> impl Future<Output = sqlx::Result<Option<&'static str>>> + Send;

    /// Reads the row without locking anything.
    #[doc(hidden)]
    fn look(
        connection: &mut Self::Connection,
        name: &str,
    ) -> impl Future<Output = sqlx::Result<Option<LockRow>>> + Send;

    /// Makes the row of a name, free. A row that is there already stays as it is.
    #[doc(hidden)]
    fn create(
        connection: &mut Self::Connection,
        name: &str,
        kind: Kind,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Takes the lease when it is free, and for a fair claim when nobody else is first in the queue, or when it is already ours
    /// by this very claim. What stood first in the queue for this claim is gone then. `None`: not free, or no row.
    #[doc(hidden)]
    fn acquire(
        connection: &mut Self::Connection,
        server: Server,
        claim: &Claim,
    ) -> impl Future<Output = sqlx::Result<Option<Grant>>> + Send;

    /// The statement that begins a transaction on a private connection, such that the server ends it soon when it hears
    /// nothing more of us.
    #[doc(hidden)]
    const BEGIN_SHORT: &'static str;
    /// Takes back what that set for longer than its transaction.
    #[doc(hidden)]
    fn after_short(_connection: &mut Self::Connection) -> impl Future<Output = sqlx::Result<()>> + Send {
        async { Ok(()) }
    }

    /// Moves the deadlines of these leases forward, in one statement. One answer a lease, in order.
    #[doc(hidden)]
    fn renew(
        connection: &mut Self::Connection,
        leases: &[Renewal],
    ) -> impl Future<Output = sqlx::Result<Vec<Standing>>> + Send;

    /// Frees the lease if it is still ours. `Standing::Ours` means that it was, and is free now.
    #[doc(hidden)]
    fn release(
        connection: &mut Self::Connection,
        server: Server,
        lease: &Return,
    ) -> impl Future<Output = sqlx::Result<Standing>> + Send;

    /// Gives the lease up, while nobody else can have the lock before `at_least` has passed since it was granted. The row
    /// has no owner's secret from then on, so that a renewal that is still under way does not find it.
    #[doc(hidden)]
    fn release_later(
        connection: &mut Self::Connection,
        name: &str,
        secret: &Secret,
        at_least: Duration,
    ) -> impl Future<Output = sqlx::Result<Standing>> + Send;

    /// Gives back and takes what several callers asked for, in as few messages as the database allows, as if each had
    /// come alone. No name stands in it twice.
    #[doc(hidden)]
    fn exchange(
        connection: &mut Self::Connection,
        server: Server,
        returns: &[Return],
        claims: &[Claim],
    ) -> impl Future<Output = sqlx::Result<Exchanged>> + Send;

    /// Takes a place at the end of the queue of a name, if there is room, and none of ours yet. `false`: not, or somebody has the
    /// row locked.
    #[doc(hidden)]
    fn stand(
        connection: &mut Self::Connection,
        name: &str,
        place: &Place,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send;

    /// Writes the queue of a name, if it still is what it was `before`. `false`: it is not, or somebody has the row locked.
    #[doc(hidden)]
    fn set_waiters(
        connection: &mut Self::Connection,
        name: &str,
        before: &str,
        after: &str,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send;

    /// Takes the place of this secret out of the queue of a name, unless somebody has the row locked.
    #[doc(hidden)]
    fn remove_waiter(
        connection: &mut Self::Connection,
        name: &str,
        secret: &Secret,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Locks the row of a free lock in the transaction that is open on the connection, and writes it, waiting no longer than `slice`
    /// (zero: not at all). After `Stale`, a deadlock or a serialization failure the transaction can only be rolled back,
    /// whatever its owner sends; after everything else but a broken connection it is as usable as before.
    #[doc(hidden)]
    fn lock_row(
        connection: &mut Self::Connection,
        claim: &RowClaim,
        slice: Duration,
    ) -> impl Future<Output = sqlx::Result<RowAttempt>> + Send;

    /// Sees to it that some transaction is open, so that the rollback of a handle whose own one has ended succeeds.
    #[doc(hidden)]
    fn reopen(_connection: &mut Self::Connection) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// How long a guard waits for a row that somebody else has locked.
    #[doc(hidden)]
    const GUARD_LIMIT: Duration = Duration::from_secs(5);

    /// The last thing in a marked transaction before its COMMIT: is it still the one in which `lock_row` answered with this
    /// token?
    #[doc(hidden)]
    fn commit_locked(
        connection: &mut Self::Connection,
        name: &str,
        fencing_token: i64,
    ) -> impl Future<Output = sqlx::Result<Guarded>> + Send;

    /// The last thing in a marked transaction before its COMMIT: what `guard` does.
    #[doc(hidden)]
    fn commit_guarded(
        connection: &mut Self::Connection,
        lease: &LeaseKey,
        release: bool,
    ) -> impl Future<Output = sqlx::Result<Guarded>> + Send;

    /// Takes back what the mark did to the connection, before a marked transaction is rolled back. A statement whose caller
    /// has gone may still be under way.
    #[doc(hidden)]
    fn unmark(_connection: &mut Self::Connection) -> impl Future<Output = sqlx::Result<()>> + Send {
        async { Ok(()) }
    }

    /// Asks in a caller's transaction whether the lease is ours, and if so holds off every takeover until the transaction
    /// ends. With `release` the lease becomes free with the commit.
    #[doc(hidden)]
    fn guard(
        connection: &mut Self::Connection,
        lease: &LeaseKey,
        release: bool,
    ) -> impl Future<Output = sqlx::Result<Guarded>> + Send;

    /// Whether a transaction that has just begun sees the grant of this lease, and so all that was committed before it:
    /// not on a node that is behind the one which granted the lease.
    #[doc(hidden)]
    fn sees_grant(
        _connection: &mut Self::Connection,
        _lease: &LeaseKey,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send {
        async { Ok(true) }
    }

    /// Sees to it that the transaction can only be rolled back, as far as the database can do that.
    #[doc(hidden)]
    fn doom(connection: &mut Self::Connection) -> impl Future<Output = ()> + Send;

    /// What an error of this database means.
    #[doc(hidden)]
    fn classify(error: &sqlx::Error) -> Fault;
}

/// An attempt to take a lease.
#[derive(Debug, Clone)]
pub struct Claim {
    pub name: Arc<str>,
    pub secret: Secret,
    pub owner: Arc<str>,
    pub ttl: Duration,
    /// With what its process stands in the queue of the row. A claim without it leaves a free lock to nobody.
    pub place: Option<Secret>,
}

/// A lease that is given back.
#[derive(Debug, Clone)]
pub struct Return {
    pub name: Arc<str>,
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
    fn parts(place: Option<&Self>) -> (&str, String) {
        place.map_or(("", String::new()), |place| (place.secret.as_str(), format!("{:08x}", place.listener)))
    }
}

/// What became of returns and claims, in their order.
#[derive(Debug)]
pub struct Exchanged {
    pub returns: Vec<Standing>,
    pub grants: Vec<Option<Grant>>,
}

impl Exchanged {
    /// When something was in the way of all of them, and nothing was done.
    #[cfg(any(feature = "mysql", feature = "sqlite"))]
    fn nothing(returns: &[Return], claims: &[Claim]) -> Self {
        Self { returns: vec![Standing::Busy; returns.len()], grants: vec![None; claims.len()] }
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
    pub cluster: Cluster,
}

/// What a guard found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guarded {
    /// The lock is ours, and stays so to the end of the transaction.
    Ours,
    /// It was ours when the transaction was committed, which it is already: the COMMIT of its handle finds nothing to do.
    Committed,
    /// It is not ours any more.
    NotOurs,
    /// The marked transaction has ended already.
    Ended,
}

impl Guarded {
    fn when(ours: bool) -> Self {
        if ours { Self::Ours } else { Self::NotOurs }
    }
}

/// What kind of server a connection leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Server {
    pub cluster: Cluster,
    /// Whether claims and releases go by statements that answer what they have written: MariaDB's.
    pub answers_writes: bool,
}

impl Default for Server {
    fn default() -> Self {
        Self { cluster: Cluster::SinglePrimary, answers_writes: false }
    }
}

/// How far a row lock reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cluster {
    /// To everybody who may write.
    SinglePrimary,
    /// To the clients of one node only: Galera, multi-primary group replication. What must exclude clients of other
    /// nodes has to be a write, which certification finds.
    MultiPrimary,
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

/// What the row said about a lease of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It was ours, and what was asked for was done.
    Ours,
    /// It is ours, with more of its TTL left than its holder relies on. Whether it was renewed just now was not told.
    StillOurs,
    /// It is ours, but somebody has the row locked: nothing was done, ask again.
    Busy,
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
}

/// Which row to lock.
#[derive(Debug, Clone)]
pub struct RowKey {
    pub name: Arc<str>,
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
        /// Whose secret was there before.
        before: String,
    },
    /// It could not be had: somebody else has it or, when nothing was waited for, there is no such row.
    Busy,
    /// There is no such row, as far as this transaction can see.
    Missing,
    /// The row is there and locked, but the transaction's snapshot is older than what its last holder committed.
    Stale,
    /// The name is used as the other kind of lock.
    WrongKind,
    /// A lease holds it. The row may be locked all the same, which only the end of the transaction undoes.
    Leased,
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
    /// Until `expires`; zero or less when free.
    pub remaining: i64,
    /// The processes that wait: see [`Waiters`].
    pub waiters: String,
}

impl LockRow {
    /// How long the holder has left without another renewal; zero when the lease is free.
    pub(crate) fn remaining(&self) -> Duration {
        Duration::from_micros(u64::try_from(self.remaining).unwrap_or(0))
    }

    /// When it was read, by the database's clock, in microseconds since 1970.
    pub(crate) fn now(&self) -> i64 {
        self.expires.saturating_sub(self.remaining)
    }

    pub(crate) fn into_info(self, name: &str) -> LockInfo {
        let held = self.kind == Kind::Insert && self.remaining > 0;
        LockInfo {
            name: name.to_owned(),
            kind: self.kind,
            owner: self.owner,
            fencing_token: self.fencing_token,
            created_at: timestamp(self.created),
            acquired_at: timestamp(self.acquired),
            held_until: held.then(|| timestamp(self.expires)),
        }
    }
}

fn timestamp(micros: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(micros).unwrap_or_default()
}

/// What an error means for a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Somebody is in the way: nothing was done, and waiting helps. The transaction, if any, goes on.
    Busy,
    /// The transaction was ended to break a deadlock.
    Deadlock,
    /// The transaction's snapshot is too old.
    Serialization,
    /// No such table.
    TableMissing,
    /// The table lacks a column.
    TableDiffers,
    /// The transaction was ended, or can only be rolled back.
    TransactionEnded,
    /// The connection or the server is gone, or not there yet. Whether the statement was carried out is unknown.
    Disconnected,
    /// Anything else.
    Other,
}

/// Whether the way to the database is gone, or not there yet, whichever database it is.
#[cfg_attr(not(any(feature = "postgres", feature = "mysql", feature = "sqlite")), allow(unused_variables))]
pub(crate) fn is_disconnected(error: &sqlx::Error) -> bool {
    let faults: &[Fault] = &[
        #[cfg(feature = "postgres")]
        sqlx::Postgres::classify(error),
        #[cfg(feature = "mysql")]
        sqlx::MySql::classify(error),
        #[cfg(feature = "sqlite")]
        sqlx::Sqlite::classify(error),
    ];
    faults.contains(&Fault::Disconnected)
}

/// For an error after a change that stands: whether it does is not known to whoever hears only of the error.
#[cfg(any(feature = "mysql", feature = "postgres"))]
fn outcome_unknown(error: sqlx::Error) -> sqlx::Error {
    match error {
        sqlx::Error::Io(error) => sqlx::Error::Io(error),
        error => sqlx::Error::Io(std::io::Error::other(error)),
    }
}

/// The leases of a batch as JSON, for databases that have no arrays: `[[7, "secret", 30000000, 1], …]`.
#[cfg(any(feature = "mysql", feature = "sqlite"))]
fn as_json(leases: &[Renewal]) -> String {
    use std::fmt::Write as _;

    let mut json = String::with_capacity(2 + leases.len() * 64);
    json.push('[');
    for (position, Renewal { id, secret, fencing_token, ttl }) in leases.iter().enumerate() {
        let comma = if position > 0 { "," } else { "" };
        let ttl = crate::limits::micros(*ttl);
        let _infallible = write!(json, "{comma}[{id},\"{}\",{ttl},{fencing_token}]", secret.as_str());
    }
    json.push(']');
    json
}

/// For text that stands in a statement: nothing in it needs to be escaped.
#[cfg(any(feature = "mysql", feature = "postgres"))]
fn hexadecimal(text: &str) -> String {
    use std::fmt::Write as _;

    let mut digits = String::with_capacity(text.len() * 2);
    for byte in text.bytes() {
        let _infallible = write!(digits, "{byte:02x}");
    }
    digits
}

/// Puts what a batch statement found, in whatever order, back into the order of the request. What it did not find is no
/// longer ours.
fn in_order(leases: &[Renewal], found: impl IntoIterator<Item = (String, Standing)>) -> Vec<Standing> {
    let found: std::collections::HashMap<String, Standing> = found.into_iter().collect();
    let standing = |lease: &Renewal| found.get(lease.secret.as_str()).copied();
    leases.iter().map(|lease| standing(lease).unwrap_or(Standing::NotOurs)).collect()
}
