//! The fixed cases: each cell is one order of what a holder and a transaction do, which runs at each isolation level.

use std::fmt;
use std::pin::pin;
use std::time::Duration;

use futures_util::future::join_all;
use lock_db::Kind;
use lock_tests::TestDatabase;
use tokio::sync::watch;
use tokio::time::timeout;

use super::data::{committed, make_counter, make_tables};
use super::holder::{End, Holder, Phase, Way};
use super::reader::{Ask, CountedWay, Outcome, Reader, Report, Request, second_name};
use crate::snapshots::level::Level;

/// How long a request may wait. It is answered long before.
const WAIT: Duration = Duration::from_secs(4);
/// For how long a request waits before its holder goes on.
pub const MOMENT: Duration = Duration::from_millis(40);

/// When the transaction takes its snapshot, and asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// The snapshot while the holder has the lock, the request after that.
    Held,
    /// The snapshot before the holder gets the lock, the request after it had it.
    Later,
    /// Both while the holder has the lock.
    Waiting,
}

/// What a holder and a transaction do.
#[derive(Debug, Clone, Copy)]
pub struct Cell {
    pub way: Way,
    pub end: End,
    pub moment: Moment,
    pub ask: Ask,
    /// Whether the transaction reads something before it asks.
    pub reads_first: bool,
    pub is_new_name: bool,
}

/// What must come of the transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    Committed,
    Refused,
    Either,
}

impl Cell {
    pub fn new(way: Way, end: End, moment: Moment, ask: Ask) -> Self {
        Self { way, end, moment, ask, reads_first: true, is_new_name: false }
    }

    /// With every moment, each with every way to ask.
    pub fn all(way: Way, end: End) -> Vec<Self> {
        let mut cells = Vec::new();
        for ask in [Ask::Acquire, Ask::Try, Ask::Several] {
            cells.push(Self::new(way, end, Moment::Held, ask));
            cells.push(Self::new(way, end, Moment::Later, ask));
            if ask != Ask::Try {
                cells.push(Self::new(way, end, Moment::Waiting, ask));
            }
        }
        cells
    }

    /// With every moment, and every way to ask at one of them.
    pub fn some(way: Way, ends: &[End]) -> Vec<Self> {
        let mut cells = Vec::new();
        for &end in ends {
            cells.push(Self::new(way, end, Moment::Held, Ask::Acquire));
            cells.push(Self::new(way, end, Moment::Held, Ask::Try));
            cells.push(Self::new(way, end, Moment::Later, Ask::Several));
            cells.push(Self::new(way, end, Moment::Waiting, Ask::Acquire));
        }
        cells
    }

    pub fn expected<T: TestDatabase>(&self, level: Level) -> Expected {
        if level.has_a_snapshot_for_each_statement() {
            // On InnoDB a transaction is refused when another holder comes between its look and its lock. A
            // lease under which something was verified goes to its next holder by the database.
            let is_free_for_a_moment = self.end == End::Takeover
                || (self.way == Way::VerifiedTransaction && self.end == End::HandOff);
            let may_be_beaten = is_free_for_a_moment && self.moment == Moment::Waiting;
            return if may_be_beaten { Expected::Either } else { Expected::Committed };
        }
        if !self.reads_first {
            // PostgreSQL takes the snapshot before the wait.
            return if self.moment == Moment::Waiting { Expected::Either } else { Expected::Committed };
        }
        if self.holder_commits() && !level.locks_what_it_reads::<T>() {
            Expected::Refused
        } else {
            Expected::Either
        }
    }

    fn holder_commits(&self) -> bool {
        !matches!(self.way, Way::Nothing(_)) && self.end != End::Rollback
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { way, end, moment, ask, reads_first, is_new_name } = self;
        write!(formatter, "{way:?}, {end:?}, {moment:?}, {ask:?}")?;
        if !reads_first {
            write!(formatter, ", lock first")?;
        }
        if *is_new_name {
            write!(formatter, ", new name")?;
        }
        Ok(())
    }
}

/// One cell after the other at one level.
pub struct Lane<'a, T: TestDatabase> {
    pub database: &'a T,
    pub level: Level,
    pub holder: Holder<T::Database>,
    pub reader: Reader<T::Database>,
    number: usize,
    pub problems: Vec<String>,
}

impl<'a, T: CountedWay> Lane<'a, T> {
    pub async fn new(database: &'a T, number: usize, level: Level, connections: u32) -> Self {
        let holder = Holder::new(database).await;
        let reader = Reader::new(database, level, connections).await;
        Self { database, level, holder, reader, number, problems: Vec::new() }
    }

    /// The counter of a cell.
    pub fn id(&self, cell: usize) -> i64 {
        i64::try_from(self.number * 1000 + cell).unwrap()
    }

    /// The lock of a cell.
    pub fn name(&self, cell: usize) -> String {
        format!("{}, cell {cell}", self.level)
    }

    /// Makes the counters, and the names that are not new.
    pub async fn prepare(&self, cells: &[Cell]) {
        for kind in [Kind::Insert, Kind::Row] {
            let mut names = Vec::new();
            for (index, cell) in cells.iter().enumerate().filter(|(_, cell)| cell.way.kind() == kind) {
                make_counter(self.database, self.id(index)).await;
                if !cell.is_new_name {
                    names.extend([self.name(index), second_name(&self.name(index))]);
                }
            }
            if !names.is_empty() {
                self.holder.use_names::<T>(kind, &names).await;
            }
        }
    }

    pub fn request(&self, index: usize, cell: &Cell) -> Request {
        Request {
            kind: cell.way.kind(),
            name: self.name(index),
            id: self.id(index),
            ask: cell.ask,
            wait: WAIT,
            // SQLite itself refuses to write, on top of what others have committed.
            is_refused_for_good: T::NAME != "sqlite" || cell.holder_commits(),
            askers: 1,
        }
    }

    async fn run(&mut self, index: usize, cell: &Cell) {
        let request = self.request(index, cell);
        let Request { name, id, .. } = &request;
        let (way, end, holder, reader) = (cell.way, cell.end, &self.holder, &self.reader);
        let first_read = cell.reads_first.then_some(*id);
        let (phase, phases) = watch::channel(Phase::Holding);
        let (held, transaction) = if cell.moment == Moment::Later {
            let transaction = reader.begin(first_read).await;
            (holder.take(way, end, name).await, transaction)
        } else {
            let held = holder.take(way, end, name).await;
            (held, reader.begin(first_read).await)
        };
        let (report, increments) = if cell.moment == Moment::Waiting {
            let mut running = pin!(reader.run(transaction, &request, phases));
            let early = timeout(MOMENT, &mut running).await.ok();
            tokio::join!(
                async {
                    match early {
                        Some(report) => report,
                        None => running.await,
                    }
                },
                holder.commit_and_end(held, way, end, *id, &phase)
            )
        } else {
            let increments = holder.commit_and_end(held, way, end, *id, &phase).await;
            (reader.run(transaction, &request, phases).await, increments)
        };
        self.judge(cell, &request, increments, report).await;
    }

    /// Checks what came of the transaction, and runs it again when it was refused.
    pub async fn judge(&mut self, cell: &Cell, request: &Request, increments: i64, report: Report) {
        let Report { outcome, mut problems } = report;
        let expected = cell.expected::<T>(self.level);
        match (expected, outcome) {
            (Expected::Committed, Outcome::Refused) => problems.push("it was refused".to_owned()),
            (Expected::Refused, Outcome::Committed) => problems.push("it was not refused".to_owned()),
            _ => {}
        }
        let mut sum = increments + i64::from(outcome == Outcome::Committed);
        let n = committed(self.database, request.id).await;
        if n != sum {
            problems.push(format!("the counter is {n}, after {sum} increments"));
        }
        if outcome == Outcome::Refused && problems.is_empty() {
            match self.reader.run_again(request).await {
                Ok(()) => sum += 1,
                Err(problem) => problems.push(format!("run again: {problem}")),
            }
            let n = committed(self.database, request.id).await;
            if n != sum {
                problems.push(format!("run again: the counter is {n}, after {sum} increments"));
            }
        }
        if !problems.is_empty() {
            self.problems.push(format!("{}: {cell}: {}", self.level, problems.join("; ")));
        }
    }
}

/// Runs each cell at each level.
pub async fn run_cells<T: CountedWay>(database: &T, cells: &[Cell]) {
    at_each_level(database, 1, async |mut lane| {
        lane.prepare(cells).await;
        for (index, cell) in cells.iter().enumerate() {
            lane.run(index, cell).await;
        }
        lane.problems
    })
    .await;
}

/// Runs lanes for all levels at once, and fails when they have found problems.
pub async fn at_each_level<T: CountedWay>(
    database: &T,
    connections: u32,
    run: impl AsyncFn(Lane<'_, T>) -> Vec<String>,
) {
    make_tables(database).await;
    drop(database.locks().await);
    let lanes = Level::all::<T>().iter().enumerate().map(async |(number, &level)| {
        let lane = Lane::new(database, number, level, connections).await;
        run(lane).await
    });
    let problems = join_all(lanes).await.concat();
    assert!(problems.is_empty(), "{} problems on {}:\n{}", problems.len(), T::NAME, problems.join("\n"));
}
