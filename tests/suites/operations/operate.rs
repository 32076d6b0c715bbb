//! What operators see and do: lists, holders, waiters, a forced release, health, and the report.

use std::time::Duration;

use lock_db::{AnyLocks, CommitGuard, Error, FindingKind, Kind, LockInfo, Locks, Loss, RowHolder};
use lock_tests::{Backend, TestDatabase, TestServer, eventually, migrated};
use sqlx::Connection;

lock_tests::cases! {
    on every database:
    info_shows_the_holder_and_who_waits,
    a_list_is_in_the_order_of_bytes_and_in_pages,
    patterns_match_as_written,
    only_held_locks_are_listed,
    a_prefix_limits_the_list_and_is_not_shown,
    a_list_of_nonsense_is_refused,
    a_lease_is_ended_by_its_own_number_only,
    a_number_of_a_chain_ends_it,
    a_holder_elsewhere_is_told_and_can_not_commit,
    a_holder_is_told_of_force_although_the_lock_was_granted_again,
    a_lock_that_is_kept_after_its_release_is_freed,
    a_waiter_gets_a_lock_that_was_released_by_force,
    a_lease_is_wanted_while_a_request_waits,
    health_does_not_ask_the_database,
    a_report_names_the_server,
    what_is_seen_can_be_serialized,
    all_of_it_works_where_the_database_is_known_at_run_time;

    on every server:
    a_verified_transaction_holds_force_up,
    a_list_stops_no_other_request,
    waiters_are_not_named_as_holders,
    a_lease_that_a_transaction_keeps_has_its_session;

    on postgres:
    the_session_that_holds_a_row_lock_is_named;

    on mysql:
    the_connection_that_holds_a_row_lock_is_named,
    an_account_without_rights_is_told_which;

    on mariadb:
    the_connection_that_holds_a_row_lock_is_named_while_another_waits;
}

const PATIENCE: Duration = Duration::from_secs(30);
/// InnoDB refreshes what it shows only when it was not read for a tenth of a second.
const SHOWN_AFTER: Duration = Duration::from_millis(150);
const HOUR: Duration = Duration::from_hours(1);
const SHORT: Duration = Duration::from_secs(3);

async fn info<DB: Backend>(locks: &Locks<DB>, name: &str) -> LockInfo {
    locks.info(name).await.unwrap().expect("there is a row")
}

fn names(list: &[LockInfo]) -> Vec<&str> {
    list.iter().map(|info| info.name.as_str()).collect()
}

async fn use_once<DB: Backend>(locks: &Locks<DB>, name: &str) {
    locks.insert_lock(name).acquire().await.unwrap().release().await.unwrap();
}

async fn info_shows_the_holder_and_who_waits<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, database.locks().await);
    assert!(other.info("job").await.unwrap().is_none());
    let lease = locks.insert_lock("job").ttl(HOUR).acquire().await.unwrap();

    let seen = info(&other, "job").await;
    let [holder] = &seen.holders[..] else { panic!("{seen:?}") };
    assert_eq!((holder.owner.as_str(), holder.fencing_token), (locks.owner(), lease.fencing_token()));
    assert_eq!((holder.since, holder.expires_in), (seen.acquired_at, seen.expires_in));
    let left = seen.expires_in.unwrap();
    assert!(left <= HOUR && left > HOUR - Duration::from_mins(5), "{left:?}");
    assert!(seen.held_for.unwrap() < Duration::from_mins(5), "{seen:?}");
    assert!(seen.waiting.is_empty() && seen.row_holder.is_none() && !seen.is_here, "{seen:?}");
    assert!(info(&locks, "job").await.is_here);

    let waiter = tokio::spawn({
        let other = other.clone();
        async move { other.insert_lock("job").wait(HOUR).acquire().await }
    });
    eventually(PATIENCE, async || !info(&locks, "job").await.waiting.is_empty()).await;
    let seen = info(&locks, "job").await;
    let [waiting] = &seen.waiting[..] else { panic!("{seen:?}") };
    let process = format!("/{}", std::process::id());
    assert!(waiting.owner.ends_with(&process), "{waiting:?}");
    assert!(waiting.since >= seen.acquired_at, "{seen:?}");
    // It has the secret of no process.
    assert!(!format!("{seen:?}").contains(lease.secret_key()));

    lease.release().await.unwrap();
    waiter.await.unwrap().unwrap().release().await.unwrap();
    eventually(PATIENCE, async || info(&locks, "job").await.holders.is_empty()).await;
    let seen = info(&locks, "job").await;
    assert_eq!((seen.held_until, seen.expires_in, seen.held_for), (None, None, None));
    assert!(seen.waiting.is_empty() && seen.holders.is_empty(), "{seen:?}");
}

async fn a_list_is_in_the_order_of_bytes_and_in_pages<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let mut made = ["b", "a", "B", "ä", "a ", "a\u{10FFFF}", "z", "日", "A", "_"];
    for name in made {
        use_once(&locks, name).await;
    }
    made.sort_unstable();
    assert_eq!(names(&locks.list("*").await.unwrap()), made);
    let (mut pages, mut after) = (Vec::new(), String::new());
    loop {
        let page = locks.list("*").limit(3).after(&after).await.unwrap();
        assert!(page.len() <= 3);
        let Some(last) = page.last() else { break };
        after.clone_from(&last.name);
        pages.extend(page.into_iter().map(|info| info.name));
    }
    assert_eq!(pages, made);
    let empty = Locks::builder(database.pool(2).await).name_prefix("a").build();
    use_once(&empty, "x").await;
    assert_eq!(names(&empty.list("*").limit(1).await.unwrap()), [" "], "not the name that is the prefix");
    // More than one statement reads.
    database.run("DELETE FROM distributed_lock").await;
    let rows: Vec<String> = (0..2500).map(|number| format!("('n:{number:04}')")).collect();
    database.run(&format!("INSERT INTO distributed_lock (lock_name) VALUES {}", rows.join(","))).await;
    let all = locks.list("n:*").await.unwrap();
    assert_eq!((all.len(), all[0].name.as_str(), all[2499].name.as_str()), (2500, "n:0000", "n:2499"));
    let page = locks.list("*").limit(1200).after("n:0999").await.unwrap();
    assert_eq!((page.len(), page[0].name.as_str(), page[1199].name.as_str()), (1200, "n:1000", "n:2199"));
    // A part of the table without any name that is asked for.
    let rows: Vec<String> = (0..6000).map(|number| format!("('o:{number:04}')")).collect();
    database.run(&format!("INSERT INTO distributed_lock (lock_name) VALUES {}", rows.join(","))).await;
    use_once(&locks, "z:last").await;
    assert_eq!(names(&locks.list("*last").await.unwrap()), ["z:last"]);
    assert_eq!(names(&locks.list("*5999").limit(5).await.unwrap()), ["o:5999"]);
    assert_eq!(locks.list("o:*").await.unwrap().len(), 6000);
}

async fn patterns_match_as_written<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let made = [
        "order:1",
        "order:10",
        "Order:1",
        "order",
        "reorder:1",
        "50%",
        "50x",
        "a_b",
        "axb",
        "a[b]c",
        "a?c",
        "a!c",
        "a\\c",
        "a'c",
        "tail\u{10FFFF}x",
    ];
    for name in made {
        use_once(&locks, name).await;
    }
    for (pattern, expected) in [
        ("order:*", &["order:1", "order:10"][..]),
        ("*:1", &["Order:1", "order:1", "reorder:1"]),
        ("*order*", &["order", "order:1", "order:10", "reorder:1"]),
        ("o*1*", &["order:1", "order:10"]),
        ("order:1", &["order:1"]),
        ("order:1**", &["order:1", "order:10"]),
        ("order:2", &[]),
        ("50%", &["50%"]),
        ("50%*", &["50%"]),
        ("a_b", &["a_b"]),
        ("a_*", &["a_b"]),
        ("a[b]*", &["a[b]c"]),
        ("a?*", &["a?c"]),
        ("a!*", &["a!c"]),
        ("a\\*", &["a\\c"]),
        ("a'*", &["a'c"]),
        ("tail*", &["tail\u{10FFFF}x"]),
        ("*\u{10FFFF}*", &["tail\u{10FFFF}x"]),
    ] {
        let list = locks.list(pattern).await.unwrap();
        assert_eq!(names(&list), expected, "{pattern}");
    }
    let long = "x".repeat(300);
    assert!(locks.list(format!("{long}*")).await.unwrap().is_empty());
}

async fn only_held_locks_are_listed<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    for name in ["a", "b", "c", "expired"] {
        use_once(&locks, name).await;
    }
    locks.row_lock("row").acquire().await.unwrap().commit().await.unwrap();
    let (a, c) =
        (locks.insert_lock("a").acquire().await.unwrap(), locks.insert_lock("c").acquire().await.unwrap());
    let kept = locks.insert_lock("kept").at_least(HOUR).acquire().await.unwrap();
    kept.release().await.unwrap();
    let list = locks.list("*").held_only().await.unwrap();
    assert_eq!(names(&list), ["a", "c", "kept"]);
    assert!(list.iter().all(|info| info.held_until.is_some() && !info.holders.is_empty()), "{list:?}");
    let list = locks.list("*").held_only().limit(1).after("a").await.unwrap();
    assert_eq!(names(&list), ["c"]);
    drop((a, c));
}

async fn a_prefix_limits_the_list_and_is_not_shown<T: TestDatabase>(database: &T) {
    let all = database.locks().await;
    let with = |prefix: &str| Locks::builder(all.pool().clone()).name_prefix(prefix).build();
    let (billing, other) = (with("billing%*/"), with("billing%x/"));
    use_once(&billing, "job:1").await;
    use_once(&billing, "job:2").await;
    use_once(&other, "job:3").await;
    use_once(&all, "job:4").await;
    assert_eq!(names(&billing.list("*").await.unwrap()), ["job:1", "job:2"]);
    assert_eq!(names(&billing.list("*").after("job:1").await.unwrap()), ["job:2"]);
    assert_eq!(names(&all.list("job*").await.unwrap()), ["job:4"]);
    assert_eq!(all.list("*").await.unwrap().len(), 4);
    let token = info(&billing, "job:1").await.fencing_token;
    assert!(!billing.force_release("job:1", token).await.unwrap(), "it is free");
}

async fn a_list_of_nonsense_is_refused<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    assert!(matches!(locks.list("").await, Err(Error::InvalidName { .. })));
    assert!(matches!(locks.list("a\0*").await, Err(Error::InvalidName { .. })));
    assert!(matches!(locks.list("*").after("\0").await, Err(Error::InvalidName { .. })));
    assert!(matches!(locks.list("*").limit(0).await, Err(Error::InvalidOption { option: "limit", .. })));
    assert!(matches!(locks.force_release("", 1).await, Err(Error::InvalidName { .. })));
    locks.close().await;
    assert!(matches!(locks.list("*").await, Err(Error::Closed)));
    assert!(matches!(locks.force_release("a", 1).await, Err(Error::Closed)));
    assert!(!locks.health().connected);
}

async fn a_lease_is_ended_by_its_own_number_only<T: TestDatabase>(database: &T) {
    let (locks, operator) = (database.locks().await, database.locks().await);
    assert!(!operator.force_release("new", 1).await.unwrap());
    let earlier = locks.insert_lock("job").acquire().await.unwrap();
    let earlier_token = earlier.fencing_token();
    earlier.release().await.unwrap();
    assert!(!operator.force_release("job", earlier_token).await.unwrap(), "it is free");
    let lease = locks.insert_lock("job").ttl(HOUR).acquire().await.unwrap();
    let token = lease.fencing_token();
    for wrong in [earlier_token, token + 1, 1, 0, -1, i64::MIN, i64::MAX] {
        assert!(!operator.force_release("job", wrong).await.unwrap(), "{wrong}");
    }
    assert!(lease.is_held());
    assert_eq!(info(&operator, "job").await.fencing_token, token);
    // The holder's own `Locks` tells it at once.
    assert!(locks.force_release("job", token).await.unwrap());
    assert_eq!(lease.loss(), Some(Loss::ForceReleased));
    tokio::time::timeout(PATIENCE, lease.lost()).await.unwrap();
    assert!(!operator.force_release("job", token).await.unwrap(), "once");
    assert!(matches!(lease.release().await, Err(Error::Lost { reason: Loss::ForceReleased, .. })));
    let next = operator.insert_lock("job").wait(PATIENCE).acquire().await.unwrap();
    assert!(next.fencing_token() > token);
    next.release().await.unwrap();

    locks.row_lock("row").acquire().await.unwrap().commit().await.unwrap();
    let refused = operator.force_release("row", 1).await;
    assert!(matches!(refused, Err(Error::WrongKind { found: Kind::Row, .. })), "{refused:?}");
}

/// Leases that are handed on in a process have numbers of one range.
async fn a_number_of_a_chain_ends_it<T: TestDatabase>(database: &T) {
    let pool = database.pool(8).await;
    let locks = migrated(Locks::builder(pool).hand_off(64, HOUR).build()).await;
    let operator = database.locks().await;
    let before = locks.insert_lock("job").ttl(HOUR).acquire().await.unwrap();
    let before_token = before.fencing_token();
    before.release().await.unwrap();
    let first = locks.insert_lock("job").ttl(HOUR).acquire().await.unwrap();
    let second = tokio::spawn({
        let locks = locks.clone();
        async move { locks.insert_lock("job").ttl(HOUR).wait(HOUR).acquire().await.unwrap() }
    });
    eventually(PATIENCE, async || locks.health().waiting == 1).await;
    let first_token = first.fencing_token();
    first.release().await.unwrap();
    let second = second.await.unwrap();
    assert!(second.fencing_token() > first_token);
    assert!(!operator.force_release("job", before_token).await.unwrap());
    assert!(locks.force_release("job", second.fencing_token()).await.unwrap());
    assert_eq!(second.loss(), Some(Loss::ForceReleased));
    let next = operator.insert_lock("job").wait(PATIENCE).acquire().await.unwrap();
    assert!(next.fencing_token() > second.fencing_token());
}

async fn a_holder_elsewhere_is_told_and_can_not_commit<T: TestDatabase>(database: &T) {
    let (locks, operator) = (database.locks().await, database.locks().await);
    database.run("CREATE TABLE written (number INTEGER)").await;
    let lease = locks.insert_lock("job").ttl(SHORT).acquire().await.unwrap();
    let slow = locks.insert_lock("slow").ttl(HOUR).acquire().await.unwrap();
    // On SQLite the transaction would keep the operator from writing until it ends.
    let mut transaction = None;
    if T::NAME != "sqlite" {
        let begun = transaction.insert(slow.begin().await.unwrap());
        T::Database::run(begun, "INSERT INTO written VALUES (1)").await.unwrap();
    }
    for lease in [&lease, &slow] {
        assert!(operator.force_release(lease.name(), lease.fencing_token()).await.unwrap());
    }
    if transaction.is_none() {
        let begun = transaction.insert(slow.begin().await.unwrap());
        T::Database::run(begun, "INSERT INTO written VALUES (1)").await.unwrap();
    }
    let refused = transaction.unwrap().commit().await;
    assert!(matches!(refused, Err(Error::Lost { reason: Loss::ForceReleased, .. })), "{refused:?}");
    assert_eq!(slow.loss(), Some(Loss::ForceReleased));
    assert_eq!(database.number("SELECT COUNT(*) FROM written").await, 0);
    // With the next renewal.
    tokio::time::timeout(PATIENCE, lease.lost()).await.unwrap();
    assert_eq!(lease.loss(), Some(Loss::ForceReleased));
    // Its late release touches nothing.
    let next = operator.insert_lock("job").acquire().await.unwrap();
    drop(lease);
    let released = slow.release().await;
    assert!(matches!(released, Err(Error::Lost { reason: Loss::ForceReleased, .. })), "{released:?}");
    assert_eq!(info(&operator, "job").await.fencing_token, next.fencing_token());
}

async fn a_holder_is_told_of_force_although_the_lock_was_granted_again<T: TestDatabase>(database: &T) {
    let (locks, operator) = (database.locks().await, database.locks().await);
    let lease = locks.insert_lock("job").ttl(HOUR).acquire().await.unwrap();
    assert!(operator.force_release("job", lease.fencing_token()).await.unwrap());
    let next = operator.insert_lock("job").acquire().await.unwrap();
    assert!(next.fencing_token() > lease.fencing_token());
    let Err(Error::Lost { reason: Loss::ForceReleased, taken_over_by: Some(by), .. }) = lease.release().await
    else {
        panic!("it was ended by force, and another one has it")
    };
    assert_eq!((by.owner.as_str(), by.fencing_token), (operator.owner(), next.fencing_token()));
    assert!(next.is_held());
}

async fn a_lock_that_is_kept_after_its_release_is_freed<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let lease = locks.insert_lock("nightly").at_least(HOUR).acquire().await.unwrap();
    let token = lease.fencing_token();
    lease.release().await.unwrap();
    assert!(locks.insert_lock("nightly").try_acquire().await.unwrap().is_none());
    assert!(info(&locks, "nightly").await.finished_at.is_some());
    assert!(locks.force_release("nightly", token).await.unwrap());
    let next = locks.insert_lock("nightly").try_acquire().await.unwrap().expect("it is free");
    assert!(next.fencing_token() > token);
}

async fn a_waiter_gets_a_lock_that_was_released_by_force<T: TestDatabase>(database: &T) {
    let (locks, other, operator) = (database.locks().await, database.locks().await, database.locks().await);
    let lease = locks.insert_lock("job").ttl(HOUR).acquire().await.unwrap();
    let elsewhere = tokio::spawn({
        let other = other.clone();
        async move { other.insert_lock("job").wait(HOUR).acquire().await.unwrap().release().await.unwrap() }
    });
    eventually(PATIENCE, async || !info(&operator, "job").await.waiting.is_empty()).await;
    assert!(operator.force_release("job", lease.fencing_token()).await.unwrap());
    tokio::time::timeout(PATIENCE, elsewhere).await.unwrap().unwrap();
    drop(lease);
    // And one of the holder's own process.
    let lease = locks.insert_lock("job").ttl(HOUR).wait(PATIENCE).acquire().await.unwrap();
    let here = tokio::spawn({
        let locks = locks.clone();
        async move { locks.insert_lock("job").wait(HOUR).acquire().await.unwrap().release().await.unwrap() }
    });
    eventually(PATIENCE, async || locks.health().waiting == 1).await;
    assert!(locks.force_release("job", lease.fencing_token()).await.unwrap());
    tokio::time::timeout(PATIENCE, here).await.unwrap().unwrap();
}

async fn a_lease_is_wanted_while_a_request_waits<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, database.locks().await);
    let lease = locks.insert_lock("job").ttl(HOUR).acquire().await.unwrap();
    let any = AnyLocks::from(locks.clone()).insert_lock("any").ttl(HOUR).acquire().await.unwrap();
    let not_yet = tokio::time::timeout(Duration::from_millis(700), lease.wanted()).await;
    assert!(not_yet.is_err(), "no request waits");
    for waiter in [&locks, &other] {
        let wait = |name: &'static str| {
            let waiter = waiter.clone();
            tokio::spawn(async move { waiter.insert_lock(name).wait(HOUR).acquire().await })
        };
        let (waiting, waiting_for_any) = (wait("job"), wait("any"));
        for _ in 0..2 {
            tokio::time::timeout(PATIENCE, lease.wanted()).await.unwrap();
            tokio::time::timeout(PATIENCE, any.wanted()).await.unwrap();
        }
        assert!(lease.is_held());
        waiting.abort();
        waiting_for_any.abort();
        let gone = async || tokio::time::timeout(Duration::from_millis(100), lease.wanted()).await.is_err();
        eventually(PATIENCE, gone).await;
    }
}

async fn health_does_not_ask_the_database<T: TestDatabase>(database: &T) {
    let locks = Locks::new(database.pool(8).await);
    let health = locks.health();
    assert_eq!(
        (health.connected, health.since_last_answer, health.held, health.waiting),
        (false, None, 0, 0)
    );
    let locks = migrated(locks).await;
    let lease = locks.insert_lock("job").acquire().await.unwrap();
    let health = locks.health();
    assert!(health.connected && health.held == 1 && health.waiting == 0, "{health:?}");
    assert!(health.since_last_answer.unwrap() < PATIENCE);
    let waiter = tokio::spawn({
        let locks = locks.clone();
        async move { locks.insert_lock("job").wait(HOUR).acquire().await.unwrap() }
    });
    eventually(PATIENCE, async || locks.health().waiting == 1).await;
    drop(lease);
    let second = waiter.await.unwrap();
    eventually(PATIENCE, async || locks.health().waiting == 0 && locks.health().held == 1).await;
    second.release().await.unwrap();
    eventually(PATIENCE, async || locks.health().held == 0).await;
    locks.close().await;
    eventually(PATIENCE, async || !locks.health().connected).await;
}

async fn a_report_names_the_server<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let report = locks.check().await.unwrap();
    let product = match T::NAME {
        "postgres" => "PostgreSQL ",
        "mysql" => "MySQL ",
        "mariadb" => "MariaDB ",
        _ => "SQLite ",
    };
    let version = report.server().strip_prefix(product).unwrap_or_else(|| panic!("{report:?}"));
    assert!(version.starts_with(|first: char| first.is_ascii_digit()), "{version}");
    let guard = if T::NAME == "sqlite" { CommitGuard::WholeDatabase } else { CommitGuard::RowLock };
    assert_eq!(report.guard(), guard);
    assert_eq!(report.findings().len(), report.warnings().len());
    for (finding, warning) in report.findings().iter().zip(report.warnings()) {
        assert_eq!(&finding.text, warning);
        assert!(finding.setting.is_none_or(|setting| warning.contains(setting)), "{finding:?}");
        assert_ne!(finding.kind, FindingKind::Clock, "it is the same machine: {finding}");
    }
}

async fn what_is_seen_can_be_serialized<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let lease = locks.insert_lock("job").ttl(HOUR).acquire().await.unwrap();
    let json = serde_json::to_value(info(&locks, "job").await).unwrap();
    assert_eq!(
        (&json["name"], &json["kind"], &json["is_here"]),
        (&"job".into(), &"insert".into(), &true.into())
    );
    assert_eq!(json["fencing_token"], lease.fencing_token());
    assert_eq!(json["holders"][0]["owner"], locks.owner());
    assert!(json["expires_in"].as_f64().unwrap() > 3000.0, "seconds: {json}");
    assert!(json["held_until"].as_str().unwrap().ends_with('Z'), "{json}");
    assert!(!json.to_string().contains(lease.secret_key()));
    locks.row_lock("row").acquire().await.unwrap().commit().await.unwrap();
    let json = serde_json::to_value(info(&locks, "row").await).unwrap();
    assert!(json["expires_in"].is_null() && !json["row_holder"].is_null(), "{json}");
    let json = serde_json::to_value(locks.check().await.unwrap()).unwrap();
    assert!(json["server"].is_string() && json["guard"].is_string() && json["findings"].is_array(), "{json}");
    assert_eq!(serde_json::to_value(locks.health()).unwrap()["held"], 1);
}

async fn all_of_it_works_where_the_database_is_known_at_run_time<T: TestDatabase>(database: &T) {
    let locks = AnyLocks::from(database.locks().await);
    let lease = locks.insert_lock("job:1").acquire().await.unwrap();
    let free = locks.insert_lock("job:2").acquire().await.unwrap();
    free.release().await.unwrap();
    assert_eq!(names(&locks.list("job:*").await.unwrap()), ["job:1", "job:2"]);
    assert_eq!(names(&locks.list("job:*").held_only().await.unwrap()), ["job:1"]);
    assert_eq!(names(&locks.list("*").after("job:1").limit(1).await.unwrap()), ["job:2"]);
    assert_eq!(locks.health().held, 1);
    assert!(locks.force_release("job:1", lease.fencing_token()).await.unwrap());
    assert_eq!(lease.loss(), Some(Loss::ForceReleased));
}

/// What was verified is about to be committed. It can't be refused any more, so it is not cut off either.
async fn a_verified_transaction_holds_force_up<T: TestServer>(database: &T) {
    let (locks, operator) = (database.locks().await, database.locks().await);
    let lease = locks.insert_lock("job").ttl(HOUR).acquire().await.unwrap();
    let mut connection = database.connection().await;
    let mut transaction = connection.begin().await.unwrap();
    lease.verify_in(&mut transaction).await.unwrap();
    let refused = operator.force_release("job", lease.fencing_token()).await;
    let Err(error @ Error::Database { .. }) = refused else { panic!("{refused:?}") };
    assert!(error.is_retryable() && error.to_string().contains("job"), "{error}");
    assert!(lease.is_held());
    transaction.commit().await.unwrap();
    assert!(operator.force_release("job", lease.fencing_token()).await.unwrap());
}

/// Lists lock no rows, and see none of those that others have locked.
async fn a_list_stops_no_other_request<T: TestServer>(database: &T) {
    let (locks, operator) = (database.locks().await, database.locks().await);
    // Its row is seen once it is committed.
    locks.row_lock("row").acquire().await.unwrap().commit().await.unwrap();
    let guard = locks.row_lock("row").acquire().await.unwrap();
    let lease = locks.insert_lock("job").acquire().await.unwrap();
    let mut transaction = lease.begin().await.unwrap();
    T::Database::run(&mut transaction, "SELECT 1").await.unwrap();
    for _ in 0..20 {
        let (all, held) = tokio::join!(operator.list("*"), operator.list("*").held_only());
        assert_eq!(names(&all.unwrap()), ["job", "row"]);
        assert!(names(&held.unwrap()).contains(&"job"));
        let other = operator.row_lock("row").try_acquire().await.unwrap();
        assert!(other.is_none());
    }
    transaction.commit().await.unwrap();
    guard.commit().await.unwrap();
    for _ in 0..20 {
        let list = operator.list("*");
        let (list, guard) = tokio::join!(list, locks.row_lock("row").try_acquire());
        list.unwrap();
        guard.unwrap().expect("it is free").commit().await.unwrap();
    }
}

/// One waits for a row at a time, and leaves other locks behind that are none on a row.
async fn waiters_are_not_named_as_holders<T: TestServer>(database: &T) {
    let (locks, other, operator) = (database.locks().await, database.locks().await, database.locks().await);
    for name in ["a", "b"] {
        locks.row_lock(name).acquire().await.unwrap().commit().await.unwrap();
    }
    let mut connection = database.connection().await;
    let id = if T::NAME == "postgres" { "SELECT pg_backend_pid()" } else { "SELECT CONNECTION_ID()" };
    let holder = T::Database::find_number(&mut connection, id).await.unwrap().unwrap();
    let mut transaction = connection.begin().await.unwrap();
    locks.row_lock("b").acquire_in(&mut transaction).await.unwrap();
    let waiting: Vec<_> = [&locks, &other]
        .into_iter()
        .map(|locks| {
            let (locks, pool) = (locks.clone(), locks.pool().clone());
            tokio::spawn(async move {
                let mut transaction = pool.begin().await.unwrap();
                locks.row_lock("b").wait(HOUR).acquire_in(&mut transaction).await.unwrap();
            })
        })
        .collect();
    eventually(PATIENCE, async || database.activity().await.waiting >= 2).await;
    let named = async || {
        tokio::time::sleep(SHOWN_AFTER).await;
        matches!(info(&operator, "b").await.row_holder, Some(RowHolder::Session(_)))
    };
    eventually(PATIENCE, named).await;
    // Longer than a wait of one statement.
    for _ in 0..20 {
        tokio::time::sleep(SHOWN_AFTER).await;
        let (a, b) = (info(&operator, "a").await, info(&operator, "b").await);
        assert!(!matches!(a.row_holder, Some(RowHolder::Session(_))), "{a:?}");
        if let Some(RowHolder::Session(session)) = &b.row_holder {
            assert_eq!(session.id, holder, "{b:?}");
        }
        assert!(!names(&operator.list("*").held_only().await.unwrap()).contains(&"a"));
    }
    waiting.iter().for_each(tokio::task::JoinHandle::abort);
    transaction.commit().await.unwrap();
}

async fn a_lease_that_a_transaction_keeps_has_its_session<T: TestServer>(database: &T) {
    let (locks, operator) = (database.locks().await, database.locks().await);
    use_once(&locks, "job").await;
    assert!(info(&operator, "job").await.row_holder.is_none());
    let mut connection = database.connection().await;
    let mut transaction = connection.begin().await.unwrap();
    locks.insert_lock("job").acquire_in(&mut transaction).await.unwrap();
    let seen = info(&operator, "job").await;
    // MariaDB shows only what another transaction waits for.
    assert_eq!(seen.row_holder.is_some(), T::NAME != "mariadb", "{seen:?}");
    assert!(!operator.force_release("job", seen.fencing_token).await.unwrap());
    transaction.rollback().await.unwrap();
}

async fn the_session_that_holds_a_row_lock_is_named<T: TestDatabase>(database: &T) {
    let (locks, operator) = (database.locks().await, database.locks().await);
    locks.row_lock("row").acquire().await.unwrap().commit().await.unwrap();
    assert_eq!(info(&operator, "row").await.row_holder, Some(RowHolder::Unlocked));
    assert!(operator.list("*").held_only().await.unwrap().is_empty());

    let mut connection = database.connection().await;
    T::Database::run(&mut connection, "SET application_name = 'billing'").await.unwrap();
    let backend = T::Database::find_number(&mut connection, "SELECT pg_backend_pid()").await.unwrap();
    // The lock of a waiter is written under a savepoint, so both forms are looked for.
    let holder = locks.row_lock("row").acquire().await.unwrap();
    let (seen, number) = (info(&operator, "row").await, backend.unwrap());
    assert!(matches!(&seen.row_holder, Some(RowHolder::Session(_))), "{seen:?}");
    let waiting = tokio::spawn({
        let locks = operator.clone();
        async move {
            let mut transaction = connection.begin().await.unwrap();
            locks.row_lock("row").wait(HOUR).acquire_in(&mut transaction).await.unwrap();
            let seen = info(&locks, "row").await;
            let list = locks.list("*").held_only().await.unwrap();
            transaction.commit().await.unwrap();
            (seen, list)
        }
    });
    eventually(PATIENCE, async || database.activity().await.waiting == 1).await;
    holder.commit().await.unwrap();
    let (seen, list) = waiting.await.unwrap();
    let Some(RowHolder::Session(session)) = &seen.row_holder else { panic!("{seen:?}") };
    assert_eq!((session.id, session.application_name.as_deref()), (number, Some("billing")));
    assert!(!session.user.is_empty() && session.host.is_some() && session.since.is_some(), "{session:?}");
    assert!(seen.held_for.is_some() && seen.held_until.is_none() && seen.holders.is_empty(), "{seen:?}");
    assert_eq!((names(&list), &list[0].row_holder), (vec!["row"], &seen.row_holder));
    assert_eq!(info(&operator, "row").await.row_holder, Some(RowHolder::Unlocked));
}

async fn the_connection_that_holds_a_row_lock_is_named<T: TestDatabase>(database: &T) {
    let (locks, operator) = (database.locks().await, database.locks().await);
    locks.row_lock("row").acquire().await.unwrap().commit().await.unwrap();
    assert_eq!(info(&operator, "row").await.row_holder, Some(RowHolder::Unlocked));
    let mut connection = database.connection().await;
    let number = T::Database::find_number(&mut connection, "SELECT CONNECTION_ID()").await.unwrap().unwrap();
    let mut transaction = connection.begin().await.unwrap();
    locks.row_lock("row").acquire_in(&mut transaction).await.unwrap();
    let seen = info(&operator, "row").await;
    let Some(RowHolder::Session(session)) = &seen.row_holder else { panic!("{seen:?}") };
    assert_eq!((session.id, session.user.as_str()), (number, "root"));
    assert!(session.host.is_some(), "{session:?}");
    let has_age = async || {
        tokio::time::sleep(SHOWN_AFTER).await;
        info(&operator, "row").await.held_for.is_some()
    };
    eventually(PATIENCE, has_age).await;
    assert!(info(&operator, "row").await.held_for.unwrap() < PATIENCE, "{seen:?}");
    assert_eq!(names(&operator.list("*").held_only().await.unwrap()), ["row"]);
    transaction.rollback().await.unwrap();
    assert_eq!(info(&operator, "row").await.row_holder, Some(RowHolder::Unlocked));
}

async fn the_connection_that_holds_a_row_lock_is_named_while_another_waits<T: TestDatabase>(database: &T) {
    let (locks, operator) = (database.locks().await, database.locks().await);
    let mut connection = database.connection().await;
    let number = T::Database::find_number(&mut connection, "SELECT CONNECTION_ID()").await.unwrap().unwrap();
    let mut transaction = connection.begin().await.unwrap();
    locks.row_lock("row").acquire_in(&mut transaction).await.unwrap();
    let seen = info(&operator, "row").await;
    assert!(matches!(&seen.row_holder, Some(RowHolder::Unknown(why)) if why.contains("waits")), "{seen:?}");
    let waiting = tokio::spawn({
        let operator = operator.clone();
        async move { operator.row_lock("row").wait(HOUR).acquire().await }
    });
    let named = async || {
        tokio::time::sleep(SHOWN_AFTER).await;
        matches!(info(&locks, "row").await.row_holder, Some(RowHolder::Session(_)))
    };
    eventually(PATIENCE, named).await;
    let Some(RowHolder::Session(session)) = info(&locks, "row").await.row_holder else { panic!("named") };
    assert_eq!(session.id, number);
    transaction.rollback().await.unwrap();
    waiting.await.unwrap().unwrap().commit().await.unwrap();
}

async fn an_account_without_rights_is_told_which<T: TestServer>(database: &T) {
    let locks = database.locks().await;
    let guard = locks.row_lock("row").acquire().await.unwrap();
    let schema = database.text("SELECT DATABASE()").await;
    let account = format!("lock_db_{}", schema.chars().filter(char::is_ascii_digit).collect::<String>());
    database.run(&format!("CREATE USER '{account}'@'%' IDENTIFIED BY 'x'")).await;
    database.run(&format!("GRANT SELECT, INSERT, UPDATE ON {schema}.* TO '{account}'@'%'")).await;
    let (host, port) = database.address();
    let pool = lock_tests::pool(&format!("mysql://{account}:x@{host}:{port}/{schema}"), 4).await;
    let operator = Locks::<T::Database>::new(pool);
    let seen = info(&operator, "row").await;
    let Some(RowHolder::Unknown(why)) = &seen.row_holder else { panic!("{seen:?}") };
    assert!(why.contains("PROCESS") && why.contains("data_locks"), "{why}");
    assert!(operator.list("*").held_only().await.unwrap().is_empty());
    assert_eq!(names(&operator.list("*").await.unwrap()), ["row"]);
    operator.close().await;
    database.run(&format!("DROP USER '{account}'@'%'")).await;
    guard.commit().await.unwrap();
}
