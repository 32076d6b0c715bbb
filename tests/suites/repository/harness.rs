//! The harness itself: what the other suites rely on.

use std::env;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use lock_tests::{
    Activity, Backend, CaseRuntime, Direction, Parent, Process, TestDatabase, TestServer, connection,
    eventually, note, run_case,
};
use sqlx::Connection;
use tokio::time::timeout;

const SHORT: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(20);

lock_tests::cases! {
    on every database:
    each_test_has_a_database_of_its_own,
    a_database_in_use_is_dropped,
    a_database_is_dropped_when_its_test_panics,
    activity_is_seen,
    a_child_follows_its_parent (current_thread),
    a_child_is_killed,
    a_child_is_stopped_and_continued,
    a_child_ends_with_its_handle;

    on every server:
    waiting_is_seen,
    connections_are_ended,
    a_proxy_delays,
    a_proxy_holds_and_lets_go,
    a_proxy_cuts,
    a_proxy_loses_an_answer_but_not_the_deed,
    a_proxy_refuses,
    a_proxy_swallows,
    a_proxy_counts,
    a_proxy_does_not_need_the_runtime (current_thread);

    without a database:
    a_case_without_its_server_is_ignored,
    a_case_without_a_required_server_fails,
    what_never_happens_fails_with_its_line (current_thread),
    a_failure_shows_the_panics_of_its_case,
    filters_are_those_of_the_standard_runner,
    a_case_that_may_fail (two_workers),
}

lock_tests::child_roles! { counter }

// --------------------------------------------------------------------------------------- databases

async fn each_test_has_a_database_of_its_own<T: TestDatabase>(database: &T) {
    let other = T::create().await;
    for database in [database, &other] {
        database.run("CREATE TABLE likes (count BIGINT NOT NULL, who VARCHAR(20))").await;
    }
    assert_eq!(database.run("INSERT INTO likes VALUES (3, 'Ada'), (4, NULL)").await, 2);
    assert_eq!(database.number("SELECT count(*) FROM likes").await, 2);
    assert_eq!(database.text("SELECT who FROM likes WHERE count = 3").await, "Ada");
    assert_eq!(database.find_text("SELECT who FROM likes WHERE count = 4").await, None);
    assert_eq!(other.find_number("SELECT count FROM likes").await, None);

    let mut own = database.connection().await;
    assert_eq!(
        T::Database::numbers(&mut own, "SELECT count FROM likes ORDER BY count").await.unwrap(),
        [3, 4]
    );
}

async fn a_database_in_use_is_dropped<T: TestDatabase>(_: &T) {
    let other = T::create().await;
    other.run("CREATE TABLE likes (count BIGINT NOT NULL)").await;
    let mut business = other.connection().await;
    let mut transaction = business.begin().await.unwrap();
    T::Database::run(&mut transaction, "INSERT INTO likes VALUES (1)").await.unwrap();

    let url = other.url().to_owned();
    drop(other);
    assert_gone::<T>(&url).await;
}

async fn a_database_is_dropped_when_its_test_panics<T: TestDatabase>(_: &T) {
    let (tell, told) = mpsc::channel();
    let panicking = thread::spawn(move || {
        run_case(CaseRuntime::CurrentThread, async |database: &T| {
            tell.send(database.url().to_owned()).unwrap();
            let _open = database.connection().await;
            panic!("as a failing assertion does");
        });
    });
    let panicked = tokio::task::spawn_blocking(|| panicking.join()).await.unwrap();
    assert!(panicked.is_err(), "a panic of the case must fail the test");
    assert_gone::<T>(&told.recv().unwrap()).await;
}

async fn assert_gone<T: TestDatabase>(url: &str) {
    let again = <T::Database as sqlx::Database>::Connection::connect(url).await;
    assert!(again.is_err(), "{url} is still there");
}

async fn activity_is_seen<T: TestDatabase>(database: &T) {
    let nothing = Activity { connections: 0, transactions: 0, waiting: 0 };
    assert_eq!(database.activity().await, nothing);

    database.run("CREATE TABLE likes (count BIGINT NOT NULL)").await;
    let mut idle = database.connection().await;
    let mut business = database.connection().await;
    T::Database::run(&mut idle, "SELECT 1").await.unwrap();
    let mut transaction = business.begin().await.unwrap();
    T::Database::run(&mut transaction, "INSERT INTO likes VALUES (1)").await.unwrap();
    assert_eq!(database.activity().await, Activity { connections: 2, transactions: 1, waiting: 0 });

    transaction.commit().await.unwrap();
    eventually(LONG, async || database.activity().await.transactions == 0).await;
    business.close().await.unwrap();
    idle.close().await.unwrap();
    eventually(LONG, async || database.activity().await == nothing).await;
}

async fn waiting_is_seen<T: TestServer>(database: &T) {
    database.run("CREATE TABLE likes (count BIGINT NOT NULL)").await;
    database.run("INSERT INTO likes VALUES (1)").await;
    let lock = "SELECT count FROM likes FOR UPDATE";
    let mut first = database.connection().await;
    let mut second = database.connection().await;
    let mut holding = first.begin().await.unwrap();
    T::Database::find_number(&mut holding, lock).await.unwrap();
    let mut waiting = second.begin().await.unwrap();
    let (found, ()) = tokio::join!(T::Database::find_number(&mut waiting, lock), async {
        let expected = Activity { connections: 2, transactions: 2, waiting: 1 };
        eventually(LONG, async || database.activity().await == expected).await;
        holding.rollback().await.unwrap();
    });
    assert_eq!(found.unwrap(), Some(1));
}

async fn connections_are_ended<T: TestServer>(database: &T) {
    let mut victim = database.connection().await;
    assert_eq!(T::Database::find_number(&mut victim, "SELECT 7").await.unwrap(), Some(7));
    database.end_connections().await;
    assert!(T::Database::find_number(&mut victim, "SELECT 7").await.is_err());
    assert_eq!(database.number("SELECT 7").await, 7);
    eventually(LONG, async || database.activity().await.connections == 0).await;
}

// ------------------------------------------------------------------------------------------- proxy

async fn a_proxy_delays<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let mut connection = connection::<T::Database>(&database.url_by(proxy.address())).await;
    proxy.delay(Direction::ToServer, SHORT);
    assert!(time_of_a_question::<T>(&mut connection).await >= SHORT);
    proxy.delay(Direction::ToClient, SHORT);
    assert!(time_of_a_question::<T>(&mut connection).await >= 2 * SHORT);
    proxy.delay(Direction::ToServer, Duration::ZERO);
    proxy.delay(Direction::ToClient, Duration::ZERO);
    let mut fastest = LONG;
    for _ in 0..20 {
        fastest = fastest.min(time_of_a_question::<T>(&mut connection).await);
    }
    assert!(fastest < SHORT, "{fastest:?}");
}

async fn time_of_a_question<T: TestDatabase>(
    connection: &mut <T::Database as sqlx::Database>::Connection,
) -> Duration {
    let start = Instant::now();
    assert_eq!(T::Database::find_number(connection, "SELECT 7").await.unwrap(), Some(7));
    start.elapsed()
}

async fn a_proxy_holds_and_lets_go<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let mut connection = connection::<T::Database>(&database.url_by(proxy.address())).await;
    for direction in [Direction::ToServer, Direction::ToClient] {
        proxy.pause(direction);
        let mut question = Box::pin(T::Database::find_number(&mut connection, "SELECT 7"));
        assert!(timeout(SHORT, &mut question).await.is_err());
        assert!(proxy.held(direction) > 0);
        proxy.resume(direction);
        assert_eq!(question.await.unwrap(), Some(7));
        assert_eq!(proxy.held(direction), 0);
    }
}

async fn a_proxy_cuts<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let mut connection = connection::<T::Database>(&database.url_by(proxy.address())).await;
    assert_eq!(database.activity().await.connections, 1);
    proxy.cut();
    assert!(T::Database::find_number(&mut connection, "SELECT 7").await.is_err());
    eventually(LONG, async || database.activity().await.connections == 0).await;
    eventually(LONG, async || proxy.open() == 0).await;
    lock_tests::connection::<T::Database>(&database.url_by(proxy.address())).await;
}

async fn a_proxy_loses_an_answer_but_not_the_deed<T: TestServer>(database: &T) {
    database.run("CREATE TABLE likes (count BIGINT NOT NULL)").await;
    let proxy = database.proxy();
    let mut connection = connection::<T::Database>(&database.url_by(proxy.address())).await;
    proxy.pause(Direction::ToClient);
    let (answer, ()) =
        tokio::join!(T::Database::run(&mut connection, "INSERT INTO likes VALUES (1)"), async {
            eventually(LONG, async || proxy.held(Direction::ToClient) > 0).await;
            proxy.cut();
        });
    assert!(answer.is_err());
    assert_eq!(database.number("SELECT count(*) FROM likes").await, 1);
}

async fn a_proxy_refuses<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let url = database.url_by(proxy.address());
    let mut open = connection::<T::Database>(&url).await;
    proxy.refuse();
    let refused = |error: &sqlx::Error| matches!(error, sqlx::Error::Io(error) if error.kind() == std::io::ErrorKind::ConnectionRefused);
    eventually(LONG, async || {
        let attempt = <T::Database as sqlx::Database>::Connection::connect(&url).await;
        attempt.is_err_and(|error| refused(&error))
    })
    .await;
    assert_eq!(T::Database::find_number(&mut open, "SELECT 7").await.unwrap(), Some(7));
    proxy.admit();
    eventually(LONG, async || <T::Database as sqlx::Database>::Connection::connect(&url).await.is_ok()).await;
}

async fn a_proxy_swallows<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let url = database.url_by(proxy.address());
    proxy.swallow();
    let connecting = <T::Database as sqlx::Database>::Connection::connect(&url);
    assert!(timeout(SHORT, connecting).await.is_err());
    assert_eq!(proxy.opened(), 1);
    assert_eq!(database.activity().await.connections, 0);
    proxy.admit();
    connection::<T::Database>(&url).await;
}

async fn a_proxy_counts<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let pool = lock_tests::pool::<T::Database>(&database.url_by(proxy.address()), 3).await;
    let mut connections = Vec::new();
    for _ in 0..3 {
        connections.push(pool.acquire().await.unwrap());
    }
    assert_eq!((proxy.opened(), proxy.open()), (3, 3));
    let before = proxy.reads(Direction::ToServer);
    for _ in 0..10 {
        T::Database::find_number(&mut connections[0], "SELECT 7").await.unwrap();
    }
    assert_eq!(proxy.reads(Direction::ToServer) - before, 10);
    drop(connections);
    pool.close().await;
    eventually(LONG, async || proxy.open() == 0).await;
    assert_eq!(proxy.opened(), 3);
}

async fn a_proxy_does_not_need_the_runtime<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let url = database.url_by(proxy.address());
    let elsewhere = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut connection = connection::<T::Database>(&url).await;
            T::Database::find_number(&mut connection, "SELECT 7").await.unwrap()
        })
    });
    assert_eq!(elsewhere.join().unwrap(), Some(7));
}

// --------------------------------------------------------------------------------------- processes

/// Prints what its argument evaluates to in the database, and then doubles each number that it
/// receives.
async fn counter<DB: Backend>(mut parent: Parent) {
    let mut connection = connection::<DB>(parent.url()).await;
    let number = DB::find_number(&mut connection, &format!("SELECT {}", parent.argument(1))).await.unwrap();
    parent.say(format_args!("{} {}", parent.argument(0), number.unwrap()));
    while let Some(line) = parent.hear().await {
        parent.say(2 * line.parse::<i64>().unwrap());
    }
}

async fn start_child<T: TestDatabase>(database: &T) -> Process {
    let mut child = Process::spawn("counter", database.url(), ["seven:", "3 + 4"]);
    child.expect("seven: 7").await;
    child
}

async fn a_child_follows_its_parent<T: TestDatabase>(database: &T) {
    let mut child = start_child(database).await;
    child.say("21");
    child.expect("42").await;
    child.say("-1");
    child.expect("-2").await;
    assert!(child.wait().await.success());
}

async fn a_child_is_killed<T: TestDatabase>(database: &T) {
    let mut child = start_child(database).await;
    let process = format!("/proc/{}", child.id());
    assert!(Path::new(&process).exists());
    assert_eq!(child.kill().signal(), Some(9));
    assert!(!Path::new(&process).exists());
    if T::NAME != "sqlite" {
        eventually(LONG, async || database.activity().await.connections == 0).await;
    }
}

async fn a_child_is_stopped_and_continued<T: TestDatabase>(database: &T) {
    let mut child = start_child(database).await;
    child.stop();
    child.say("21");
    assert!(timeout(SHORT, child.hear()).await.is_err());
    child.resume();
    child.expect("42").await;
}

async fn a_child_ends_with_its_handle<T: TestDatabase>(database: &T) {
    let child = start_child(database).await;
    let process = format!("/proc/{}", child.id());
    child.stop();
    drop(child);
    assert!(!Path::new(&process).exists());
}

// --------------------------------------------------------------------------------- without servers

/// Runs one of the cases above in an environment without servers.
fn run_without_servers(required: &str) -> Output {
    Command::new(env::current_exe().unwrap())
        .args(["harness::activity_is_seen::postgres", "--exact"])
        .env_remove("LOCK_DB_TEST_POSTGRES_URL")
        .env("LOCK_DB_TEST_REQUIRE", required)
        .output()
        .unwrap()
}

fn a_case_without_its_server_is_ignored() {
    let output = run_without_servers("sqlite");
    assert!(output.status.success());
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("ignored (LOCK_DB_TEST_POSTGRES_URL is not set"), "{said}");
    assert!(said.contains("0 passed; 0 failed; 1 ignored"), "{said}");
}

fn a_case_without_a_required_server_fails() {
    let output = run_without_servers("mariadb, postgres");
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("LOCK_DB_TEST_REQUIRE names postgres"), "{said}");
}

// ------------------------------------------------------------------------------------------ output

async fn what_never_happens_fails_with_its_line() {
    let failed = tokio::spawn(eventually(Duration::from_millis(50), async || false)).await.unwrap_err();
    let message = failed.into_panic().downcast::<String>().unwrap();
    assert!(message.contains("harness.rs"), "{message}");
}

/// The message of a panic, wherever it happened, is shown with the case.
fn a_failure_shows_the_panics_of_its_case() {
    let output = Command::new(env::current_exe().unwrap())
        .args(["harness::a_case_that_may_fail", "--exact"])
        .env(FAILS, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(101), "{said}");
    let (_, shown) = said.split_once("---- harness::a_case_that_may_fail ----").unwrap();
    for text in ["harness.rs", "a note", "a task fails", "the case fails"] {
        assert!(shown.contains(text), "{text}: {said}");
    }
}

/// Two filters, and one that excludes.
fn filters_are_those_of_the_standard_runner() {
    let output = Command::new(env::current_exe().unwrap())
        .args(["waiting_is_seen", "activity_is_seen", "--list", "--skip", "mysql"])
        .output()
        .unwrap();
    let listed: Vec<_> = std::str::from_utf8(&output.stdout).unwrap().lines().collect();
    let expected = [
        "harness::activity_is_seen::mariadb: test",
        "harness::activity_is_seen::postgres: test",
        "harness::activity_is_seen::sqlite: test",
        "harness::waiting_is_seen::mariadb: test",
        "harness::waiting_is_seen::postgres: test",
    ];
    assert_eq!(listed, expected);
}

/// Set in a process in which [`a_case_that_may_fail`] fails.
const FAILS: &str = "LOCK_TESTS_FAILS";

async fn a_case_that_may_fail() {
    if env::var_os(FAILS).is_none() {
        return;
    }
    note("a note");
    tokio::spawn(async { panic!("a task fails") }).await.unwrap_err();
    panic!("the case fails");
}
