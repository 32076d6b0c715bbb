//! The transaction that takes its snapshot, asks for the lock, and works under it.

use std::time::{Duration, Instant};

use lock_db::{Error, Kind, Locks};
use lock_tests::{Backend, Direction, Proxy, Server, ServerKind, SqliteFile, TestDatabase, TestServer};
use sqlx::{Pool, Transaction};
use tokio::sync::watch;

use super::data::{read, read_notes, write};
use super::holder::Phase;
use crate::snapshots::level::{Level, begin};

/// How many messages a second a request that waits may send. One that looks every 100 ms sends 10.
const MESSAGES_A_SECOND: f64 = 50.0;
/// What a request sends whether it waits or not, for several names and with a connection that it makes first.
const MESSAGES_OF_A_REQUEST: f64 = 60.0;
/// Within what time a request is answered that need not wait.
const AT_ONCE: Duration = Duration::from_secs(3);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(50);

/// How the lock is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// `acquire_in`.
    Acquire,
    /// `try_acquire_in`, until it is answered with something else than that the lock is taken.
    Try,
    /// `acquire_in` of this name together with another one.
    Several,
}

/// The name that is taken together with this one.
pub fn second_name(name: &str) -> String {
    format!("{name} and another")
}

/// What a transaction asks for.
#[derive(Debug, Clone)]
pub struct Request {
    pub kind: Kind,
    pub name: String,
    /// Of the counter.
    pub id: i64,
    pub ask: Ask,
    pub wait: Duration,
    /// Whether a transaction that was refused can't write any more.
    pub is_refused_for_good: bool,
    /// How many transactions of this process ask at the same time, itself included.
    pub askers: usize,
}

/// What came of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It had the lock, and has incremented the counter.
    Committed,
    /// It was answered with [`Error::Serialization`].
    Refused,
    /// It has changed nothing, for another reason.
    Failed,
}

/// What came of it, and what must not be.
#[derive(Debug)]
pub struct Report {
    pub outcome: Outcome,
    pub problems: Vec<String>,
}

/// A way to the database on which messages are counted, where there is a network.
pub trait CountedWay: TestDatabase {
    fn counted_way(&self) -> (String, Option<Proxy>);
}

impl<K: ServerKind> CountedWay for Server<K> {
    fn counted_way(&self) -> (String, Option<Proxy>) {
        let proxy = self.proxy();
        (self.url_by(proxy.address()), Some(proxy))
    }
}

impl CountedWay for SqliteFile {
    fn counted_way(&self) -> (String, Option<Proxy>) {
        (self.url().to_owned(), None)
    }
}

/// A process whose transactions take locks, at one level.
pub struct Reader<DB: Backend> {
    locks: Locks<DB>,
    pool: Pool<DB>,
    level: Level,
    locks_what_it_reads: bool,
    proxy: Option<Proxy>,
}

impl<DB: Backend> Reader<DB> {
    pub async fn new<T: CountedWay<Database = DB>>(database: &T, level: Level, connections: u32) -> Self {
        let (url, proxy) = database.counted_way();
        let pool = lock_tests::pool::<DB>(&url, connections).await;
        let locks = Locks::new(pool.clone());
        // Connects.
        locks.check().await.unwrap();
        let locks_what_it_reads = level.locks_what_it_reads::<T>();
        Self { locks, pool, level, locks_what_it_reads, proxy }
    }

    /// Begins a transaction that reads the counter, or nothing.
    pub async fn begin(&self, id: Option<i64>) -> Transaction<'static, DB> {
        let mut transaction = begin(&self.pool, self.level).await.unwrap();
        match id {
            None => {}
            // The counter itself would stay locked, and the holder could not increment it.
            Some(_) if self.locks_what_it_reads => read_notes::<DB>(&mut transaction).await.unwrap(),
            Some(id) => drop(read::<DB>(&mut transaction, id).await.unwrap()),
        }
        transaction
    }

    /// Asks for the lock, increments the counter under it, and commits.
    ///
    /// When it is refused for good, it goes on all the same: it must not be able to commit.
    pub async fn run(
        &self,
        mut transaction: Transaction<'static, DB>,
        request: &Request,
        mut holder: watch::Receiver<Phase>,
    ) -> Report {
        let (asked, sent) = (Instant::now(), self.messages());
        let holder_had_ended = *holder.borrow() == Phase::Ended;
        let answer = self.ask(&mut transaction, request).await;
        let (took, sent) = (asked.elapsed(), self.messages() - sent);
        let mut problems = Vec::new();
        if request.ask != Ask::Try && is_spin(sent, took, request.askers) {
            problems.push(format!("{sent} messages within {took:.1?}"));
        }
        let outcome = match answer {
            Ok(()) => {
                if *holder.borrow() == Phase::Holding {
                    problems.push("it has the lock while the holder has it".to_owned());
                }
                match increment_and_commit(transaction, request.id).await {
                    Ok(()) => Outcome::Committed,
                    Err(error) => {
                        problems.push(format!("it had the lock, but: {error}"));
                        Outcome::Failed
                    }
                }
            }
            Err(Error::Serialization { .. }) => {
                if holder_had_ended && took > AT_ONCE && request.wait > AT_ONCE {
                    problems.push(format!("it was refused only after {took:.1?}"));
                }
                if DB::NAME == "SQLite" {
                    // There it is the holder's commit that keeps it from writing.
                    holder.wait_for(|phase| *phase == Phase::Ended).await.unwrap();
                }
                if !request.is_refused_for_good {
                    drop(transaction.rollback().await);
                } else if swallow_refusal(transaction, request.id).await {
                    problems.push("it has written and committed after it was refused".to_owned());
                }
                Outcome::Refused
            }
            // Somebody writes, and it is not known whether that is the holder.
            Err(error @ (Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. }))
                if DB::NAME == "SQLite" && error.is_retryable() =>
            {
                drop(transaction.rollback().await);
                Outcome::Refused
            }
            Err(error) => {
                problems.push(format!("{error:?}"));
                drop(transaction.rollback().await);
                Outcome::Failed
            }
        };
        Report { outcome, problems }
    }

    /// Run again from its beginning, it gets the lock: at once, or at the second time.
    pub async fn run_again(&self, request: &Request) -> Result<(), String> {
        let (_no_holder, holder) = watch::channel(Phase::Ended);
        for _ in 0..2 {
            let report = self.run(self.begin(Some(request.id)).await, request, holder.clone()).await;
            if !report.problems.is_empty() {
                return Err(report.problems.join(", "));
            }
            if report.outcome == Outcome::Committed {
                return Ok(());
            }
        }
        Err("it was refused twice".to_owned())
    }

    async fn ask(&self, transaction: &mut Transaction<'static, DB>, request: &Request) -> Result<(), Error> {
        let Request { kind, name, ask, wait, .. } = request;
        let names = [name.clone(), second_name(name)];
        match (kind, ask) {
            (_, Ask::Try) => self.try_until_answered(transaction, request).await,
            (Kind::Row, Ask::Acquire) => {
                self.locks.row_lock(name).wait(*wait).acquire_in(transaction).await.map(drop)
            }
            (Kind::Row, Ask::Several) => {
                self.locks.row_locks(names).wait(*wait).acquire_in(transaction).await.map(drop)
            }
            (_, Ask::Acquire) => {
                self.locks.insert_lock(name).wait(*wait).acquire_in(transaction).await.map(drop)
            }
            (_, Ask::Several) => {
                self.locks.insert_locks(names).wait(*wait).acquire_in(transaction).await.map(drop)
            }
        }
    }

    async fn try_until_answered(
        &self,
        transaction: &mut Transaction<'static, DB>,
        Request { kind, name, wait, .. }: &Request,
    ) -> Result<(), Error> {
        let started = Instant::now();
        loop {
            let tried = if *kind == Kind::Row {
                self.locks.row_lock(name).try_acquire_in(transaction).await?
            } else {
                self.locks.insert_lock(name).try_acquire_in(transaction).await?
            };
            if tried.is_some() {
                return Ok(());
            }
            if started.elapsed() > *wait {
                // Which says that the time is over.
                return if *kind == Kind::Row {
                    self.locks.row_lock(name).wait(Duration::ZERO).acquire_in(transaction).await.map(drop)
                } else {
                    self.locks.insert_lock(name).wait(Duration::ZERO).acquire_in(transaction).await.map(drop)
                };
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// How many messages this process has sent.
    fn messages(&self) -> usize {
        self.proxy.as_ref().map_or(0, |proxy| proxy.reads(Direction::ToServer))
    }
}

fn is_spin(messages: usize, time: Duration, askers: usize) -> bool {
    let allowed = MESSAGES_OF_A_REQUEST + MESSAGES_A_SECOND * time.as_secs_f64();
    messages as f64 > allowed * askers as f64
}

async fn increment_and_commit<DB: Backend>(
    mut transaction: Transaction<'static, DB>,
    id: i64,
) -> sqlx::Result<()> {
    let n = read::<DB>(&mut transaction, id).await?;
    write::<DB>(&mut transaction, id, n + 1).await?;
    transaction.commit().await
}

/// Goes on after a refusal, as code does that swallows the error. Whether everything succeeded.
async fn swallow_refusal<DB: Backend>(mut transaction: Transaction<'static, DB>, id: i64) -> bool {
    let written = write::<DB>(&mut transaction, id, 1000).await;
    let committed = transaction.commit().await;
    written.is_ok() && committed.is_ok()
}
