//! A system under measurement: its settings, and its tables before and after.

use anyhow::Context;
use lock_db::Locks;
use serde::Serialize;
use sqlx::{Connection, MySql, Postgres, Sqlite};

use crate::contender::System;
use crate::database::{self, Database};

/// A system and where it is.
pub(crate) struct Server {
    pub(crate) system: System,
    pub(crate) url: String,
}

/// What a server says of itself.
#[derive(Clone, Serialize)]
pub(crate) struct Facts {
    pub(crate) system: System,
    pub(crate) name: String,
    pub(crate) version: String,
    /// Those that decide whether a commit that was answered is on disk.
    pub(crate) settings: Vec<(String, String)>,
    /// Whether it is, by these settings.
    pub(crate) durable: bool,
}

impl Server {
    /// Makes the tables, and reads the settings.
    pub(crate) async fn prepare(&self) -> anyhow::Result<Facts> {
        match self.system {
            System::Postgres => {
                create_tables::<Postgres>(&self.url).await?;
                postgres(&self.url).await
            }
            System::MySql => {
                create_tables::<MySql>(&self.url).await?;
                mysql(&self.url).await
            }
            System::Sqlite => {
                create_tables::<Sqlite>(&self.url).await?;
                sqlite(&self.url).await
            }
            System::Redis => redis(&self.url).await,
        }
        .with_context(|| format!("preparing {:?}", self.system))
    }

    pub(crate) async fn tidy_up(&self) -> anyhow::Result<()> {
        match self.system {
            System::Postgres => remove_tables::<Postgres>(&self.url).await,
            System::MySql => remove_tables::<MySql>(&self.url).await,
            // The file of the one is removed, and the keys of the other have an expiry.
            System::Sqlite | System::Redis => Ok(()),
        }
        .with_context(|| format!("tidying up {:?}", self.system))
    }
}

async fn create_tables<DB: Database>(url: &str) -> anyhow::Result<()> {
    let pool = database::pool::<DB>(url, 1).await?;
    let locks = Locks::new(pool.clone());
    locks.migrate().await?;
    locks.check().await?;
    locks.close().await;
    DB::create_tables(&mut *pool.acquire().await?).await?;
    pool.close().await;
    Ok(())
}

async fn remove_tables<DB: Database>(url: &str) -> anyhow::Result<()> {
    let mut connection = DB::Connection::connect_with(&DB::options(url)?).await?;
    DB::remove_tables(&mut connection).await?;
    Ok(connection.close().await?)
}

fn value<'a>(settings: &'a [(String, String)], name: &str) -> &'a str {
    settings.iter().find(|(setting, _)| setting == name).map_or("", |(_, value)| value)
}

async fn postgres(url: &str) -> anyhow::Result<Facts> {
    const SETTINGS: &str = "SELECT name, setting FROM pg_settings \
        WHERE name IN ('fsync', 'synchronous_commit', 'full_page_writes', 'wal_sync_method') ORDER BY name";

    let mut connection = sqlx::PgConnection::connect_with(&Postgres::options(url)?).await?;
    let version: String = sqlx::query_scalar("SHOW server_version").fetch_one(&mut connection).await?;
    let settings: Vec<(String, String)> = sqlx::query_as(SETTINGS).fetch_all(&mut connection).await?;
    connection.close().await?;
    let durable = value(&settings, "fsync") == "on" && value(&settings, "synchronous_commit") != "off";
    Ok(Facts { system: System::Postgres, name: "PostgreSQL".to_owned(), version, settings, durable })
}

async fn mysql(url: &str) -> anyhow::Result<Facts> {
    const SETTINGS: [(&str, &str); 5] = [
        (
            "innodb_flush_log_at_trx_commit",
            "SELECT CAST(@@GLOBAL.innodb_flush_log_at_trx_commit AS CHAR(100))",
        ),
        ("sync_binlog", "SELECT CAST(@@GLOBAL.sync_binlog AS CHAR(100))"),
        ("log_bin", "SELECT CAST(@@GLOBAL.log_bin AS CHAR(100))"),
        ("innodb_doublewrite", "SELECT CAST(@@GLOBAL.innodb_doublewrite AS CHAR(100))"),
        ("innodb_flush_method", "SELECT CAST(@@GLOBAL.innodb_flush_method AS CHAR(100))"),
    ];

    let mut connection = sqlx::MySqlConnection::connect_with(&MySql::options(url)?).await?;
    let version: String = sqlx::query_scalar("SELECT VERSION()").fetch_one(&mut connection).await?;
    let mut settings = Vec::new();
    for (name, query) in SETTINGS {
        let value: Option<String> = sqlx::query_scalar(query).fetch_one(&mut connection).await?;
        settings.push((name.to_owned(), value.unwrap_or_default()));
    }
    connection.close().await?;
    let durable = value(&settings, "innodb_flush_log_at_trx_commit") == "1"
        && (["0", "OFF"].contains(&value(&settings, "log_bin")) || value(&settings, "sync_binlog") == "1");
    let name = if version.contains("MariaDB") { "MariaDB" } else { "MySQL" };
    Ok(Facts { system: System::MySql, name: name.to_owned(), version, settings, durable })
}

async fn sqlite(url: &str) -> anyhow::Result<Facts> {
    let mut connection = sqlx::SqliteConnection::connect_with(&Sqlite::options(url)?).await?;
    let version: String = sqlx::query_scalar("SELECT sqlite_version()").fetch_one(&mut connection).await?;
    let journal_mode: String = sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&mut connection).await?;
    let synchronous: i64 = sqlx::query_scalar("PRAGMA synchronous").fetch_one(&mut connection).await?;
    connection.close().await?;
    let file = url.trim_start_matches("sqlite:");
    let in_memory = is_in_memory(file)?;
    let settings = vec![
        ("journal_mode".to_owned(), journal_mode),
        ("synchronous".to_owned(), synchronous.to_string()),
        ("file system".to_owned(), if in_memory { "in memory" } else { "on disk" }.to_owned()),
    ];
    let durable = synchronous >= 2 && !in_memory;
    Ok(Facts { system: System::Sqlite, name: "SQLite".to_owned(), version, settings, durable })
}

#[cfg(target_os = "linux")]
fn is_in_memory(file: &str) -> anyhow::Result<bool> {
    const TMPFS: i128 = 0x0102_1994;
    const RAMFS: i128 = 0x8584_58f6;
    let kind = i128::from(rustix::fs::statfs(file)?.f_type);
    Ok(kind == TMPFS || kind == RAMFS)
}

#[cfg(not(target_os = "linux"))]
fn is_in_memory(_file: &str) -> anyhow::Result<bool> {
    Ok(false)
}

async fn redis(url: &str) -> anyhow::Result<Facts> {
    let mut connection = redis::Client::open(url)?.get_multiplexed_async_connection().await?;
    let info: String = redis::cmd("INFO").arg("server").query_async(&mut connection).await?;
    let version = info.lines().find_map(|line| line.strip_prefix("redis_version:"));
    let version = version.unwrap_or("of unknown version").to_owned();
    let mut settings = Vec::new();
    for name in ["appendonly", "appendfsync"] {
        let pair: Vec<String> =
            redis::cmd("CONFIG").arg("GET").arg(name).query_async(&mut connection).await?;
        settings.push((name.to_owned(), pair.get(1).cloned().unwrap_or_default()));
    }
    let durable = value(&settings, "appendonly") == "yes" && value(&settings, "appendfsync") == "always";
    Ok(Facts { system: System::Redis, name: "Redis".to_owned(), version, settings, durable })
}
