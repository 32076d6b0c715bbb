//! What does not pass by itself is said at once, however long the wait is.

use std::time::Duration;

use lock_db::Locks;
use lock_tests::{Backend, TestDatabase, TestServer};
use sqlx::Pool;
use sqlx::pool::PoolOptions;
use tokio::time::timeout;
use url::Url;

use super::accounts::with_account;
use super::requests::{Request, Requests, assert_none};

lock_tests::cases! {
    on every server:
    permanent_obstacles_fail_immediately,
    permanent_obstacles_of_batches_fail_immediately,
    missing_privileges_fail_immediately,
    missing_privileges_of_batches_fail_immediately,
    a_role_that_may_not_log_in_fails_immediately,
    a_role_that_may_not_log_in_fails_batches_immediately;

    on sqlite:
    a_file_that_cannot_be_written_fails_immediately,
    a_file_that_cannot_be_written_fails_batches_immediately,
}

/// "At once": far less than the wait, and more than a busy machine takes.
const SOON: Duration = Duration::from_secs(30);
const WAIT: Duration = Duration::from_mins(10);

/// Whether a transaction of the caller can be begun at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Connects {
    Yes,
    No,
}

/// How the requests are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    OneByOne,
    /// So that several of them may be answered by one attempt.
    Together,
}

async fn ask<DB: Backend>(how: How, pool: Pool<DB>, connects: Connects, why: &str) -> Vec<String> {
    let requests: Vec<Request> = Request::all(&[WAIT])
        .into_iter()
        .filter(|request| connects == Connects::Yes || !request.way.is_in_transaction())
        .collect();
    let locks = Locks::new(pool.clone());
    let groups = if how == How::Together { vec![&*requests] } else { requests.chunks(1).collect() };
    let mut wrong = Vec::new();
    for group in groups {
        let asking = Requests::prepare(&locks, &pool, group, |request| format!("{request:?}")).await;
        match timeout(SOON, asking.ask()).await {
            Ok(answers) => wrong.extend(answers.not_refused(why)),
            Err(_) => wrong.push(format!("{why}: {group:?}: not within {SOON:?}")),
        }
    }
    wrong
}

fn pool_of<DB: Backend>(url: &str) -> Pool<DB> {
    PoolOptions::new().max_connections(30).acquire_timeout(WAIT).connect_lazy(url).unwrap()
}

/// With this sent on each new connection.
fn pool_with<DB: Backend>(url: &str, sql: &'static str) -> Pool<DB> {
    PoolOptions::new()
        .max_connections(30)
        .acquire_timeout(WAIT)
        .after_connect(move |connection, _| Box::pin(async move { DB::run(connection, sql).await.map(drop) }))
        .connect_lazy(url)
        .unwrap()
}

fn with_database(url: &str, name: &str) -> String {
    let mut url = Url::parse(url).unwrap();
    url.set_path(name);
    url.into()
}

async fn what_does_not_pass_for<T: TestServer>(database: &T, how: How) {
    drop(database.locks().await);
    let url = database.url();
    let mut wrong = ask::<T::Database>(
        how,
        pool_of(&with_database(url, "lock_db_test_no_such_database")),
        Connects::No,
        "no such database",
    )
    .await;

    let mut no_such_account = Url::parse(url).unwrap();
    no_such_account.set_username("lock_db_test_nobody").unwrap();
    no_such_account.set_password(Some("wrong")).unwrap();
    wrong.extend(
        ask::<T::Database>(how, pool_of(no_such_account.as_str()), Connects::No, "no such account").await,
    );

    let read_only = if T::NAME == "postgres" {
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"
    } else {
        "SET SESSION TRANSACTION READ ONLY"
    };
    wrong.extend(ask::<T::Database>(how, pool_with(url, read_only), Connects::Yes, "read-only").await);
    assert_none(&wrong);
}

async fn missing_rights_for<T: TestServer>(database: &T, how: How) {
    drop(database.locks().await);
    let mut wrong = Vec::new();
    for rights in [&["SELECT"][..], &["SELECT", "INSERT"], &["SELECT", "INSERT", "DELETE"]] {
        with_account(database, "", rights, async |account| {
            let pool = pool_of::<T::Database>(&account.url(database.url()));
            wrong.extend(ask(how, pool, Connects::Yes, &format!("only {rights:?}")).await);
        })
        .await;
    }
    with_account(database, "", &[], async |account| {
        let url = account.url(database.url());
        // On PostgreSQL everybody may connect.
        let connects = if T::NAME == "postgres" { Connects::Yes } else { Connects::No };
        wrong.extend(ask(how, pool_of::<T::Database>(&url), connects, "no right").await);
        if T::NAME != "postgres" {
            // That server asks nobody for a password.
            let url = account.url_with_password(database.url(), "wrong");
            wrong.extend(ask(how, pool_of::<T::Database>(&url), Connects::No, "wrong password").await);
        }
    })
    .await;
    assert_none(&wrong);
}

async fn a_role_that_may_not_log_in_for<T: TestServer>(database: &T, how: How) {
    drop(database.locks().await);
    let mut wrong = Vec::new();
    let options = if T::NAME == "postgres" { "NOLOGIN" } else { "ACCOUNT LOCK" };
    with_account(database, options, &["SELECT", "INSERT", "UPDATE", "DELETE"], async |account| {
        let pool = pool_of::<T::Database>(&account.url(database.url()));
        wrong.extend(ask(how, pool, Connects::No, "may not log in").await);
    })
    .await;
    assert_none(&wrong);
}

async fn a_file_that_can_not_be_written_for<T: TestDatabase>(database: &T, how: How) {
    drop(database.locks().await);
    let url = |mode: &str| database.url().replace("mode=rwc", mode);
    let missing = url("mode=rw").replace("test.db", "missing.db");
    let no_folder = url("mode=rwc").replace("test.db", "no_such_folder/test.db");
    let mut wrong = ask::<T::Database>(how, pool_of(&missing), Connects::No, "no such file").await;
    wrong.extend(ask::<T::Database>(how, pool_of(&no_folder), Connects::No, "no such folder").await);
    wrong.extend(ask::<T::Database>(how, pool_of(&url("mode=ro")), Connects::Yes, "read-only").await);
    let query_only = pool_with(database.url(), "PRAGMA query_only = 1");
    wrong.extend(ask::<T::Database>(how, query_only, Connects::Yes, "query-only").await);
    assert_none(&wrong);
}

async fn permanent_obstacles_fail_immediately<T: TestServer>(database: &T) {
    what_does_not_pass_for(database, How::OneByOne).await;
}

async fn permanent_obstacles_of_batches_fail_immediately<T: TestServer>(database: &T) {
    what_does_not_pass_for(database, How::Together).await;
}

async fn missing_privileges_fail_immediately<T: TestServer>(database: &T) {
    missing_rights_for(database, How::OneByOne).await;
}

async fn missing_privileges_of_batches_fail_immediately<T: TestServer>(database: &T) {
    missing_rights_for(database, How::Together).await;
}

async fn a_role_that_may_not_log_in_fails_immediately<T: TestServer>(database: &T) {
    a_role_that_may_not_log_in_for(database, How::OneByOne).await;
}

async fn a_role_that_may_not_log_in_fails_batches_immediately<T: TestServer>(database: &T) {
    a_role_that_may_not_log_in_for(database, How::Together).await;
}

async fn a_file_that_cannot_be_written_fails_immediately<T: TestDatabase>(database: &T) {
    a_file_that_can_not_be_written_for(database, How::OneByOne).await;
}

async fn a_file_that_cannot_be_written_fails_batches_immediately<T: TestDatabase>(database: &T) {
    a_file_that_can_not_be_written_for(database, How::Together).await;
}
