//! The guarantee of the guarded transaction, with real processes. A holder is stopped (SIGSTOP) for
//! longer than its TTL, anywhere in its work. Another process takes the lock over, and the first
//! one then continues as if nothing had happened.
//!
//! The places are random. A failed run prints its seed. With `LOCK_DB_TEST_SEED` set to it the same
//! rounds are played again, as far as the speed of the machine is the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use lock_tests::{Backend, Process, Random, TestDatabase, TestServer, note, seed};
use tokio::time::{sleep_until, timeout};

use self::player::{LEVELS, Line, Outcome, Part, Place, Way, player};

mod player;

lock_tests::cases! {
    on every database:
    a_stopped_holder_never_commits_after_a_takeover,
    a_stopped_reader_causes_no_false_grants;

    on every server:
    without_the_guard_a_stopped_holder_does_commit,
}

lock_tests::child_roles! { player }

const ROUNDS: u64 = 200;
/// Enough to show what goes wrong: about every second one does.
const UNGUARDED_ROUNDS: u64 = 60;

const TTL: Duration = Duration::from_millis(100);
/// Of processes that are not stopped.
const LONG_TTL: Duration = Duration::from_secs(30);
/// After this time without progress a process is taken to wait for the one that is stopped.
const MOMENT: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(20);

const BUSINESS_ROWS: [i64; 2] = [1, 2];

async fn a_stopped_holder_never_commits_after_a_takeover<T: TestDatabase>(database: &T) {
    let tally = play_rounds(database, true, ROUNDS).await;
    note(format_args!("{}, {ROUNDS} rounds:\n{tally}", T::NAME));
    assert_eq!((tally.lost_updates, tally.out_of_order), (0, 0));
    // Each situation occurred often enough.
    assert!(tally.taken_over >= ROUNDS / 10, "{} takeovers while the holder stood", tally.taken_over);
    assert!(tally.refused >= ROUNDS / 20, "{} holders were refused", tally.refused);
    assert!(T::NAME == "postgres" || tally.waited >= ROUNDS / 20, "{} takers had to wait", tally.waited);
}

/// Shows that the rounds find what they look for.
async fn without_the_guard_a_stopped_holder_does_commit<T: TestServer>(database: &T) {
    let tally = play_rounds(database, false, UNGUARDED_ROUNDS).await;
    note(format_args!("{}, {UNGUARDED_ROUNDS} rounds without the guard:\n{tally}", T::NAME));
    assert!(tally.lost_updates > 0, "no update was lost");
    assert!(tally.out_of_order > 0, "no transaction was late");
}

/// Found by these rounds. On SQLite in its default journal mode a reader holds off every commit,
/// and a grant that can't be committed is not given.
async fn a_stopped_reader_causes_no_false_grants<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, database.locks().await);
    locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    let mut reader = database.pool(1).await.begin().await.unwrap();
    T::Database::find_number(&mut reader, "SELECT COUNT(*) FROM distributed_lock").await.unwrap();

    let granted = locks.insert_lock("a").ttl(LONG_TTL).wait(Duration::from_millis(500)).acquire().await;
    assert_eq!(granted.is_ok(), T::NAME != "sqlite", "{granted:?}");
    reader.rollback().await.unwrap();
    let lease = match granted {
        Ok(lease) => lease,
        Err(_) => locks.insert_lock("a").ttl(LONG_TTL).wait(PATIENCE).acquire().await.unwrap(),
    };
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_none());
    lease.release().await.unwrap();
}

/// Two pairs of processes play at a time, each in a database of its own: they mostly wait.
async fn play_rounds<T: TestDatabase>(database: &T, guarded: bool, rounds: u64) -> Tally {
    let seed = seed();
    let other = T::create().await;
    let (mut first, second) =
        tokio::join!(async { Rounds::new(database, 0, guarded, seed).await.play(rounds / 2).await }, async {
            Rounds::new(&other, 1, guarded, seed).await.play(rounds - rounds / 2).await
        },);
    first.add(second);
    first
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
    /// How long the holder continues before it is stopped. Where it waits, only its watchdog runs.
    delay: Duration,
    /// Whether the holder continues as soon as the taker has the lock, or after the taker's commit.
    race: bool,
}

impl Plan {
    fn random(random: &mut Random, guarded: bool) -> Self {
        let places: &[Place] = if guarded {
            &Place::ALL
        } else {
            &[Place::Begun, Place::Read, Place::Written, Place::Committing]
        };
        let place = random.pick(places);
        let ways: &[Way] = match (guarded, place) {
            (true, Place::Verified) => &[Way::Verified],
            (true, _) => &[Way::Guarded, Way::Guarded, Way::GuardedAndReleased, Way::Verified],
            (false, _) => &[Way::Plain],
        };
        let mut part = |ways: &[Way], ttl, place| Part {
            way: random.pick(ways),
            // Without a guard, at the level at which the database itself refuses nothing.
            level: if guarded { random.below(LEVELS.len()) } else { 0 },
            row: random.pick(&BUSINESS_ROWS),
            ttl,
            place,
        };
        let all_ways = if guarded { &Way::ALL[..3] } else { ways };
        let (holder, taker) = (part(ways, TTL, Some(place)), part(all_ways, LONG_TTL, None));
        let longest_delay = match place {
            Place::Committing => 2500,
            Place::Anywhere => 4000,
            // Long enough for a renewal.
            _ => random.pick(&[1, 50_000]),
        };
        let delay = Duration::from_micros(random.next() % longest_delay);
        Self { holder, taker, place, delay, race: random.below(4) == 0 }
    }
}

/// The rounds of two processes, which take turns at being stopped.
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
        drop(database.locks().await);
        database.run("CREATE TABLE business (id BIGINT PRIMARY KEY, n BIGINT)").await;
        for row in BUSINESS_ROWS {
            database.run(&format!("INSERT INTO business VALUES ({row}, 0)")).await;
        }
        database.run("CREATE TABLE history (token BIGINT PRIMARY KEY, business BIGINT, n BIGINT)").await;
        let mut players = [0, 1].map(|_| Process::spawn("player", database.url(), [""; 0]));
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
            // Otherwise its lease was lost before it came to the place, on a busy machine.
            if line != Line::Here {
                holders_end = Some(line);
            }
        }
        let until = Instant::now() + plan.delay;
        while Instant::now() < until {
            // More exact than a sleep, and lets the other pair continue.
            tokio::task::yield_now().await;
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
            // What the holder commits from here on is later than what can be seen now.
            self.look().await;
        }

        let [holder, taker] = &mut self.players;
        // A line that arrives now was sent before the holder was stopped.
        if holders_end.is_none() {
            holders_end = hear_within(holder, Duration::ZERO).await;
        }
        let was_done = holders_end.is_some();
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
        let when = match (was_done, taken_over) {
            (true, _) => When::Done,
            (false, true) => When::TakenOver,
            (false, false) => When::Waited,
        };
        self.note(plan.place, when, holders_end.unwrap(), takers_end.unwrap());
        self.look().await;
        self.check().await;
    }

    /// Whether a holder that is stopped there keeps every taker off by what it has locked in the
    /// database.
    fn is_locked_by(&self, holder: &Part, place: Place) -> bool {
        if !self.guarded {
            return false;
        }
        match place {
            // PostgreSQL ends a verified transaction that is idle for a TTL.
            Place::Verified => T::NAME != "postgres",
            // The write lock: a guarded transaction begins with it, others get it when they write.
            Place::Begun | Place::Read => T::NAME == "sqlite" && holder.way != Way::Verified,
            Place::Written => T::NAME == "sqlite",
            Place::Acquired | Place::Committing | Place::Anywhere => false,
        }
    }

    fn note(&mut self, place: Place, when: When, holders_end: Line, takers_end: Line) {
        let tally = &mut self.tally;
        let Line::Ended { token: holders_token, outcome: holders } = holders_end else {
            panic!("the holder said {holders_end:?}");
        };
        let Line::Ended { token: takers_token, outcome: takers } = takers_end else {
            panic!("the taker said {takers_end:?}");
        };
        // Its lock is not taken, but two transactions may still conflict.
        if let Outcome::Refused(why) | Outcome::Unknown(why) = &takers {
            let is_conflict = ["40001", "40P01", "try restarting transaction", "database is locked"]
                .into_iter()
                .any(|conflict| why.contains(conflict));
            assert!(is_conflict, "the taker was refused: {why}");
        }
        tally.taken_over += u64::from(when == When::TakenOver);
        tally.refused += u64::from(when == When::TakenOver && matches!(holders, Outcome::Refused(_)));
        tally.waited += u64::from(when == When::Waited && holders == Outcome::Committed);
        let what = format!("{place:10?} {when:9?} holder {holders:?}, taker {takers:?}");
        *tally.rounds.entry(what).or_default() += 1;
        for (token, outcome) in [(holders_token, holders), (takers_token, takers)] {
            if token != 0 {
                assert_eq!(self.reports.insert(token, outcome), None, "{token} was granted twice");
            }
        }
    }

    /// Reads what was committed since the last time. None of it may be of an earlier grant than
    /// what was seen then.
    async fn look(&mut self) {
        let sql = "SELECT token FROM history ORDER BY token";
        let tokens = T::Database::numbers(&mut self.observer, sql).await.unwrap();
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
                Outcome::Committed => {
                    assert!(self.seen.contains(token), "{token} was reported, but not kept");
                }
                Outcome::Refused(why) => assert!(!self.seen.contains(token), "{token} was kept, but: {why}"),
                Outcome::Unknown(_) => {}
            }
        }
        for token in &self.seen {
            assert!(self.reports.contains_key(token), "{token} was kept, but not reported");
        }
        let sum = self.database.number("SELECT SUM(n) FROM business").await;
        let kept = i64::try_from(self.seen.len()).unwrap();
        self.tally.lost_updates = u64::try_from(kept - sum).expect("nothing is counted twice");
        self.tally.committed = self.seen.len() as u64;
        if !self.guarded {
            return;
        }
        assert_eq!(sum, kept, "an update was lost");
        for row in BUSINESS_ROWS {
            let sql = format!("SELECT token FROM history WHERE business = {row} ORDER BY n");
            let tokens = T::Database::numbers(&mut self.observer, &sql).await.unwrap();
            assert!(tokens.is_sorted_by(|one, next| one < next), "fencing tokens went back: {tokens:?}");
        }
    }
}

impl<T: TestDatabase> Drop for Rounds<'_, T> {
    fn drop(&mut self) {
        if let Some(plan) = self.plan {
            let round = self.reports.len() / 2 + 1;
            note(format_args!(
                "LOCK_DB_TEST_SEED={} pair {}, about round {round}: {plan:?}",
                self.seed, self.pair
            ));
        }
    }
}

/// How the taker got the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// The holder had ended before it was stopped.
    Done,
    /// While the holder was stopped.
    TakenOver,
    /// After the holder was continued.
    Waited,
}

#[derive(Debug, Default)]
struct Tally {
    /// What happened, and how often.
    rounds: BTreeMap<String, u64>,
    committed: u64,
    /// The lock was taken over while the holder was stopped.
    taken_over: u64,
    /// The same, and the holder did not commit.
    refused: u64,
    /// The taker got the lock after the holder was continued and had committed.
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
