//! The program on every database, as a shell starts it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::process::{Output, Stdio};
use std::time::Duration;

use lock_db::Loss;
use lock_tests::TestDatabase;
use tokio::process::Command;

lock_tests::cases! {
    on every database:
    a_table_is_made_and_checked,
    locks_are_listed_for_people_and_for_scripts,
    a_lock_is_shown,
    a_lease_is_ended_by_its_number,
    unused_rows_are_removed;

    without a database:
    wrong_arguments_are_told_from_a_wrong_database (current_thread);
}

const HOUR: Duration = Duration::from_hours(1);

async fn lock_db(url: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lock-db"));
    command.args(arguments).env_remove("DATABASE_URL").stdin(Stdio::null());
    if !url.is_empty() {
        command.env("DATABASE_URL", url);
    }
    command.output().await.unwrap()
}

fn text(output: &[u8]) -> &str {
    std::str::from_utf8(output).unwrap()
}

/// What it prints when it ends with this status.
async fn printed(url: &str, arguments: &[&str], status: i32) -> String {
    let output = lock_db(url, arguments).await;
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {output:?}");
    let (out, error) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(error.is_empty(), status == 0, "{arguments:?}: {error}");
    format!("{out}{error}")
}

async fn a_table_is_made_and_checked<T: TestDatabase>(database: &T) {
    let failed = printed(database.url(), &["list"], 1).await;
    assert!(failed.contains("distributed_lock"), "{failed}");
    for _ in 0..2 {
        assert_eq!(printed(database.url(), &["migrate"], 0).await, "");
    }
    let report = printed(database.url(), &["check"], 0).await;
    let product = match T::NAME {
        "postgres" => "PostgreSQL ",
        "mysql" => "MySQL ",
        "mariadb" => "MariaDB ",
        _ => "SQLite ",
    };
    assert!(report.starts_with(product) && report.contains("locks can be kept"), "{report}");
    let json: serde_json::Value =
        serde_json::from_str(&printed(database.url(), &["check", "--json"], 0).await).unwrap();
    assert!(json["server"].as_str().unwrap().starts_with(product), "{json}");
    // The address as an argument, before the command.
    let list = printed("", &["--database-url", database.url(), "list"], 0).await;
    assert!(list.contains("NAME"), "{list}");
}

async fn locks_are_listed_for_people_and_for_scripts<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let held = locks.insert_lock("order:1").ttl(HOUR).acquire().await.unwrap();
    for name in ["order:2", "order:3", "other", "line\nfeed"] {
        locks.insert_lock(name).acquire().await.unwrap().release().await.unwrap();
    }
    let list = printed(database.url(), &["list"], 0).await;
    assert_eq!(list.trim_end().lines().count(), 6, "{list}");
    assert!(list.contains("line\\nfeed") && list.contains(locks.owner()), "{list}");
    let list = printed(database.url(), &["list", "order:*", "--held"], 0).await;
    assert!(list.contains("order:1") && !list.contains("order:2"), "{list}");

    let json = printed(database.url(), &["list", "order:*", "--json", "--limit", "2"], 0).await;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let names: Vec<_> = json.as_array().unwrap().iter().map(|lock| lock["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["order:1", "order:2"]);
    assert_eq!(json[0]["owner"], locks.owner());
    assert_eq!(json[0]["fencing_token"], held.fencing_token());
    let json = printed(database.url(), &["list", "order:*", "--json", "--after", "order:2"], 0).await;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((json.as_array().unwrap().len(), &json[0]["name"]), (1, &"order:3".into()));
    let none = printed(database.url(), &["list", "nothing*", "--json"], 0).await;
    assert_eq!(none.trim(), "[]");
}

async fn a_lock_is_shown<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let lease = locks.insert_lock("job").ttl(HOUR).acquire().await.unwrap();
    let shown = printed(database.url(), &["show", "job"], 0).await;
    let number = lease.fencing_token().to_string();
    for part in ["name", "job", "held by", locks.owner(), "number", &number, "expires in", "59m"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert!(!shown.contains(lease.secret_key()));
    let json = printed(database.url(), &["show", "job", "--json"], 0).await;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["fencing_token"], lease.fencing_token());
    let unknown = printed(database.url(), &["show", "unknown"], 3).await;
    assert!(unknown.contains("no lock unknown"), "{unknown}");
    lease.release().await.unwrap();
    let shown = printed(database.url(), &["show", "job"], 0).await;
    assert!(shown.contains("last holder") && !shown.contains("held by"), "{shown}");
}

async fn a_lease_is_ended_by_its_number<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let lease = locks.insert_lock("job").ttl(Duration::from_secs(3)).acquire().await.unwrap();
    let number = lease.fencing_token();
    for wrong in [number - 1, number + 1, -1] {
        let refused = printed(database.url(), &["release", "job", "--token", &wrong.to_string()], 3).await;
        assert!(refused.contains("nothing was released"), "{refused}");
    }
    assert!(lease.is_held());
    let freed = printed(database.url(), &["release", "job", "--token", &number.to_string()], 0).await;
    assert!(freed.contains("job is free"), "{freed}");
    tokio::time::timeout(Duration::from_mins(1), lease.lost()).await.unwrap();
    assert_eq!(lease.loss(), Some(Loss::ForceReleased));
    printed(database.url(), &["release", "job", "--token", &number.to_string()], 3).await;
    printed(database.url(), &["release", "unknown", "--token", "1"], 3).await;
    locks.row_lock("row").acquire().await.unwrap().commit().await.unwrap();
    let refused = printed(database.url(), &["release", "row", "--token", "1"], 1).await;
    assert!(refused.contains("row"), "{refused}");
}

async fn unused_rows_are_removed<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    for name in ["old", "new"] {
        locks.insert_lock(name).acquire().await.unwrap().release().await.unwrap();
    }
    database
        .run(
            "UPDATE distributed_lock SET create_time = '2020-01-01 00:00:00.000000',
                acquire_time = '2020-01-01 00:00:00.000000', fencing_token = 1577836800000000 WHERE lock_name = 'old'",
        )
        .await;
    let pruned = printed(database.url(), &["prune", "--older-than", "30d"], 0).await;
    assert_eq!(pruned.trim(), "removed 1 row");
    let names = printed(database.url(), &["list", "*"], 0).await;
    assert!(names.contains("new") && !names.contains("old"), "{names}");
}

async fn wrong_arguments_are_told_from_a_wrong_database() {
    for arguments in [
        &["list", "--limit", "0"][..],
        &["list", "a", "b"],
        &["release", "job"],
        &["prune", "--older-than", "soon"],
        &["unknown"],
        &[],
    ] {
        let output = lock_db("sqlite://none.db", arguments).await;
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
    }
    let missing = printed("", &["list"], 1).await;
    assert!(missing.contains("DATABASE_URL"), "{missing}");
    for url in
        ["redis://localhost", "nonsense", "postgres://me:secret@[::1", "sqlite:///no/such/folder/locks.db"]
    {
        let failed = printed(url, &["list"], 1).await;
        assert!(!failed.contains("secret"), "{failed}");
    }
    let help = lock_db("postgres://me:secret@localhost/db", &["--help"]).await;
    assert!(help.status.success() && !text(&help.stdout).contains("secret"));
}

fn main() -> std::process::ExitCode {
    lock_tests::run([cases()], [])
}
