//! What is logged: nothing harmless, each loss once, no secret, and one line for one event. And the
//! messages of errors.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod pruning;

use std::time::{Duration, Instant};

use lock_db::{Error, Locks, Loss};
use lock_tests::{Backend, TestDatabase, TestServer, eventually, logged, record_logs, warned};

lock_tests::cases! {
    on every database:
    a_clean_shutdown_warns_of_nothing,
    a_loss_is_one_warning_that_says_how,
    a_lock_that_is_held_for_long_is_warned_of,
    a_name_cannot_forge_a_log_line,
    a_lock_with_a_minimum_hold_time_names_its_last_holder,
    a_timeout_behind_a_holder_of_this_process_recommends_reentrancy;

    on every server:
    a_wait_is_not_logged_as_a_slow_statement,
    no_secret_is_logged,
    an_unreachable_database_is_named,
    many_leases_that_cannot_be_renewed_are_one_warning;

    on sqlite:
    a_timeout_behind_a_writer_names_the_caller_as_possible_writer,
}

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_mins(1);
const PATIENCE: Duration = Duration::from_secs(30);

/// A second `Locks` with connections of its own, as another process would have.
async fn other<T: TestDatabase>(database: &T, label: &str) -> Locks<T::Database> {
    Locks::builder(database.pool(2).await).label(label).build()
}

/// For lines of this case on this database alone.
fn unique<T: TestDatabase>(database: &T, name: &str) -> String {
    let database: String = database.url().chars().rev().take_while(|character| *character != '/').collect();
    format!("{name}:{}:{database}", T::NAME)
}

async fn a_clean_shutdown_warns_of_nothing<T: TestDatabase>(database: &T) {
    record_logs();
    let near = database.locks().await;
    let name = unique(database, "shutdown");
    for round in 0..10 {
        let locks = other(database, "").await;
        let (dropped, open, running) =
            (format!("{name}:dropped{round}"), format!("{name}:open{round}"), format!("{name}:run{round}"));
        let lease = locks.insert_lock(&open).acquire().await.unwrap();
        let run = locks.insert_lock(&running).run(async |_| {
            drop(locks.insert_lock(&dropped).acquire().await?);
            locks.close().await;
            Ok::<_, Error>(())
        });
        // `close` stops the work that calls it. Another call of `close` waits for the same end.
        let _stopped = run.await;
        locks.close().await;
        drop(lease);
        for name in [dropped, open, running] {
            assert!(near.insert_lock(&name).try_acquire().await.unwrap().is_some(), "{name} was released");
        }
    }
    assert_eq!(warned(&name), Vec::<String>::new());
}

async fn a_loss_is_one_warning_that_says_how<T: TestDatabase>(database: &T) {
    record_logs();
    let locks = database.locks().await;
    let (taken, freed, deleted) =
        (unique(database, "taken"), unique(database, "freed"), unique(database, "deleted"));
    let ran = |name: &str, by: String| {
        let request = locks.insert_lock(name).ttl(6 * SECOND);
        async move {
            let ran = request.run(async |lease| {
                database.run(&by).await;
                lease.lost().await;
                std::future::pending::<Result<(), Error>>().await
            });
            ran.await.unwrap_err()
        }
    };
    let set = "UPDATE distributed_lock SET";
    let thief = format!(
        "{set} secret_key = 'x', owner = 'host/7/thief', fencing_token = fencing_token + 1 WHERE lock_name = '{taken}'"
    );
    let error = ran(&taken, thief).await;
    assert!(
        matches!(&error, Error::Lost { reason: Loss::TakenOver, taken_over_by: Some(by), .. } if by.owner == "host/7/thief"),
        "{error:?}"
    );
    assert!(error.to_string().contains("taken over by host/7/thief at 20"), "{error}");

    let free = format!(
        "{set} expire_time = '1970-01-01 00:00:00.000000', ttl_micros = 0 WHERE lock_name = '{freed}'"
    );
    let error = ran(&freed, free).await;
    assert!(matches!(error, Error::Lost { reason: Loss::ReleasedByHand, .. }), "{error:?}");
    assert!(error.to_string().contains("is lost: released by hand;"), "{error}");

    let error = ran(&deleted, format!("DELETE FROM distributed_lock WHERE lock_name = '{deleted}'")).await;
    assert!(matches!(error, Error::Lost { reason: Loss::RowDeleted, .. }), "{error:?}");

    // The guards are dropped by now. This waits for the effects.
    locks.close().await;
    for (name, how) in [
        (taken, "lock lost: taken over by host/7/thief"),
        (freed, "lock lost: released by hand"),
        (deleted, "lock lost: its row was deleted"),
    ] {
        let warned = warned(&name);
        assert!(matches!(&*warned, [line] if line.contains(how)), "{warned:?}");
    }
}

async fn a_lock_that_is_held_for_long_is_warned_of<T: TestDatabase>(database: &T) {
    record_logs();
    let name = unique(database, "long");
    let (lease, row) = (format!("{name}:lease"), format!("{name}:row"));
    let builder = Locks::builder(database.pool(4).await).label("slow\njob").warn_after(SECOND);
    let locks = builder.build();
    locks.migrate().await.unwrap();
    // It would keep all others from writing on SQLite.
    let guard = if T::NAME == "sqlite" { None } else { Some(locks.row_lock(&row).acquire().await.unwrap()) };
    let bounded =
        locks.insert_lock(format!("{name}:bounded")).ttl(MINUTE).at_most(MINUTE).acquire().await.unwrap();
    let held = locks.insert_lock(&lease).ttl(MINUTE).acquire().await.unwrap();
    let token = held.fencing_token();
    std::mem::forget(held);
    let names = if T::NAME == "sqlite" { vec![&lease] } else { vec![&lease, &row] };
    for name in names {
        eventually(PATIENCE, async || warned(name).len() >= 2).await;
        for line in warned(name) {
            assert!(
                line.contains(r"/slow\njob") && line.contains("held_for") && line.contains("since"),
                "{line}"
            );
        }
    }
    assert!(warned(&lease)[0].contains(&format!("fencing_token={token}")));
    assert!(warned(&lease)[0].contains("at_most"));
    assert_eq!(warned(bounded.name()), Vec::<String>::new());
    drop(guard);
}

async fn a_name_cannot_forge_a_log_line<T: TestDatabase>(database: &T) {
    record_logs();
    let locks = other(database, "a\nb").await;
    locks.migrate().await.unwrap();
    let name = format!("{}\nWARN forged: \u{1b}[2Kx", unique(database, "forged"));
    let shown = name.replace('\n', r"\n").replace('\u{1b}', r"\u{1b}");
    let lease = locks.insert_lock(&name).ttl(SECOND).acquire().await.unwrap();
    assert_eq!(lease.name(), name);
    let foreign = other(database, "").await;
    let mut errors =
        vec![foreign.insert_lock(&name).wait(Duration::from_millis(50)).acquire().await.unwrap_err()];
    errors.push(locks.insert_lock(&name).wait(Duration::ZERO).acquire().await.unwrap_err());
    errors.push(locks.row_lock(&name).wait(Duration::ZERO).acquire().await.unwrap_err());
    // A text that can't be a name is shown in part.
    let refused = locks.insert_lock(format!("{name}\0")).acquire().await.unwrap_err().to_string();
    assert!(!refused.contains(char::is_control), "{refused:?}");
    database
        .run(
            "UPDATE distributed_lock SET secret_key = 'x', owner = 'a\nb', fencing_token = fencing_token + 1",
        )
        .await;
    lease.lost().await;
    errors.push(lease.release().await.unwrap_err());
    for error in errors {
        let text = error.to_string();
        assert!(!text.contains(char::is_control), "{text:?}");
        assert!(text.contains(&shown), "{text:?}");
        assert_eq!(error.name(), Some(&*name), "it is given as it is to programs");
    }
    locks.close().await;
    let lines = logged(&shown);
    assert!(!lines.is_empty());
    for line in lines {
        assert!(line.target.starts_with("sqlx") || !line.text.contains(char::is_control), "{line:?}");
    }
}

async fn a_lock_with_a_minimum_hold_time_names_its_last_holder<T: TestDatabase>(database: &T) {
    let (locks, foreign) = (other(database, "job").await, other(database, "").await);
    locks.migrate().await.unwrap();
    let before = locks.insert_lock("clock").acquire().await.unwrap();
    let began = locks.info("clock").await.unwrap().unwrap().acquired_at;
    before.release().await.unwrap();
    let lease = locks.insert_lock("a").at_least(MINUTE).acquire().await.unwrap();
    lease.release().await.unwrap();
    let info = foreign.info("a").await.unwrap().unwrap();
    let finished = info.finished_at.expect("its work is done");
    let late = finished - began;
    assert!((-1..20).contains(&late.num_seconds()), "{late}");
    assert!((info.held_until.unwrap() - finished).num_seconds() <= 60);
    let error = foreign.insert_lock("a").wait(Duration::ZERO).acquire().await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("/job finished at 20") && text.contains("; kept until 20"), "{text}");
    assert!(text.contains("by `at_least`"), "{text}");
}

async fn a_timeout_behind_a_holder_of_this_process_recommends_reentrancy<T: TestDatabase>(database: &T) {
    let locks = other(database, "billing").await;
    locks.migrate().await.unwrap();
    let _held = locks.insert_lock("a").acquire().await.unwrap();
    let error = locks.insert_lock("a").wait(Duration::from_millis(50)).acquire().await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("held by this process (") && text.contains("/billing) since 20"), "{text}");
    assert!(
        text.contains("if that is the caller itself, use `run`, `reenter()` or `ReentryContext`"),
        "{text}"
    );
    let error = other(database, "").await.insert_lock("a").wait(Duration::ZERO).acquire().await.unwrap_err();
    assert!(!error.to_string().contains("this process"), "{error}");
}

/// sqlx warns of statements that take longer than a second.
async fn a_wait_is_not_logged_as_a_slow_statement<T: TestServer>(database: &T) {
    const WAITERS: u32 = 6;
    record_logs();
    let holder = database.locks().await;
    let pool = database.pool(WAITERS).await;
    let locks = Locks::new(pool.clone());
    let guard = holder.row_lock("till").acquire().await.unwrap();
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..WAITERS {
        let (pool, locks) = (pool.clone(), locks.clone());
        waiting.spawn(async move {
            let mut transaction = pool.begin().await.unwrap();
            let started = Instant::now();
            let error =
                locks.row_lock("till").wait(4 * SECOND).acquire_in(&mut transaction).await.unwrap_err();
            assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
            assert!(started.elapsed() >= 4 * SECOND);
            // As usable as before.
            locks.row_lock("free").acquire_in(&mut transaction).await.unwrap();
        });
    }
    while let Some(waited) = waiting.join_next().await {
        waited.unwrap();
    }
    drop(guard);
    assert!(!logged("DO $lock_db$").is_empty() || T::NAME != "postgres", "statements are logged");
    // Other cases may wait for other things.
    let database = database.url().rsplit('/').next().unwrap();
    let is_ours = if T::NAME == "postgres" { "$lock_db$" } else { database };
    let slow = logged("slow").into_iter().map(|line| line.text);
    let slow: Vec<String> =
        slow.filter(|text| text.contains(is_ours) && text.contains("distributed_lock")).collect();
    assert_eq!(slow, Vec::<String>::new());
}

/// Not even in the texts of the statements, which sqlx logs at DEBUG.
async fn no_secret_is_logged<T: TestServer>(database: &T) {
    record_logs();
    let locks = database.locks().await;
    let pool = database.pool(2).await;
    let secret =
        async || database.text("SELECT secret_key FROM distributed_lock WHERE lock_name = 'a'").await;
    let mut secrets = Vec::new();
    let lease = locks.insert_lock("a").acquire().await.unwrap();
    secrets.push(lease.secret_key().to_owned());
    lease.begin().await.unwrap().commit().await.unwrap();
    let mut transaction = pool.begin().await.unwrap();
    lease.verify_in(&mut transaction).await.unwrap();
    lease.release_in(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
    drop(lease);
    for _ in 0..2 {
        let mut transaction = pool.begin().await.unwrap();
        locks.insert_lock("a").wait(PATIENCE).acquire_in(&mut transaction).await.unwrap();
        // The second time a receipt is compared.
        let held = locks.insert_lock("a").wait(PATIENCE).acquire_in(&mut transaction).await.unwrap();
        assert_eq!(held.hold_count(), 2);
        transaction.commit().await.unwrap();
        secrets.push(secret().await);
    }
    for secret in secrets {
        assert_eq!(secret.len(), 32);
        let hexadecimal: String = secret.bytes().map(|byte| format!("{byte:02x}")).collect();
        for text in [secret, hexadecimal] {
            let lines = logged(&text);
            assert!(lines.is_empty(), "{lines:?}");
        }
    }
    assert!(!logged("distributed_lock").is_empty(), "statements are logged");
    // pg_stat_statements can't merge these: each text of a block is an entry of its own.
    let lines = logged("DO $lock_db$");
    let blocks: std::collections::HashSet<&str> = lines.iter().filter_map(|line| block(&line.text)).collect();
    assert!(blocks.len() <= 2, "{blocks:?}");
}

fn block(text: &str) -> Option<&str> {
    let (_, block) = text.split_once("DECLARE")?;
    Some(block.split_once("END $lock_db$")?.0)
}

async fn an_unreachable_database_is_named<T: TestServer>(database: &T) {
    drop(database.locks().await);
    let proxy = database.proxy();
    let address = proxy.address();
    let options = sqlx::pool::PoolOptions::<T::Database>::new().max_connections(2);
    let locks = Locks::new(options.connect_lazy(&database.url_by(address)).unwrap());
    drop(proxy);
    let lease = locks.insert_lock("a").wait(SECOND).acquire().await.unwrap_err().to_string();
    let row = locks.row_lock("a").wait(SECOND).acquire().await.unwrap_err().to_string();
    let named = if T::NAME == "postgres" { "PostgreSQL" } else { "MySQL" };
    for text in [lease, row] {
        let expected =
            format!("could not ask for lock `a` within 1s: {named} can't be reached (connection refused)");
        assert_eq!(text, expected);
    }
}

async fn many_leases_that_cannot_be_renewed_are_one_warning<T: TestServer>(database: &T) {
    const LEASES: usize = 20;
    record_logs();
    drop(database.locks().await);
    let proxy = database.proxy();
    let locks: Locks<T::Database> =
        Locks::new(sqlx::Pool::connect(&database.url_by(proxy.address())).await.unwrap());
    let name = unique(database, "many");
    let mut leases = Vec::new();
    for number in 0..LEASES {
        leases.push(locks.insert_lock(format!("{name}:{number}")).ttl(3 * SECOND).acquire().await.unwrap());
    }
    proxy.refuse();
    proxy.cut();
    for lease in &leases {
        lease.lost().await;
    }
    drop(leases);
    locks.close().await;
    let warned = warned(&name);
    assert_eq!(warned.len(), LEASES, "one each: {warned:?}");
    let named = if T::NAME == "postgres" { "PostgreSQL" } else { "MySQL" };
    for line in warned {
        assert!(line.contains("lock lost: its lease could not be renewed in time"), "{line}");
        // Refused, or silent on a busy machine.
        assert!(line.contains(&format!("error={named} ")), "{line}");
    }
}

async fn a_timeout_behind_a_writer_names_the_caller_as_possible_writer<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    let pool = database.pool(1).await;
    database.run("CREATE TABLE work (n INTEGER)").await;
    let mut transaction = pool.begin().await.unwrap();
    T::Database::run(&mut transaction, "INSERT INTO work VALUES (1)").await.unwrap();
    let error = locks.insert_lock("a").wait(SECOND).acquire().await.unwrap_err();
    let text = error.to_string();
    let expected =
        "nobody holds `a`, but another transaction, perhaps your own, is writing to this SQLite database";
    assert!(text.contains(expected), "{text}");
    assert!(error.is_retryable());
    let error = locks.row_lock("a row").wait(SECOND).acquire().await.unwrap_err();
    assert!(error.to_string().contains("another transaction, perhaps your own, is writing"), "{error}");
}

fn main() -> std::process::ExitCode {
    lock_tests::run([cases(), pruning::cases()], [])
}
