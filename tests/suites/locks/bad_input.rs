//! Bad input. For any name and durations, a lock is taken or refused before any SQL, and the result
//! is the same on every database.

use std::time::Duration;

use lock_db::{Error, Locks};
use lock_tests::{Backend, TestDatabase};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

lock_tests::cases! {
    on every database:
    any_name_is_taken_or_refused,
    any_name_of_a_row_lock_is_taken_or_refused,
    any_duration_is_taken_or_refused,
    what_is_refused_asks_no_database,
}

/// The longest name, in bytes.
const MAX_BYTES: usize = 255;
const SHORTEST_TTL: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_hours(365 * 24);

/// Text that collations, quoting, LIKE, trimming and transfer encodings treat differently.
const PIECES: &[&str] = &[
    "",
    "\0",
    "'",
    "''",
    "\"",
    "`",
    "\\",
    "\\'",
    "%",
    "_",
    "[a-z]",
    "$1",
    "?",
    ":a",
    "{}",
    ";--",
    "/*",
    "*/",
    " ",
    "  ",
    "\t",
    "\n",
    "\r",
    "\u{1a}",
    "\u{7f}",
    "\u{a0}",
    "\u{85}",
    // Next to the surrogates, which are not characters, at the ends of the planes, and
    // non-characters.
    "\u{d7ff}",
    "\u{e000}",
    "\u{fffd}",
    "\u{feff}",
    "\u{fffe}",
    "\u{ffff}",
    "\u{10000}",
    "\u{10ffff}",
    // Combining, right-to-left, invisible, and characters that fold into something else.
    "e\u{301}",
    "é",
    "\u{301}",
    "\u{202e}",
    "אב",
    "مرحبا",
    "\u{200b}",
    "\u{200d}",
    "👩\u{200d}👩\u{200d}👧",
    "ß",
    "ſ",
    "İ",
    "ı",
    "ﬁ",
    "Ａ",
    "A",
    "a",
    "NULL",
    "0",
];

fn names() -> impl Strategy<Value = String> {
    let pieces = || proptest::sample::select(PIECES);
    prop_oneof![
        3 => proptest::collection::vec(any::<char>(), 0..40).prop_map(String::from_iter),
        4 => proptest::collection::vec(pieces(), 0..6).prop_map(|pieces| pieces.concat()),
        // Around the limit, which counts bytes.
        2 => (pieces(), 240..270_usize).prop_map(|(piece, bytes)| {
            let mut name = piece.repeat(bytes / piece.len().max(1));
            name.extend(std::iter::repeat_n('x', bytes.saturating_sub(name.len())));
            name
        }),
        1 => (1_000..100_000_usize).prop_map(|letters| "ä".repeat(letters)),
    ]
}

fn durations() -> impl Strategy<Value = Duration> {
    let one = Duration::from_nanos(1);
    let edges = vec![
        Duration::ZERO,
        one,
        SHORTEST_TTL - one,
        SHORTEST_TTL,
        SHORTEST_TTL + one,
        LONGEST - one,
        LONGEST,
        LONGEST + one,
        Duration::from_micros(u64::MAX),
        Duration::from_secs(i64::MAX as u64),
        Duration::from_secs(u64::MAX),
        Duration::MAX - one,
        Duration::MAX,
    ];
    prop_oneof![
        2 => proptest::sample::select(edges),
        1 => any::<Duration>(),
        2 => (0..400_u64).prop_map(Duration::from_millis),
        1 => (0..1_000_000_000_000_u64).prop_map(Duration::from_micros),
    ]
}

/// The same samples on every database and in every run, so that the results can be compared.
/// proptest calls that deterministic.
fn samples<S: Strategy>(strategy: &S, count: usize) -> Vec<S::Value> {
    let mut runner = TestRunner::deterministic();
    (0..count).map(|_| strategy.new_tree(&mut runner).expect("makes a value").current()).collect()
}

/// The result must be the same on all databases, so it is compared with a function that uses none.
fn is_valid(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_BYTES && !name.contains('\0')
}

async fn any_name_is_taken_or_refused<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let other = Locks::new(database.pool(1).await);
    let mut taken = 0;
    for name in samples(&names(), 120) {
        let lease = match locks.insert_lock(&name).acquire().await {
            Ok(lease) => lease,
            Err(error) => {
                assert!(!is_valid(&name), "{name:?} is refused: {error}");
                refused_everywhere(&locks, &name, &error).await;
                continue;
            }
        };
        assert!(is_valid(&name), "{name:?} is taken");
        taken += 1;
        assert_eq!(lease.name(), name);
        assert!(other.insert_lock(&name).try_acquire().await.unwrap().is_none(), "{name:?} excludes");
        // Neither a similar name nor one that a comparison could take for the same.
        for alike in
            [format!("{name} "), name.to_uppercase() + "~", name.chars().rev().collect::<String>() + "~"]
        {
            if is_valid(&alike) {
                let lease = other.insert_lock(&alike).try_acquire().await.unwrap();
                lease.unwrap_or_else(|| panic!("{alike:?} is excluded by {name:?}")).release().await.unwrap();
            }
        }
        assert_eq!(locks.info(&name).await.unwrap().unwrap().name, name);
        lease.release().await.unwrap();
        let next = other.insert_lock(&name).try_acquire().await.unwrap();
        next.unwrap_or_else(|| panic!("{name:?} was not released")).release().await.unwrap();
    }
    assert!((40..110).contains(&taken), "both kinds are among them: {taken}");
}

async fn refused_everywhere<DB: Backend>(locks: &Locks<DB>, name: &str, error: &Error) {
    assert!(matches!(error, Error::InvalidName { .. }), "{name:?}: {error:?}");
    assert!(error.to_string().len() < 500, "a message, not the whole name");
    let invalid =
        |error: Option<Error>| assert!(matches!(error, Some(Error::InvalidName { .. })), "{name:?}");
    invalid(locks.insert_lock(name).try_acquire().await.err());
    invalid(locks.insert_locks([name, "another"]).acquire().await.err());
    invalid(locks.row_lock(name).acquire().await.err());
    invalid(locks.row_lock(name).try_acquire().await.err());
    invalid(locks.info(name).await.err());
    invalid(locks.insert_lock(name).run(async |_| Ok::<_, Error>(())).await.err());
}

async fn any_name_of_a_row_lock_is_taken_or_refused<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let mut taken = 0;
    for name in samples(&names(), 80) {
        match locks.row_lock(&name).acquire().await {
            Ok(guard) => {
                assert!(is_valid(&name), "{name:?} is taken");
                taken += 1;
                guard.commit().await.unwrap();
                assert_eq!(locks.info(&name).await.unwrap().unwrap().name, name);
            }
            Err(error) => {
                assert!(!is_valid(&name), "{name:?} is refused: {error}");
                assert!(matches!(error, Error::InvalidName { .. }), "{name:?}: {error:?}");
            }
        }
    }
    assert!((25..75).contains(&taken), "both kinds are among them: {taken}");
}

async fn any_duration_is_taken_or_refused<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let all = (durations(), durations(), durations());
    let (mut taken, mut number) = (0, 0);
    for (ttl, wait, at_least) in samples(&all, 200) {
        // A new name each time: a lock that is kept `at_least` for a year can't be taken again.
        number += 1;
        let name = format!("lock {number}");
        let is_valid = (SHORTEST_TTL..=LONGEST).contains(&ttl) && wait <= LONGEST && at_least <= LONGEST;
        let lock = locks.insert_lock(&name).ttl(ttl).wait(wait).at_least(at_least);
        match lock.clone().acquire().await {
            // The shortest leases may be over by now.
            Ok(lease) => match lease.release().await {
                Ok(()) | Err(Error::Lost { .. }) => taken += usize::from(is_valid),
                Err(error) => panic!("{ttl:?} {wait:?} {at_least:?}: {error}"),
            },
            // On a busy machine.
            Err(Error::TtlTooShort { .. }) if ttl < Duration::from_secs(1) => taken += 1,
            // The wait is close to zero.
            Err(Error::Timeout { .. }) if is_valid && wait < Duration::from_secs(1) => taken += 1,
            Err(error) => {
                assert!(!is_valid, "{ttl:?} {wait:?} {at_least:?}: {error}");
                assert!(matches!(error, Error::InvalidOption { .. }), "{error:?}");
                let error = lock.run(async |_| Ok::<_, Error>(())).await.unwrap_err();
                assert!(matches!(error, Error::InvalidOption { .. }), "{error:?}");
                assert_eq!(locks.info(&name).await.unwrap().map(|info| info.name), None, "no row was made");
                continue;
            }
        }
        assert!(is_valid, "{ttl:?} {wait:?} {at_least:?}: taken");
    }
    assert!((20..190).contains(&taken), "both kinds are among them: {taken}");
}

/// Without a table every statement would fail.
async fn what_is_refused_asks_no_database<T: TestDatabase>(database: &T) {
    let locks = Locks::new(database.pool(1).await);
    for name in samples(&names(), 200).into_iter().filter(|name| !is_valid(name)) {
        refused_everywhere(&locks, &name, &locks.insert_lock(&name).acquire().await.unwrap_err()).await;
    }
    for wrong in samples(&durations(), 200).into_iter().filter(|duration| *duration > LONGEST) {
        let errors = [
            locks.insert_lock("a").ttl(wrong).acquire().await.err(),
            locks.insert_lock("a").wait(wrong).acquire().await.err(),
            locks.insert_lock("a").at_least(wrong).acquire().await.err(),
            locks.insert_lock("a").at_least(wrong).try_acquire().await.err(),
            locks.row_lock("a").wait(wrong).acquire().await.err(),
        ];
        for error in errors {
            assert!(matches!(error, Some(Error::InvalidOption { .. })), "{wrong:?}: {error:?}");
        }
    }
    let sane = locks.insert_lock("a").wait(Duration::ZERO).acquire().await.unwrap_err();
    assert!(matches!(sane, Error::SchemaMissing { .. }), "the control: {sane:?}");
}
