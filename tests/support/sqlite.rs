use std::fs;
use std::path::PathBuf;

use sqlx::{Connection, Sqlite, SqliteConnection};
use tempfile::TempDir;
use tokio::sync::Mutex;

use crate::{Activity, Backend, TestDatabase};

/// A SQLite database for one test: a file in its own folder.
#[derive(Debug)]
pub struct SqliteFile {
    url: String,
    path: PathBuf,
    /// The harness's own connection to the database.
    observer: Mutex<SqliteConnection>,
    _folder: TempDir,
}

impl TestDatabase for SqliteFile {
    type Database = Sqlite;
    const NAME: &'static str = "sqlite";

    async fn create() -> Self {
        let folder =
            tempfile::Builder::new().prefix("lock-db-test-").tempdir().expect("makes a temporary folder");
        let path = folder.path().join("test.db");
        let url = format!("sqlite://{}?mode=rwc", path.display());
        let mut observer = SqliteConnection::connect(&url).await.expect("makes a database file");
        // SQLite creates the file with the first write. Other connections may open it without
        // `mode=rwc`.
        Sqlite::run(&mut observer, "PRAGMA user_version = 1").await.expect("writes to the database file");
        Self { url, path, observer: Mutex::new(observer), _folder: folder }
    }

    fn url(&self) -> &str {
        &self.url
    }

    async fn activity(&self) -> Activity {
        let mut observer = self.observer.lock().await;
        Sqlite::run(&mut observer, "PRAGMA busy_timeout = 0").await.expect("sets the timeout");
        let is_locked = match Sqlite::run(&mut observer, "BEGIN IMMEDIATE; ROLLBACK").await {
            Ok(_) => false,
            Err(sqlx::Error::Database(error)) if error.message() == "database is locked" => true,
            Err(error) => panic!("cannot find out whether somebody writes: {error}"),
        };
        Sqlite::run(&mut observer, "PRAGMA busy_timeout = 5000").await.expect("sets the timeout");
        Activity {
            connections: self.open_files().saturating_sub(1),
            transactions: usize::from(is_locked),
            waiting: 0,
        }
    }

    async fn run(&self, sql: &str) -> u64 {
        let mut observer = self.observer.lock().await;
        Sqlite::run(&mut observer, sql).await.unwrap_or_else(|error| panic!("{error}: {sql}"))
    }

    async fn find_number(&self, sql: &str) -> Option<i64> {
        let mut observer = self.observer.lock().await;
        Sqlite::find_number(&mut observer, sql).await.unwrap_or_else(|error| panic!("{error}: {sql}"))
    }

    async fn find_text(&self, sql: &str) -> Option<String> {
        let mut observer = self.observer.lock().await;
        Sqlite::find_text(&mut observer, sql).await.unwrap_or_else(|error| panic!("{error}: {sql}"))
    }
}

impl SqliteFile {
    /// How many times this process has the database file open.
    fn open_files(&self) -> usize {
        let path = self.path.canonicalize().expect("the database file is there");
        let files = fs::read_dir("/proc/self/fd").expect("lists the open files");
        files.flatten().filter(|file| fs::read_link(file.path()).is_ok_and(|target| target == path)).count()
    }
}
