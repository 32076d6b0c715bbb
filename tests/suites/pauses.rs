//! The promise of the guarded transaction, with real processes: a holder is stopped (SIGSTOP) for longer than its TTL,
//! anywhere in its work, another process takes the lock over, and the first one goes on as if nothing had happened.
//!
//! The places are random. A run that fails says its seed; with `LOCK_DB_TEST_SEED` set to it the same rounds are made
//! again, as far as the machine is as fast.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use lock_db::{Error, Lease, Locks};
use lock_tests::{Backend, Parent, Process, TestDatabase, TestServer, child_roles, for_each_database};
use sqlx::Pool;
use tokio::time::{sleep_until, timeout};

for_each_database! {
    a_stopped_holder_never_commits_after_a_takeover;
    on servers:
    without_the_guard_it_does,
}
child_roles! { player }

const ROUNDS: u64 = 200;
/// Enough to show what goes wrong: about every second one does.
const UNGUARDED_ROUNDS: u64 = 60;

const TTL: Duration = Duration::from_millis(100);
/// Of those who are not stopped.
const LONG_TTL: Duration = Duration::from_secs(30);
/// After which those who got nowhere are taken to wait for the one who is stopped.
const MOMENT: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(20);

const LEVELS: [&str; 3] = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"];
const BUSINESS_ROWS: [i64; 2] = [1, 2];

async fn a_stopped_holder_never_commits_after_a_takeover<T: TestDatabase>(database: &T) {
    let tally = play_rounds(database, true, ROUNDS).await;
    println!("{}, {ROUNDS} rounds:\n{tally}", T::NAME);
    assert_eq!((tally.lost_updates, tally.out_of_order), (0, 0));
    // What was asked was asked often enough.
    assert!(tally.taken_over >= ROUNDS / 10, "{} takeovers while the holder stood", tally.taken_over);
    assert!(tally.refused >= ROUNDS / 20, "{} holders were refused", tally.refused);
    assert!(tally.waited >= ROUNDS / 20, "{} takers had to wait", tally.waited);
}

/// Shows that the rounds find what they look for.
async fn without_the_guard_it_does<T: TestServer>(database: &T) {
    let tally = play_rounds(database, false, UNGUARDED_ROUNDS).await;
    println!("{}, {UNGUARDED_ROUNDS} rounds without the guard:\n{tally}", T::NAME);
    assert!(tally.lost_updates > 0, "no update was lost");
    assert!(tally.out_of_order > 0, "no transaction was late");
}

/// On a server two pairs of processes play at a time, each for a lock and tables of its own: they mostly wait.
async fn play_rounds<T: TestDatabase>(database: &T, guarded: bool, rounds: u64) -> Tally {
    drop(database.locks().await);
    let seed = seed();
    if T::NAME == "sqlite" {
        return Rounds::new(database, 0, guarded, seed).await.play(rounds).await;
    }
    let (mut first, second) = tokio::join!(
        async { Rounds::new(database, 0, guarded, seed).await.play(rounds / 2).await },
        async { Rounds::new(database, 1, guarded, seed).await.play(rounds - rounds / 2).await },
    );
    first.add(second);
    first
}

fn seed() -> u64 {
    match std::env::var("LOCK_DB_TEST_SEED") {
        Ok(seed) => seed.parse().expect("LOCK_DB_TEST_SEED is a number"),
        Err(_) => RandomState::new().hash_one(std::process::id()),
    }
}

/// Where the holder is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Acquired,
    Begun,
    Read,
    Written,
    /// Behind a guard of its own, before the commit.
    Verified,
    /// Some time after it went to commit: before, behind or between guard and commit, or when it was done.
    Committing,
    /// Some time after it was told to begin.
    Anywhere,
}

impl Place {
    const ALL: [Self; 7] = [
        Self::Acquired,
        Self::Begun,
        Self::Read,
        Self::Written,
        Self::Verified,
        Self::Committing,
        Self::Anywhere,
    ];

    /// Whether the holder waits there; else it runs on until it is stopped.
    fn is_exact(self) -> bool {
        !matches!(self, Self::Committing | Self::Anywhere)
    }
}

/// How a transaction is made and committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Guarded,
    GuardedAndReleased,
    /// The caller's own transaction, with `verify_in` as its last statement.
    Verified,
    /// Nothing but the lease protects it.
    Plain,
}

impl Way {
    const ALL: [Self; 4] = [Self::Guarded, Self::GuardedAndReleased, Self::Verified, Self::Plain];
}

/// What a player is told to do: one transaction under the lock, which adds one to a business row.
#[derive(Debug, Clone, Copy)]
struct Part {
    way: Way,
    level: usize,
    row: i64,
    ttl: Duration,
    /// Of a holder; takers are not stopped, but say when they have the lock.
    place: Option<Place>,
}

impl fmt::Display for Part {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { way, level, row, ttl, place } = self;
        write!(formatter, "{way:?} {level} {row} {} {place:?}", ttl.as_millis())
    }
}

impl Part {
    fn parse(line: &str) -> Self {
        let words: Vec<&str> = line.split(' ').collect();
        let [way, level, row, ttl, place] = words[..] else { panic!("no part: {line}") };
        Self {
            way: Way::ALL.into_iter().find(|known| format!("{known:?}") == way).expect("a way"),
            level: level.parse().expect("a number"),
            row: row.parse().expect("a number"),
            ttl: Duration::from_millis(ttl.parse().expect("a number")),
            place: Place::ALL.into_iter().find(|known| format!("{:?}", Some(known)) == place),
        }
    }
}

/// A process that plays parts, of the holder or of the taker.
async fn player<DB: Backend>(mut parent: Parent) {
    let pair = parent.argument(0).to_owned();
    let pool = lock_tests::pool::<DB>(parent.url(), 1).await;
    let locks = Locks::new(pool.clone());
    parent.say("ready");
    while let Some(line) = parent.hear().await {
        let part = Part::parse(&line);
        if DB::NAME != "SQLite" {
            let scope = if DB::NAME == "PostgreSQL" { "CHARACTERISTICS AS TRANSACTION" } else { "TRANSACTION" };
            let set = format!("SET SESSION {scope} ISOLATION LEVEL {}", LEVELS[part.level]);
            DB::run(&mut pool.acquire().await.unwrap(), &set).await.unwrap();
        }
        let report = match locks.insert_lock(&pair).ttl(part.ttl).wait(PATIENCE).acquire().await {
            Ok(lease) => {
                let token = lease.fencing_token();
                if part.place.is_none() {
                    parent.say(Line::Taken { token });
                }
                let mut stage = Stage { parent: &mut parent, pool: &pool, pair: &pair, part, token };
                Line::Ended { token, outcome: stage.play(lease).await }
            }
            Err(error) => Line::Ended { token: 0, outcome: Outcome::Refused(label(&error)) },
        };
        parent.say(report);
    }
    locks.close().await;
}

/// A transaction of a player.
struct Stage<'a, DB: Backend> {
    parent: &'a mut Parent,
    pool: &'a Pool<DB>,
    pair: &'a str,
    part: Part,
    token: i64,
}

impl<DB: Backend> Stage<'_, DB> {
    async fn play(&mut self, lease: Lease<DB>) -> Outcome {
        self.passes(Place::Acquired).await;
        let (lease, outcome) = match self.part.way {
            Way::Guarded | Way::GuardedAndReleased => self.play_guarded(lease).await,
            Way::Verified | Way::Plain => {
                let outcome = self.play_in_own_transaction(&lease).await;
                (Some(lease), outcome)
            }
        };
        if let Some(lease) = lease {
            // It may be lost, and what that means was seen by then.
            let _released = lease.release().await;
        }
        outcome
    }

    async fn play_guarded(&mut self, lease: Lease<DB>) -> (Option<Lease<DB>>, Outcome) {
        let mut transaction = match lease.begin().await {
            Ok(transaction) => transaction,
            Err(error) => return (Some(lease), Outcome::Refused(label(&error))),
        };
        self.passes(Place::Begun).await;
        if let Err(error) = self.work(&mut transaction).await {
            let _rolled_back = transaction.rollback().await;
            return (Some(lease), Outcome::Refused(statement_label(&error)));
        }
        self.passes(Place::Committing).await;
        let (lease, committed) = match self.part.way {
            Way::GuardedAndReleased => (None, lease.commit_and_release(transaction).await),
            _ => (Some(lease), transaction.commit().await),
        };
        let outcome = match committed {
            Ok(()) => Outcome::Committed,
            Err(error @ Error::Database { .. }) => Outcome::Unknown(label(&error)),
            Err(error) => Outcome::Refused(label(&error)),
        };
        (lease, outcome)
    }

    async fn play_in_own_transaction(&mut self, lease: &Lease<DB>) -> Outcome {
        let mut transaction = self.pool.begin().await.unwrap();
        self.passes(Place::Begun).await;
        let mut refused = self.work(&mut transaction).await.err().map(|error| statement_label(&error));
        if refused.is_none() {
            self.passes(Place::Committing).await;
            if self.part.way == Way::Verified {
                refused = lease.verify_in(&mut transaction).await.err().map(|error| label(&error));
            }
        }
        if let Some(refused) = refused {
            let _rolled_back = transaction.rollback().await;
            return Outcome::Refused(refused);
        }
        self.passes(Place::Verified).await;
        match transaction.commit().await {
            Ok(()) => Outcome::Committed,
            Err(error @ sqlx::Error::Database(_)) => Outcome::Refused(statement_label(&error)),
            Err(error) => Outcome::Unknown(error.to_string()),
        }
    }

    /// Reads, adds, writes: what must not be done by two at a time.
    async fn work(&mut self, connection: &mut DB::Connection) -> sqlx::Result<()> {
        let (pair, row, token) = (self.pair, self.part.row, self.token);
        let read = format!("SELECT n FROM business_{pair} WHERE id = {row}");
        let n = DB::find_number(connection, &read).await?.expect("the row is there");
        self.passes(Place::Read).await;
        let write = format!("UPDATE business_{pair} SET n = {} WHERE id = {row}", n + 1);
        DB::run(connection, &write).await?;
        let note = format!("INSERT INTO history_{pair} VALUES ({token}, {row}, {})", n + 1);
        DB::run(connection, &note).await?;
        self.passes(Place::Written).await;
        Ok(())
    }

    async fn passes(&mut self, place: Place) {
        if self.part.place == Some(place) {
            self.parent.say(Line::Here);
            if place.is_exact() {
                self.parent.hear().await;
            }
        }
    }
}

fn label(error: &Error) -> String {
    match error {
        Error::Lost { reason, .. } => format!("Lost({reason:?})"),
        Error::Deadlock { source, .. } => format!("Deadlock ({})", statement_label(source)),
        Error::Serialization { source: Some(source), .. } => {
            format!("Serialization ({})", statement_label(source))
        }
        Error::Database { source, .. } => format!("Database ({})", statement_label(source)),
        other => format!("{other:?}"),
    }
}

fn statement_label(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(error) => {
            format!("sqlx: {} {}", error.code().unwrap_or_default(), error.message())
        }
        other => format!("sqlx: {other}"),
    }
}

/// What a player says.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Line {
    Here,
    Taken { token: i64 },
    Ended { token: i64, outcome: Outcome },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Committed,
    /// Nothing of it may be seen.
    Refused(String),
    /// It may have been committed or not.
    Unknown(String),
}

impl fmt::Display for Line {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here => formatter.write_str("here"),
            Self::Taken { token } => write!(formatter, "taken {token}"),
            Self::Ended { token, outcome: Outcome::Committed } => write!(formatter, "committed {token}"),
            Self::Ended { token, outcome: Outcome::Refused(why) } => {
                write!(formatter, "refused {token} {}", why.replace('\n', " "))
            }
            Self::Ended { token, outcome: Outcome::Unknown(why) } => {
                write!(formatter, "unknown {token} {}", why.replace('\n', " "))
            }
        }
    }
}

impl Line {
    fn parse(line: &str) -> Self {
        let mut words = line.splitn(3, ' ');
        let what = words.next();
        let token = words.next().map_or(0, |token| token.parse().expect("a fencing token"));
        let why = words.next().unwrap_or_default().to_owned();
        match what {
            Some("here") => Self::Here,
            Some("taken") => Self::Taken { token },
            Some("committed") => Self::Ended { token, outcome: Outcome::Committed },
            Some("refused") => Self::Ended { token, outcome: Outcome::Refused(why) },
            Some("unknown") => Self::Ended { token, outcome: Outcome::Unknown(why) },
            _ => panic!("a player said: {line}"),
        }
    }
}

async fn hear(player: &mut Process) -> Line {
    Line::parse(&player.hear().await)
}

async fn hear_within(player: &mut Process, patience: Duration) -> Option<Line> {
    timeout(patience, hear(player)).await.ok()
}

/// What happens in a round.
#[derive(Debug, Clone, Copy)]
struct Plan {
    holder: Part,
    taker: Part,
    place: Place,
    /// How long the holder runs on, where it doesn't wait.
    delay: Duration,
    /// Whether the holder goes on as soon as the taker has the lock, or after the taker's commit.
    race: bool,
}

impl Plan {
    fn random(random: &mut Random, guarded: bool) -> Self {
        let places: &[Place] =
            if guarded { &Place::ALL } else { &[Place::Begun, Place::Read, Place::Written, Place::Committing] };
        let place = random.pick(places);
        let ways: &[Way] = match (guarded, place) {
            (true, Place::Verified) => &[Way::Verified],
            (true, _) => &[Way::Guarded, Way::Guarded, Way::GuardedAndReleased, Way::Verified],
            (false, _) => &[Way::Plain],
        };
        let mut part = |ways: &[Way], ttl, place| Part {
            way: random.pick(ways),
            level: random.below(3),
            row: random.pick(&BUSINESS_ROWS),
            ttl,
            place,
        };
        let all_ways = if guarded { &Way::ALL[..3] } else { ways };
        let (holder, taker) = (part(ways, TTL, Some(place)), part(all_ways, LONG_TTL, None));
        let longest_delay = if place == Place::Anywhere { 8000 } else { 2500 };
        let delay = Duration::from_micros(random.next() % longest_delay);
        Self { holder, taker, place, delay, race: random.below(4) == 0 }
    }
}

/// The rounds of two processes, which take turns at being the one that is stopped.
struct Rounds<'a, T: TestDatabase> {
    database: &'a T,
    observer: <T::Database as sqlx::Database>::Connection,
    pair: usize,
    guarded: bool,
    seed: u64,
    random: Random,
    players: [Process; 2],
    plan: Option<Plan>,
    /// What the players reported, by fencing token.
    reports: BTreeMap<i64, Outcome>,
    /// The fencing tokens of the transactions that were seen.
    seen: BTreeSet<i64>,
    tally: Tally,
}

impl<'a, T: TestDatabase> Rounds<'a, T> {
    async fn new(database: &'a T, pair: usize, guarded: bool, seed: u64) -> Self {
        database.run(&format!("CREATE TABLE business_{pair} (id BIGINT PRIMARY KEY, n BIGINT)")).await;
        for row in BUSINESS_ROWS {
            database.run(&format!("INSERT INTO business_{pair} VALUES ({row}, 0)")).await;
        }
        let history = "(token BIGINT PRIMARY KEY, business BIGINT, n BIGINT)";
        database.run(&format!("CREATE TABLE history_{pair} {history}")).await;
        let mut players =
            [0, 1].map(|_| Process::spawn("player", database.url(), [pair.to_string()]));
        for player in &mut players {
            player.expect("ready").await;
        }
        Self {
            database,
            observer: database.connection().await,
            pair,
            guarded,
            seed,
            random: Random(seed.wrapping_add(pair as u64)),
            players,
            plan: None,
            reports: BTreeMap::new(),
            seen: BTreeSet::new(),
            tally: Tally::default(),
        }
    }

    async fn play(mut self, rounds: u64) -> Tally {
        for _ in 0..rounds {
            self.plan = Some(Plan::random(&mut self.random, self.guarded));
            self.round(self.plan.unwrap()).await;
            self.players.swap(0, 1);
        }
        self.plan = None;
        std::mem::take(&mut self.tally)
    }

    async fn round(&mut self, plan: Plan) {
        let is_locked = self.is_locked_by(&plan.holder, plan.place);
        let [holder, taker] = &mut self.players;
        holder.say(&plan.holder.to_string());
        let mut holders_end = None;
        if plan.place != Place::Anywhere {
            let line = hear(holder).await;
            // Else its lease was gone before it came to the place: a busy machine.
            if line != Line::Here {
                holders_end = Some(line);
            }
        }
        if !plan.place.is_exact() {
            let until = Instant::now() + plan.delay;
            while Instant::now() < until {
                tokio::task::yield_now().await;
            }
        }
        holder.stop();
        let stopped = Instant::now();
        let stands_there = plan.place.is_exact() && holders_end.is_none();

        taker.say(&plan.taker.to_string());
        let must_wait = stands_there && is_locked;
        let can_take = stands_there && !must_wait && T::NAME != "sqlite";
        let taken = hear_within(taker, if can_take { PATIENCE } else { TTL + MOMENT }).await;
        assert!(!must_wait || taken.is_none(), "the holder stood behind its guard: {taken:?}");
        assert!(!can_take || taken.is_some(), "the lock is still not free after {PATIENCE:?}");
        let mut takers_end = None;
        if taken.is_some() && !plan.race {
            takers_end = hear_within(taker, MOMENT).await;
        }
        sleep_until((stopped + TTL + TTL / 10).into()).await;
        let taken_over = taken.is_some();
        if takers_end.is_some() {
            // What the holder commits now, it commits later than what can be seen by now.
            self.look().await;
        }

        let [holder, taker] = &mut self.players;
        if stands_there {
            holder.say("go");
        }
        holder.resume();
        if holders_end.is_none() {
            holders_end = Some(hear(holder).await);
        }
        if taken.is_none() {
            let taken = hear(taker).await;
            assert!(matches!(taken, Line::Taken { .. }), "{taken:?}");
        }
        if takers_end.is_none() {
            takers_end = Some(hear(taker).await);
        }
        self.note(plan, taken_over, holders_end.unwrap(), takers_end.unwrap());
        self.look().await;
        self.check().await;
    }

    /// Whether a holder that stands there keeps every taker off by what it has locked in the database.
    fn is_locked_by(&self, holder: &Part, place: Place) -> bool {
        if !self.guarded {
            return false;
        }
        match place {
            Place::Verified => true,
            // The write lock: a guarded transaction begins with it, others get it when they write.
            Place::Begun | Place::Read => T::NAME == "sqlite" && holder.way != Way::Verified,
            Place::Written => T::NAME == "sqlite",
            Place::Acquired | Place::Committing | Place::Anywhere => false,
        }
    }

    fn note(&mut self, plan: Plan, taken_over: bool, holders_end: Line, takers_end: Line) {
        let tally = &mut self.tally;
        let Line::Ended { token: holders_token, outcome: holders } = holders_end else {
            panic!("the holder said {holders_end:?}");
        };
        let Line::Ended { token: takers_token, outcome: takers } = takers_end else {
            panic!("the taker said {takers_end:?}");
        };
        // Nobody takes its lock, but two transactions may still be in each other's way.
        if let Outcome::Refused(why) | Outcome::Unknown(why) = &takers {
            let is_conflict = ["40001", "40P01", "try restarting transaction", "database is locked"]
                .into_iter()
                .any(|conflict| why.contains(conflict));
            assert!(is_conflict, "the taker was refused: {why}");
        }
        tally.taken_over += u64::from(taken_over);
        tally.refused += u64::from(taken_over && matches!(holders, Outcome::Refused(_)));
        tally.waited += u64::from(!taken_over && holders == Outcome::Committed && takers_token > holders_token);
        let taker = if taken_over { "taken over" } else { "taker waits" };
        let what = format!("{:10?} {taker}, holder {holders:?}, taker {takers:?}", plan.place);
        *tally.rounds.entry(what).or_default() += 1;
        for (token, outcome) in [(holders_token, holders), (takers_token, takers)] {
            if token != 0 {
                assert_eq!(self.reports.insert(token, outcome), None, "{token} was granted twice");
            }
        }
    }

    /// Looks at what was committed since the last time: none of it may be of an earlier grant than what was seen then.
    async fn look(&mut self) {
        let sql = format!("SELECT token FROM history_{} ORDER BY token", self.pair);
        let tokens = T::Database::numbers(&mut self.observer, &sql).await.unwrap();
        let last = self.seen.last().copied().unwrap_or(0);
        for token in tokens {
            if self.seen.insert(token) && token < last {
                self.tally.out_of_order += 1;
                assert!(!self.guarded, "{token} committed after {last}");
            }
        }
    }

    /// Between two rounds.
    async fn check(&mut self) {
        for (token, outcome) in &self.reports {
            match outcome {
                Outcome::Committed => assert!(self.seen.contains(token), "{token} was reported, but not kept"),
                Outcome::Refused(why) => assert!(!self.seen.contains(token), "{token} was kept, but: {why}"),
                Outcome::Unknown(_) => {}
            }
        }
        for token in &self.seen {
            assert!(self.reports.contains_key(token), "{token} was kept, but not reported");
        }
        let sum = self.database.number(&format!("SELECT SUM(n) FROM business_{}", self.pair)).await;
        let kept = i64::try_from(self.seen.len()).unwrap();
        self.tally.lost_updates = u64::try_from(kept - sum).expect("nothing is counted twice");
        self.tally.committed = self.seen.len() as u64;
        if !self.guarded {
            return;
        }
        assert_eq!(sum, kept, "an update was lost");
        for row in BUSINESS_ROWS {
            let sql = format!("SELECT token FROM history_{} WHERE business = {row} ORDER BY n", self.pair);
            let tokens = T::Database::numbers(&mut self.observer, &sql).await.unwrap();
            assert!(tokens.is_sorted_by(|one, next| one < next), "fencing tokens went back: {tokens:?}");
        }
    }
}

impl<T: TestDatabase> Drop for Rounds<'_, T> {
    fn drop(&mut self) {
        if let Some(plan) = self.plan {
            let round = self.reports.len() / 2 + 1;
            eprintln!("LOCK_DB_TEST_SEED={} pair {}, about round {round}: {plan:?}", self.seed, self.pair);
        }
    }
}

#[derive(Debug, Default)]
struct Tally {
    /// What happened, and how often.
    rounds: BTreeMap<String, u64>,
    committed: u64,
    /// The lock was taken over while the holder stood.
    taken_over: u64,
    /// … and the holder did not commit.
    refused: u64,
    /// The taker got the lock after the holder was continued, and both committed.
    waited: u64,
    lost_updates: u64,
    out_of_order: u64,
}

impl Tally {
    fn add(&mut self, other: Self) {
        for (what, times) in other.rounds {
            *self.rounds.entry(what).or_default() += times;
        }
        self.committed += other.committed;
        self.taken_over += other.taken_over;
        self.refused += other.refused;
        self.waited += other.waited;
        self.lost_updates += other.lost_updates;
        self.out_of_order += other.out_of_order;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (what, times) in &self.rounds {
            writeln!(formatter, "{times:5} {what}")?;
        }
        let Self { committed, taken_over, refused, waited, lost_updates, out_of_order, .. } = self;
        write!(
            formatter,
            "committed {committed}, taken over {taken_over}, of these refused {refused}; waited {waited}; \
             lost updates {lost_updates}, out of order {out_of_order}"
        )
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap_or(0)
    }

    fn pick<V: Copy>(&mut self, values: &[V]) -> V {
        values[self.below(values.len())]
    }
}
