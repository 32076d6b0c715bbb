//! What lock-db needs of a database: one small trait, implemented once a database. SQL and error codes live in those
//! files and nowhere else; nothing here or below knows about waiting, renewing or guards.

use std::collections::HashSet;
use std::future::Future;
use std::time::Duration;
#[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
use std::time::Instant;

pub(crate) use self::fault::{Fault, is_busy, is_disconnected, passes};
pub(crate) use self::server::{Cluster, Location, Server};
pub(crate) use self::types::{
    Call, Claim, Exchanged, Grant, Guarded, LeaseKey, LockRow, Place, Released, Renewal, Renewed, Return,
    RowAttempt, RowClaim, RowKey, Standing, reliable_without_notice,
};
pub(crate) use self::waiters::Waiters;
use crate::Kind;
use crate::name::Name;
use crate::secret::Secret;

#[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
mod columns;
mod fault;
#[cfg(feature = "mysql")]
mod mysql;
#[cfg(feature = "postgres")]
mod postgres;
mod server;
#[cfg(feature = "sqlite")]
mod sqlite;
mod types;
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

/// How many statements a private connection keeps prepared: more than there are.
pub(crate) const PRIVATE_STATEMENTS: usize = 100;

/// A database that can keep locks: `sqlx::Postgres`, `sqlx::MySql` (MySQL 8.0 and MariaDB 10.6 or later) and
/// `sqlx::Sqlite`, each with the cargo feature of its name. Sealed: the methods are no part of the public interface.
///
/// Every method is one step on one connection. On a private one none of them waits for a row that another transaction has
/// locked, and `lock_row` waits no longer than its `slice`.
pub trait LockDatabase: sealed::Sealed + sqlx::Database + Sized {
    /// The folder of the migrations.
    #[doc(hidden)]
    const FOLDER: &'static str;

    /// Whether a transaction has to wait on the server for a second and more before that looks for a deadlock.
    const SEARCHES_LATE: bool = false;
    /// Whether `lock_row` makes a missing row itself, in the caller's transaction. On InnoDB it must not: others would wait there
    /// with locks that end in deadlocks.
    #[doc(hidden)]
    const ROW_IS_MADE_IN_TRANSACTION: bool;

    /// Whether a transaction that has locked a row sees all that was committed, and keeps everybody from committing more: there a free
    /// row need not be settled, and can't be by anybody else once the transaction has written.
    #[doc(hidden)]
    const SETTLES_IN_TRANSACTION: bool = false;

    /// Whether connections with these options can see the same database at all, and this schema of it.
    #[doc(hidden)]
    fn check_options(
        _options: &<Self::Connection as sqlx::Connection>::Options,
        _schema: Option<&str>,
    ) -> Result<(), crate::Error> {
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
    /// The same for one that is to lock a row first.
    #[doc(hidden)]
    const BEGIN_WITH_ROW: &'static str = Self::BEGIN_MARKED;

    /// Whether the `commit_…` methods commit, so that nobody knows the outcome when their answer is lost.
    #[doc(hidden)]
    const COMMITS_WITH_CHECK: bool = false;

    /// Whether a network may lose a connection without a word.
    #[doc(hidden)]
    const IS_REMOTE: bool = true;

    /// The options of a private connection, by those that the application's pool has: it keeps statements prepared, whatever they say.
    #[doc(hidden)]
    fn private_options(
        options: &<Self::Connection as sqlx::Connection>::Options,
    ) -> <Self::Connection as sqlx::Connection>::Options;

    /// Which database they lead to, on whichever host.
    #[doc(hidden)]
    fn database_name(options: &<Self::Connection as sqlx::Connection>::Options) -> String;

    /// Whether a connection with these options keeps statements prepared, or else leaves each one that has a name on the server.
    #[doc(hidden)]
    #[must_use]
    fn keeps_statements(_options: &<Self::Connection as sqlx::Connection>::Options) -> bool {
        true
    }

    /// Sets up a private connection, once, before its first use, and gives its session a number by which
    /// [`end_session`](Self::end_session) finds it. Behind a pooler that shares its sessions among clients it has none.
    #[doc(hidden)]
    fn prepare(
        connection: &mut Self::Connection,
        session: i64,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Ends the session that was given this number, whatever it is doing. `true`: there is none with that number (any more).
    #[doc(hidden)]
    fn end_session(
        _connection: &mut Self::Connection,
        _session: i64,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send {
        async { Ok(true) }
    }

    /// Whether the session with this number is known to do nothing, or to be gone. `own` is the number of the one that asks.
    #[doc(hidden)]
    fn is_idle(
        _connection: &mut Self::Connection,
        _session: i64,
        _own: i64,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send {
        async { Ok(false) }
    }

    /// Finds the table, in this schema or else where the connection looks first, and what kind of server has it.
    #[doc(hidden)]
    fn find_table(
        connection: &mut Self::Connection,
        schema: Option<&str>,
    ) -> impl Future<Output = sqlx::Result<Found>> + Send;

    /// The table, looked for on a connection of the application, where it can be no other one than a private connection made like those of
    /// the pool would find. `None`: that can't be told.
    #[doc(hidden)]
    fn find_only_table(
        _connection: &mut Self::Connection,
        _pool: &sqlx::Pool<Self>,
        _schema: Option<&str>,
    ) -> impl Future<Output = sqlx::Result<Option<Server>>> + Send {
        async { Ok(None) }
    }

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
        _server: &Server,
        _row: i64,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send {
        async { Ok(false) }
    }

    /// Gives it to the next one.
    #[doc(hidden)]
    fn give_baton(
        _connection: &mut Self::Connection,
        _server: &Server,
        _row: i64,
    ) -> impl Future<Output = sqlx::Result<()>> + Send {
        async { Ok(()) }
    }

    /// Makes such a connection, like those of the pool.
    #[doc(hidden)]
    fn connect_listening(
        pool: &sqlx::Pool<Self>,
    ) -> impl Future<Output = sqlx::Result<Self::Listening>> + Send;

    /// Hears the calls to this listener from now on. `false`: the connection is shared by a pooler, and others would hear them.
    #[doc(hidden)]
    fn listen(
        listening: &mut Self::Listening,
        listener: u32,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send;

    /// For other statements.
    #[doc(hidden)]
    fn listening_connection(
        listening: &mut Self::Listening,
    ) -> impl Future<Output = sqlx::Result<&mut Self::Connection>> + Send;

    /// Waits for a call: the lock with this row is free. Cancel safe.
    #[doc(hidden)]
    fn called(listening: &mut Self::Listening) -> impl Future<Output = sqlx::Result<i64>> + Send;

    /// Calls processes that wait for rows which are free now. By itself, after what freed them: it shortens a pause of theirs, and
    /// nothing else depends on it.
    #[doc(hidden)]
    fn call(
        _connection: &mut Self::Connection,
        _calls: &[Call],
    ) -> impl Future<Output = sqlx::Result<()>> + Send {
        async { Ok(()) }
    }

    /// Applies the migrations that are missing, one process at a time, in this schema or else where the connection creates
    /// tables. Leaves no lock behind but on the connection itself, which the caller closes when this failed.
    #[doc(hidden)]
    fn migrate(
        connection: &mut Self::Connection,
        schema: Option<&str>,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Does, without effect, what locks do to the table, so that a missing right shows. Answers what works and could be better.
    #[doc(hidden)]
    fn check(
        connection: &mut Self::Connection,
        server: &Server,
    ) -> impl Future<Output = sqlx::Result<Vec<String>>> + Send;

    /// Whether an error says that a right is missing, and not which one. `check` does.
    #[doc(hidden)]
    #[must_use]
    fn lacks_right(_error: &sqlx::Error) -> bool {
        false
    }

    /// Whose snapshots, transactions or readers keep so many old versions of rows that hot locks get slow, for people; and what this
    /// account may not see of that. By the statistics of the server alone.
    #[doc(hidden)]
    fn old_snapshots(
        connection: &mut Self::Connection,
        server: &Server,
    ) -> impl Future<Output = sqlx::Result<OldSnapshots>> + Send;

    /// Reads the row without locking anything.
    #[doc(hidden)]
    fn look(
        connection: &mut Self::Connection,
        server: &Server,
        name: &str,
    ) -> impl Future<Output = sqlx::Result<Option<LockRow>>> + Send;

    /// Makes the row of a name, free. A row that is there already stays as it is. `false`: an open transaction has made it, and so
    /// holds the lock.
    #[doc(hidden)]
    fn create(
        connection: &mut Self::Connection,
        server: &Server,
        name: &str,
        kind: Kind,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send;

    /// Takes the lease when it is free, and for a fair claim when nobody else is first in the queue, or when it is already ours
    /// by this very claim. What stood first in the queue for this claim is gone then. `None`: not free, or no row.
    #[doc(hidden)]
    fn acquire(
        connection: &mut Self::Connection,
        server: &Server,
        claim: &Claim,
    ) -> impl Future<Output = sqlx::Result<Option<Grant>>> + Send;

    /// [`look`](Self::look) for several names, in one statement. One answer a name, in order.
    #[doc(hidden)]
    fn look_all(
        connection: &mut Self::Connection,
        server: &Server,
        names: &[Name],
    ) -> impl Future<Output = sqlx::Result<Vec<Option<LockRow>>>> + Send;

    /// [`create`](Self::create) for several names, which are in order: all or none. `false`: an open transaction has made the row of one
    /// of them.
    #[doc(hidden)]
    fn create_all(
        connection: &mut Self::Connection,
        server: &Server,
        names: &[Name],
        kind: Kind,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send;

    /// Takes several leases, none of which has a place in a queue, if all of them can be [acquired](Self::acquire): one answer a
    /// claim, in order. Nothing is written when one of them is not free. In as few messages as the server takes.
    ///
    /// What a trigger keeps from being written is missing in the answer, although the others were taken.
    #[doc(hidden)]
    fn acquire_all(
        connection: &mut Self::Connection,
        server: &Server,
        claims: &[Claim],
    ) -> impl Future<Output = sqlx::Result<Vec<Option<Grant>>>> + Send;

    /// Tells the holders of leases that have run out, or nearly so, that they will be taken: see [`LockRow::notice_is_due`]. A deadline
    /// that lies too far ahead, because the clock was set back, is drawn in to a TTL from now instead. Answers for how many of
    /// the names that was done: not where nothing of this was to be done, or another transaction has the row locked.
    #[doc(hidden)]
    fn give_notice(
        connection: &mut Self::Connection,
        server: &Server,
        names: &[Name],
    ) -> impl Future<Output = sqlx::Result<u64>> + Send;

    /// Makes a free row [settled](LockRow::is_settled), unless another transaction has it locked: a guarded transaction of the
    /// last holder, say. `false`: not.
    #[doc(hidden)]
    fn settle(
        connection: &mut Self::Connection,
        server: &Server,
        name: &str,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send;

    /// Makes the row of a lease tell that it went to another holder, to transactions whose snapshot is not older: see
    /// [`LeaseKey::mark`]. `false`: it is not ours, or another transaction has the row locked. Where old snapshots can't write
    /// there is nothing to do.
    #[doc(hidden)]
    fn mark(
        _connection: &mut Self::Connection,
        _lease: &LeaseKey,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send {
        async { Ok(true) }
    }

    /// Whether another transaction has the row of a name locked: by trying to lock it, without waiting.
    #[doc(hidden)]
    fn probe(
        connection: &mut Self::Connection,
        server: &Server,
        name: &str,
    ) -> impl Future<Output = sqlx::Result<Probe>> + Send;

    /// Those of several names whose rows could be locked, without waiting: a first look for the one that [`probe`](Self::probe)
    /// tells exactly.
    #[doc(hidden)]
    fn unlocked(
        connection: &mut Self::Connection,
        server: &Server,
        names: &[Name],
    ) -> impl Future<Output = sqlx::Result<HashSet<String>>> + Send;

    /// The statement that begins a transaction on a private connection, such that the server ends it soon when it hears
    /// nothing more of us.
    #[doc(hidden)]
    const BEGIN_SHORT: &'static str;
    /// Moves the deadlines of these leases forward, in one statement. One answer a lease, in order; and when what was not renewed was
    /// looked at, if that was later than this began.
    #[doc(hidden)]
    fn renew(
        connection: &mut Self::Connection,
        server: &Server,
        leases: &[Renewal],
    ) -> impl Future<Output = sqlx::Result<Renewed>> + Send;

    /// Frees the lease if it is still ours. `Standing::Ours` means that it was, and is free now.
    #[doc(hidden)]
    fn release(
        connection: &mut Self::Connection,
        server: &Server,
        lease: &Return,
    ) -> impl Future<Output = sqlx::Result<Released>> + Send;

    /// Gives the lease up, while nobody else can have the lock before `at_least` has passed since it was granted. The row
    /// has no owner's secret from then on, so that a renewal that is still under way does not find it.
    #[doc(hidden)]
    fn release_later(
        connection: &mut Self::Connection,
        server: &Server,
        name: &str,
        secret: &Secret,
        at_least: Duration,
    ) -> impl Future<Output = sqlx::Result<Standing>> + Send;

    /// Gives back and takes what several callers asked for, in as few messages as the database allows, as if each had
    /// come alone. No name stands in it twice.
    #[doc(hidden)]
    fn exchange(
        connection: &mut Self::Connection,
        server: &Server,
        returns: &[Return],
        claims: &[Claim],
    ) -> impl Future<Output = sqlx::Result<Exchanged>> + Send;

    /// Takes a place at the end of the queue of a name, if there is room, and none of ours yet. `false`: not, or another
    /// transaction has the row locked.
    #[doc(hidden)]
    fn stand(
        connection: &mut Self::Connection,
        server: &Server,
        name: &str,
        place: &Place,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send;

    /// Writes the queue of a name, if it still is what it was `before`. `false`: it is not, or another transaction has the row
    /// locked.
    #[doc(hidden)]
    fn set_waiters(
        connection: &mut Self::Connection,
        server: &Server,
        name: &str,
        before: &str,
        after: &str,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send;

    /// Takes the place of this secret out of the queue of a name, unless another transaction has the row locked.
    #[doc(hidden)]
    fn remove_waiter(
        connection: &mut Self::Connection,
        server: &Server,
        name: &str,
        secret: &Secret,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Whether a lock of a lease is to be waited for on a private connection before the transaction touches its row: unless the
    /// transaction sees at each statement what others have committed. Nothing that this sends fixes the transaction's
    /// snapshot.
    #[doc(hidden)]
    fn waits_outside(_transaction: &mut Self::Connection) -> impl Future<Output = sqlx::Result<bool>> + Send {
        async { Ok(true) }
    }

    /// Whether the connection leads to the database that has this table, as far as that can be told.
    #[doc(hidden)]
    fn is_here(
        _connection: &mut Self::Connection,
        _server: &Server,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send {
        async { Ok(true) }
    }

    /// Whether the transaction has worked with the table, and so keeps it from being altered: while an ALTER waits for that, private
    /// connections can't reach the table, so the transaction must not wait for them. Where there is no such thing: no.
    #[doc(hidden)]
    fn has_used_table(_connection: &mut Self::Connection) -> impl Future<Output = sqlx::Result<bool>> + Send {
        async { Ok(false) }
    }

    /// The row of a name, as such a transaction sees it, where private connections have to look for it in front of `lock_row`.
    #[doc(hidden)]
    fn find_row(
        _connection: &mut Self::Connection,
        _server: &Server,
        _name: &str,
    ) -> impl Future<Output = sqlx::Result<Option<LockRow>>> + Send {
        async { Ok(None) }
    }

    /// Locks the row of a free lock in the transaction that is open on the connection, and writes it, waiting no longer than `slice`
    /// (zero: not at all). After `Stale`, a deadlock or a serialization failure the transaction can only be rolled back,
    /// whatever its owner sends; after everything else but a broken connection it is as usable as before.
    #[doc(hidden)]
    fn lock_row(
        connection: &mut Self::Connection,
        server: &Server,
        claim: &RowClaim,
        slice: Duration,
    ) -> impl Future<Output = sqlx::Result<RowAttempt>> + Send;

    /// Whether the lock that the transaction has just taken was its own before, by the secret that was `before` in the row.
    /// `None`: perhaps; others see that secret when it was not.
    #[doc(hidden)]
    fn was_its_own(
        _connection: &mut Self::Connection,
        _before: &str,
    ) -> impl Future<Output = sqlx::Result<Option<bool>>> + Send {
        async { Ok(None) }
    }

    /// Sees to it that some transaction is open, so that the rollback of a handle whose own one has ended succeeds.
    #[doc(hidden)]
    fn reopen(_connection: &mut Self::Connection) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// How long a guard waits for a row that another transaction has locked.
    #[doc(hidden)]
    const GUARD_LIMIT: Duration = Duration::from_secs(5);

    /// The last thing in a marked transaction before its COMMIT: is it still the one in which `lock_row` answered with this
    /// token?
    #[doc(hidden)]
    fn commit_locked(
        connection: &mut Self::Connection,
        server: &Server,
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

/// What a private connection found where the table should be.
#[derive(Debug)]
#[doc(hidden)]
pub enum Found {
    Table(Server),
    /// No table of this name.
    Nothing,
    /// A table that lacks this column.
    Differs(&'static str),
    /// A table that can't keep locks, and why.
    Unusable(String),
}

/// What keeps old versions of rows, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[doc(hidden)]
pub struct OldSnapshots {
    pub(crate) found: Option<String>,
    /// What this account may not see.
    pub(crate) unseen: Option<String>,
}

#[cfg(any(feature = "postgres", feature = "mysql"))]
impl OldSnapshots {
    fn unseen(error: &dyn sqlx::error::DatabaseError) -> Self {
        let text = format!("whether an old transaction makes hot locks slow can't be seen: {error}");
        Self { found: None, unseen: Some(text) }
    }
}

/// What a try to lock a row met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// Another transaction has it locked.
    Locked,
    /// It could be locked.
    Free,
    /// There is no such row, or none that this role may lock.
    Nothing,
}

/// A row that was made, locked and written, without anything in the way, and still was not written.
#[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
fn foreign_write() -> sqlx::Error {
    sqlx::Error::Configuration(
        "a row of `distributed_lock` can be made, but writing it has no effect: is there a trigger on the table, or does a \
         policy hide its rows?"
            .into(),
    )
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

/// Names as JSON, for databases that have no arrays: `["6e616d65", …]`.
#[cfg(any(feature = "mysql", feature = "sqlite"))]
fn names_as_json(names: &[Name]) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("\"{}\"", hexadecimal(name))).collect();
    format!("[{}]", names.join(","))
}

/// What was found for names, in whatever order, in the order of the names.
#[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
fn by_name(names: &[Name], found: impl IntoIterator<Item = (Vec<u8>, LockRow)>) -> Vec<Option<LockRow>> {
    let mut found: std::collections::HashMap<_, _> = found.into_iter().collect();
    names.iter().map(|name| found.remove(name.as_bytes())).collect()
}

/// For text that stands in a statement: nothing in it needs to be escaped.
#[cfg(any(feature = "mysql", feature = "postgres", feature = "sqlite"))]
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
#[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
fn in_order(
    leases: &[Renewal],
    found: impl IntoIterator<Item = (String, Standing)>,
    looked: Option<Instant>,
) -> Renewed {
    let found: std::collections::HashMap<String, Standing> = found.into_iter().collect();
    let standing = |lease: &Renewal| found.get(lease.secret.as_str()).copied();
    let standings = leases.iter().map(|lease| standing(lease).unwrap_or(Standing::NotOurs)).collect();
    Renewed { standings, looked }
}
