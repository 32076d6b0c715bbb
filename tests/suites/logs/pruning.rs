//! The search for unused rows in the background, where it can't remove any.

use std::time::{Duration, Instant};

use lock_db::Locks;
use lock_tests::{Backend, OwnServer, TestServer, account, eventually, migrated, pool, record_logs, warned};
use sqlx::{Connection, MySql, Postgres};

lock_tests::cases! {
    on every server:
    a_session_that_may_not_delete_warns_once;

    without a database:
    a_read_only_server_is_no_warning_on_postgres (two_workers),
    a_read_only_server_is_no_warning_on_mariadb (two_workers),
    a_read_only_server_is_no_warning_on_mysql (two_workers),
}

const PATIENCE: Duration = Duration::from_mins(1);
/// The longest time between two searches of a session with the shortest `prune_after`.
const INTERVAL: Duration = Duration::from_secs(15);

const NOT_REMOVED: &str = "rows that were not used for long can't be removed";
const AGE: &str = "
UPDATE distributed_lock SET create_time = '2020-01-01 00:00:00', acquire_time = '2020-01-01 00:00:00', fencing_token = 1
WHERE lock_name = 'unused'";
const UNUSED: &str = "SELECT COUNT(*) FROM distributed_lock WHERE lock_name = 'unused'";

/// The session stops to search, and its locks work on.
async fn a_session_that_may_not_delete_warns_once<T: TestServer>(database: &T) {
    record_logs();
    let owner = database.locks().await;
    owner.insert_lock("unused").acquire().await.unwrap().release().await.unwrap();
    owner.close().await;
    let (url, account, _at_end) = account(database).await;
    let table = if T::NAME == "postgres" {
        "distributed_lock".to_owned()
    } else {
        format!("{}.distributed_lock", database.url().rsplit('/').next().unwrap())
    };
    database.run(&format!("GRANT SELECT, INSERT, UPDATE ON {table} TO {account}")).await;
    database.run(AGE).await;
    let pool = pool::<T::Database>(&url, 4).await;
    let locks = Locks::builder(pool.clone()).prune_after(Duration::from_secs(1)).build();
    locks.insert_lock("newest").acquire().await.unwrap().release().await.unwrap();
    // PostgreSQL names no account. No other session of this process searches there without the right.
    let denied = if T::NAME == "postgres" {
        "permission denied for table distributed_lock".to_owned()
    } else {
        account.trim_end_matches("@'%'").to_owned()
    };
    let told = || {
        let told = warned(NOT_REMOVED).into_iter();
        told.filter(|line| line.contains(&denied)).collect::<Vec<_>>()
    };
    eventually(PATIENCE, async || !told().is_empty()).await;
    let begun = "SELECT fencing_token FROM distributed_lock WHERE lock_name = 'lock_db.prune_after'";
    let searched = async || database.number(begun).await;
    let (since, last) = (Instant::now(), searched().await);
    let mut round = 0;
    // Another search would fail in its second statement, after a pause of a second.
    while since.elapsed() < INTERVAL + Duration::from_secs(3) {
        round += 1;
        for name in ["newest".to_owned(), format!("new {round}")] {
            locks.insert_lock(name).acquire().await.unwrap().release().await.unwrap();
        }
        locks.row_lock("row").acquire().await.unwrap().commit().await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(searched().await, last, "no other search has begun");
    let told = told();
    let [told] = &*told else { panic!("one warning: {told:?}") };
    assert!(told.contains("grant DELETE on it") && told.contains("prune_after(None)"), "{told}");
    assert_eq!(database.number(UNUSED).await, 1);
    locks.close().await;
    pool.close().await;
}

/// A search can't begin there, so nothing is wrong with the rights. It begins when the server can be
/// written.
async fn a_read_only_server_is_no_warning<DB: Backend>(
    administrator: &mut DB::Connection,
    url: &str,
    set_read_only: impl Fn(bool) -> Vec<String>,
) {
    record_logs();
    let owner = migrated(Locks::new(pool::<DB>(url, 2).await)).await;
    for name in ["unused", "newest"] {
        owner.insert_lock(name).acquire().await.unwrap().release().await.unwrap();
    }
    owner.close().await;
    let mut connection = DB::Connection::connect(url).await.unwrap();
    DB::run(&mut connection, AGE).await.unwrap();

    let locks = Locks::builder(pool::<DB>(url, 2).await).prune_after(Duration::from_secs(1)).build();
    let begun = Instant::now();
    locks.insert_lock("newest").acquire().await.unwrap().release().await.unwrap();
    let is_refused = async || locks.insert_lock("newest").try_acquire().await.is_err();
    let mut switch = async |is_read_only| {
        for sql in set_read_only(is_read_only) {
            DB::run(administrator, &sql).await.unwrap();
        }
        eventually(PATIENCE, async || is_refused().await == is_read_only).await;
    };
    switch(true).await;
    while begun.elapsed() < INTERVAL + Duration::from_secs(1) {
        assert!(is_refused().await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(DB::find_number(&mut connection, UNUSED).await.unwrap(), Some(1));
    switch(false).await;
    eventually(PATIENCE, async || DB::find_number(&mut connection, UNUSED).await.unwrap() == Some(0)).await;
    // The other case is about rights, and each of its lines says so.
    let mut told = warned(NOT_REMOVED);
    told.retain(|line| !line.contains("denied"));
    assert_eq!(told, Vec::<String>::new());
    locks.close().await;
}

async fn a_read_only_server_is_no_warning_on_postgres() {
    OwnServer::need("postgres");
    let server = OwnServer::new("postgres", false).await;
    server.is_back::<Postgres>().await;
    let url = server.url();
    let mut administrator = sqlx::PgConnection::connect(url.as_str()).await.unwrap();
    let set_read_only = |on: bool| {
        vec![
            format!("ALTER SYSTEM SET default_transaction_read_only = {on}"),
            "SELECT pg_reload_conf()".into(),
        ]
    };
    a_read_only_server_is_no_warning::<Postgres>(&mut administrator, url.as_str(), set_read_only).await;
}

async fn a_read_only_server_is_no_warning_on(kind: &'static str) {
    OwnServer::need(kind);
    let server = OwnServer::new(kind, false).await;
    server.is_back::<MySql>().await;
    let mut url = server.url();
    let mut administrator = sqlx::MySqlConnection::connect(url.as_str()).await.unwrap();
    // An account that a read-only server does not allow to write.
    for sql in [
        "CREATE DATABASE app",
        "CREATE USER 'app'@'%' IDENTIFIED BY 'secret'",
        "GRANT ALL ON app.* TO 'app'@'%'",
    ] {
        MySql::run(&mut administrator, sql).await.unwrap();
    }
    url.set_username("app").unwrap();
    url.set_password(Some("secret")).unwrap();
    url.set_path("app");
    let set_read_only = |on: bool| vec![format!("SET GLOBAL read_only = {on}")];
    a_read_only_server_is_no_warning::<MySql>(&mut administrator, url.as_str(), set_read_only).await;
}

async fn a_read_only_server_is_no_warning_on_mariadb() {
    a_read_only_server_is_no_warning_on("mariadb").await;
}

async fn a_read_only_server_is_no_warning_on_mysql() {
    a_read_only_server_is_no_warning_on("mysql").await;
}
