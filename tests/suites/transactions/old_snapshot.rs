//! A snapshot that stays open, anywhere in the database, keeps all versions of a hot row.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use futures_util::future::join_all;
use lock_db::Locks;
use lock_tests::{Backend, PostgresServer, SqliteFile, TestDatabase, TestServer, eventually};
use sqlx::{Executor, PgConnection, Postgres};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, span};

const PATIENCE: Duration = Duration::from_secs(60);

lock_tests::cases! {
    on postgres:
    acquires_and_releases_do_not_read_all_versions,
    batches_do_not_read_all_versions,
    large_batches_stop_reading_all_versions,
    polls_do_not_read_all_versions,
    row_locks_do_not_read_all_versions,
    a_snapshot_in_low_pages_and_in_high_ones,
    check_names_the_session,
    check_names_a_prepared_transaction,
    check_reports_what_a_role_may_not_see,
    a_slow_session_names_the_owner_of_the_snapshot;

    on mariadb:
    check_names_the_connection,
    check_reports_what_an_account_may_not_see;

    on mysql:
    check_names_the_connection,
    check_reports_what_an_account_may_not_see;

    on sqlite:
    check_reports_a_reader,
}

/// What one statement reads with few versions, plus what the unique indexes need: they are scanned
/// at each new page of versions. All versions take about 400 pages, read several times in each
/// pair.
const FEW_BLOCKS: i64 = 120;
const PAIRS: usize = 100;

async fn old_snapshot(database: &PostgresServer, application: &str) -> PgConnection {
    let mut old = database.connection().await;
    let begin =
        format!("SET application_name = '{application}'; BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1");
    Postgres::run(&mut old, &begin).await.unwrap();
    old
}

/// As many as 10 000 acquires and releases create.
async fn many_versions(database: &PostgresServer, name: &str) {
    let update = format!(
        "DO $$ BEGIN FOR i IN 1..20000 LOOP
            UPDATE distributed_lock SET owner = 'somebody' WHERE ctid = (SELECT ctid FROM distributed_lock
                WHERE lock_name >= '{name}' AND lock_name <= '{name}' ORDER BY lock_name DESC LIMIT 1);
            COMMIT;
        END LOOP; END $$"
    );
    database.run(&update).await;
}

/// How many blocks of the table and its indexes each of `PAIRS` calls reads.
async fn blocks(database: &PostgresServer, call: impl AsyncFn(&Locks<Postgres>)) -> i64 {
    counted(database, BLOCKS, call).await
}

const BLOCKS: &str = "
    SELECT COALESCE(sum(heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read), 0)::bigint
    FROM pg_statio_user_tables WHERE relname = 'distributed_lock'";
/// What scans of the indexes return. It does not include the checks of the unique indexes.
const INDEX_ENTRIES: &str = "
    SELECT COALESCE(sum(idx_tup_read), 0)::bigint FROM pg_stat_user_indexes WHERE relname = 'distributed_lock'";

/// By how much a statistic grows with each of `PAIRS` calls.
async fn counted(database: &PostgresServer, statistic: &str, call: impl AsyncFn(&Locks<Postgres>)) -> i64 {
    let written = "SELECT COALESCE(sum(n_tup_upd), 0)::bigint FROM pg_stat_user_tables WHERE relname = 'distributed_lock'";
    // Sessions report their counts when they end.
    let settled = async || {
        let mut last = -1;
        eventually(PATIENCE, async || {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let now = database.number(statistic).await;
            std::mem::replace(&mut last, now) == now
        })
        .await;
    };
    settled().await;
    let (before, written_before) = (database.number(statistic).await, database.number(written).await);
    let pool = database.pool(2).await;
    let locks = Locks::new(pool.clone());
    for _ in 0..PAIRS {
        call(&locks).await;
    }
    locks.close().await;
    pool.close().await;
    let pairs = i64::try_from(PAIRS).unwrap();
    eventually(PATIENCE, async || database.number(written).await >= written_before + pairs).await;
    settled().await;
    (database.number(statistic).await - before) / pairs
}

async fn pair(locks: &Locks<Postgres>, name: &str) {
    locks.insert_lock(name).wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
}

async fn acquires_and_releases_do_not_read_all_versions(database: &PostgresServer) {
    pair(&database.locks().await, "hot").await;
    let _old = old_snapshot(database, "report").await;
    many_versions(database, "hot").await;
    let blocks = blocks(database, async |locks| pair(locks, "hot").await).await;
    assert!(blocks < FEW_BLOCKS, "{blocks} blocks a pair");
}

async fn batches_do_not_read_all_versions(database: &PostgresServer) {
    pair(&database.locks().await, "hot").await;
    let _old = old_snapshot(database, "report").await;
    many_versions(database, "hot").await;
    let names = ["hot", "a", "b", "c", "d", "e"];
    let blocks = blocks(database, async |locks| {
        join_all(names.map(|name| pair(locks, name))).await;
    })
    .await;
    assert!(blocks < 4 * FEW_BLOCKS, "{blocks} blocks each round");
}

/// Until then such a batch finds its rows in the plain way.
async fn large_batches_stop_reading_all_versions(database: &PostgresServer) {
    let mut names = vec!["hot".to_owned()];
    names.extend((0..30).map(|number| format!("name {number}")));
    let locks = database.locks().await;
    join_all(names.iter().map(|name| pair(&locks, name))).await;
    let _old = old_snapshot(database, "report").await;
    many_versions(database, "hot").await;
    let round = async |locks: &Locks<Postgres>| {
        join_all(names.iter().map(|name| pair(locks, name))).await;
    };
    let plain = counted(database, INDEX_ENTRIES, round).await;
    let is_seen = AtomicBool::new(false);
    let from_behind = counted(database, INDEX_ENTRIES, async |locks| {
        if !is_seen.swap(true, Ordering::Relaxed) {
            let report = locks.check().await.unwrap();
            assert!(report.warnings().iter().any(|warning| warning.contains("report")), "{report:?}");
        }
        round(locks).await;
    })
    .await;
    // A session that is granted many leases looks by itself after two thirds of the rounds.
    assert!(2 * from_behind < plain, "{plain} entries each round, and {from_behind} from behind");
}

async fn polls_do_not_read_all_versions(database: &PostgresServer) {
    let holder = database.locks().await;
    pair(&holder, "hot").await;
    let _old = old_snapshot(database, "report").await;
    many_versions(database, "hot").await;
    let _lease = holder.insert_lock("hot").acquire().await.unwrap();
    let blocks = blocks(database, async |locks| {
        assert!(locks.insert_lock("hot").try_acquire().await.unwrap().is_none());
        assert!(locks.info("hot").await.unwrap().unwrap().held_until.is_some());
        pair(locks, "another").await;
    })
    .await;
    assert!(blocks < FEW_BLOCKS, "{blocks} blocks each");
}

async fn row_locks_do_not_read_all_versions(database: &PostgresServer) {
    let lock = async |locks: &Locks<Postgres>| {
        locks.row_lock("hot").wait(PATIENCE).acquire().await.unwrap().commit().await.unwrap();
    };
    lock(&database.locks().await).await;
    let _old = old_snapshot(database, "report").await;
    many_versions(database, "hot").await;
    database.run("ANALYZE distributed_lock").await;
    let blocks = blocks(database, lock).await;
    assert!(blocks < FEW_BLOCKS, "{blocks} blocks each");
}

/// The second of two snapshots, when vacuum has freed the pages of the first: new versions go there
/// in the same order.
async fn a_snapshot_in_low_pages_and_in_high_ones(database: &PostgresServer) {
    pair(&database.locks().await, "hot").await;
    drop(old_snapshot(database, "report").await);
    let mut old = old_snapshot(database, "report").await;
    many_versions(database, "hot").await;
    old.execute("ROLLBACK").await.unwrap();
    database.run("VACUUM distributed_lock").await;
    old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1").await.unwrap();
    many_versions(database, "hot").await;
    let blocks = blocks(database, async |locks| pair(locks, "hot").await).await;
    assert!(blocks < FEW_BLOCKS, "{blocks} blocks a pair");
}

/// The warning of a check that contains these parts, if there is one.
async fn says<DB: lock_db::LockDatabase>(locks: &Locks<DB>, parts: &[&str]) -> Option<String> {
    let report = locks.check().await.unwrap();
    report.warnings().iter().find(|text| parts.iter().all(|part| text.contains(part))).cloned()
}

async fn check_names_the_session(database: &PostgresServer) {
    let locks = database.locks().await;
    pair(&locks, "hot").await;
    assert_eq!(says(&locks, &["old snapshot"]).await, None);
    let mut old = old_snapshot(database, "the report").await;
    let pid = Postgres::find_number(&mut old, "SELECT pg_backend_pid()::bigint").await.unwrap().unwrap();
    many_versions(database, "hot").await;
    let (pid, end) = (format!("session {pid} of "), format!("pg_terminate_backend({pid})"));
    let parts = [&*pid, "application 'the report'", "idle in transaction", "since ", &end];
    eventually(PATIENCE, async || says(&locks, &parts).await.is_some()).await;
    old.execute("ROLLBACK").await.unwrap();
    eventually(PATIENCE, async || says(&locks, &[&pid]).await.is_none()).await;
}

async fn check_names_a_prepared_transaction(database: &PostgresServer) {
    if database.text("SHOW max_prepared_transactions").await == "0" {
        return;
    }
    let locks = database.locks().await;
    pair(&locks, "hot").await;
    let name = format!("old {}", database.text("SELECT current_database()::text").await);
    let prepare = format!("BEGIN; SELECT txid_current(); PREPARE TRANSACTION '{name}'");
    Postgres::run(&mut database.connection().await, &prepare).await.unwrap();
    many_versions(database, "hot").await;
    let said = async || says(&locks, &[&name, "ROLLBACK PREPARED"]).await.is_some();
    eventually(PATIENCE, said).await;
    database.run(&format!("ROLLBACK PREPARED '{name}'")).await;
}

async fn check_reports_what_a_role_may_not_see(database: &PostgresServer) {
    let owner = database.locks().await;
    pair(&owner, "hot").await;
    let mut old = old_snapshot(database, "report").await;
    let pid = Postgres::find_number(&mut old, "SELECT pg_backend_pid()::bigint").await.unwrap().unwrap();
    many_versions(database, "hot").await;
    let role = format!("role_{}", database.text("SELECT current_database()::text").await);
    database
        .run(&format!(
            "CREATE ROLE \"{role}\"; GRANT SELECT, INSERT, UPDATE ON distributed_lock TO \"{role}\""
        ))
        .await;
    let options = sqlx::pool::PoolOptions::<Postgres>::new().max_connections(2).after_connect({
        let role = role.clone();
        move |connection, _| {
            let set = format!("SET ROLE \"{role}\"");
            Box::pin(async move { Postgres::run(connection, &set).await.map(drop) })
        }
    });
    let pool = options.connect(database.url()).await.unwrap();
    let locks = Locks::new(pool.clone());
    let parts = [&*format!("session {pid} of "), "application 'report'", "pg_read_all_stats"];
    eventually(PATIENCE, async || says(&locks, &parts).await.is_some()).await;
    locks.close().await;
    pool.close().await;
    database.run(&format!("DROP OWNED BY \"{role}\"; DROP ROLE \"{role}\"")).await;
}

async fn a_slow_session_names_the_owner_of_the_snapshot(database: &PostgresServer) {
    let log = log();
    pair(&database.locks().await, "hot").await;
    let application = format!("report of {}", database.text("SELECT current_database()::text").await);
    let _old = old_snapshot(database, &application).await;
    many_versions(database, "hot").await;
    let locks = database.locks().await;
    let told = async || log.of(&application).len();
    eventually(PATIENCE, async || {
        for _ in 0..100 {
            pair(&locks, "hot").await;
        }
        told().await > 0
    })
    .await;
    for _ in 0..2_500 {
        pair(&locks, "hot").await;
    }
    assert_eq!(told().await, 1, "{:?}", log.of(&application));
}

async fn check_names_the_connection<T: TestServer>(database: &T) {
    let locks = database.locks().await;
    locks.insert_lock("hot").acquire().await.unwrap().release().await.unwrap();
    let mut old = database.connection().await;
    T::Database::run(&mut old, "START TRANSACTION WITH CONSISTENT SNAPSHOT").await.unwrap();
    let id =
        T::Database::find_number(&mut old, "SELECT CAST(CONNECTION_ID() AS SIGNED)").await.unwrap().unwrap();
    let (id, kill) = (format!("connection {id} of "), format!("KILL {id}"));
    let mut writer = database.connection().await;
    eventually(PATIENCE, async || {
        for value in 0..500 {
            let update = format!("UPDATE distributed_lock SET owner = '{value}' WHERE lock_name = 'hot'");
            T::Database::run(&mut writer, &update).await.unwrap();
        }
        says(&locks, &[&id, &kill, "history list length"]).await.is_some()
    })
    .await;
    T::Database::run(&mut old, "ROLLBACK").await.unwrap();
    eventually(PATIENCE, async || says(&locks, &[&id]).await.is_none()).await;
}

async fn check_reports_what_an_account_may_not_see<T: TestServer>(database: &T) {
    drop(database.locks().await);
    let name = database.text("SELECT CONVERT(DATABASE() USING utf8mb4)").await;
    let account: String = format!("u_{}", &name[name.len().saturating_sub(20)..]);
    database.run(&format!("CREATE USER '{account}'@'%'")).await;
    database.run(&format!("GRANT SELECT, INSERT, UPDATE ON `{name}`.* TO '{account}'@'%'")).await;
    let url = database.url().replacen("root@", &format!("{account}@"), 1);
    let pool = lock_tests::pool::<T::Database>(&url, 2).await;
    let locks = Locks::new(pool.clone());
    assert!(says(&locks, &["GRANT PROCESS"]).await.is_some());
    locks.close().await;
    pool.close().await;
    database.run(&format!("DROP USER '{account}'@'%'")).await;
}

async fn check_reports_a_reader(database: &SqliteFile) {
    database.run("PRAGMA journal_mode = WAL").await;
    let locks = database.locks().await;
    database.run("CREATE TABLE business (content)").await;
    let mut reader = database.connection().await;
    reader.execute("BEGIN; SELECT COUNT(*) FROM business").await.unwrap();
    for _ in 0..20 {
        database.run("INSERT INTO business VALUES (randomblob(1000000))").await;
    }
    assert!(says(&locks, &["WAL", "reads stays open"]).await.is_some());
    reader.execute("ROLLBACK").await.unwrap();
    assert_eq!(says(&locks, &["reads stays open"]).await, None);
}

/// The warnings of this program, whose sessions have threads of their own.
fn log() -> &'static Log {
    static LOG: OnceLock<Log> = OnceLock::new();
    LOG.get_or_init(|| {
        let log = Log::default();
        tracing::subscriber::set_global_default(log.clone()).unwrap();
        log
    })
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn of(&self, part: &str) -> Vec<String> {
        self.0.lock().unwrap().iter().filter(|text| text.contains(part)).cloned().collect()
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::WARN
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().push(text.0);
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = write!(self.0, "{field}={value:?} ");
    }
}
