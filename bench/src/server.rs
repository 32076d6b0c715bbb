//! The measured systems: their settings, and creation and removal of their tables.

use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use lock_db::Locks;
use serde::Serialize;
use sqlx::{Connection, MySql, Postgres, Sqlite};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use zookeeper_client::Error;

use crate::contender::System;
use crate::database::{self, Database};
use crate::etcd::Etcd;
use crate::zookeeper;

/// A system and its address.
pub(crate) struct Server {
    pub(crate) system: System,
    pub(crate) url: String,
}

/// The prefix of all lock names of this run. No other run has it, so that names are new in this run.
pub(crate) fn name_prefix() -> &'static str {
    static PREFIX: LazyLock<String> = LazyLock::new(|| {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        format!("lock-bench:{:x}:", since_1970.as_millis())
    });
    &PREFIX
}

/// The version and settings of a server.
#[derive(Clone, Serialize)]
pub(crate) struct Facts {
    pub(crate) system: System,
    pub(crate) name: String,
    pub(crate) version: String,
    /// The settings that decide whether a confirmed commit is on disk.
    pub(crate) settings: Vec<(String, String)>,
    /// Whether a confirmed commit is on disk, by these settings.
    pub(crate) durable: bool,
}

impl Server {
    /// Creates the tables and reads the settings.
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
            System::ZooKeeper => zookeeper(&self.url).await,
            System::Etcd => etcd(&self.url).await,
        }
        .with_context(|| format!("preparing {:?}", self.system))
    }

    /// Removes the tables and the keys that do not expire.
    pub(crate) async fn clean_up(&self) -> anyhow::Result<()> {
        match self.system {
            System::Postgres => remove_tables::<Postgres>(&self.url).await,
            System::MySql => remove_tables::<MySql>(&self.url).await,
            System::Redis => remove_keys(&self.url).await,
            System::ZooKeeper => remove_nodes(&self.url).await,
            // The file of SQLite is removed with its folder. etcd removes everything at the end of a
            // lease.
            System::Sqlite | System::Etcd => Ok(()),
        }
        .with_context(|| format!("cleaning up {:?}", self.system))
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

/// Removes all keys of this run. The token counters have no expiry.
async fn remove_keys(url: &str) -> anyhow::Result<()> {
    let mut connection = redis::Client::open(url)?.get_multiplexed_async_connection().await?;
    let mut cursor = 0_u64;
    loop {
        let (next, keys): (u64, Vec<String>) = redis::cmd("SCAN")
            .arg(cursor)
            .arg("MATCH")
            .arg(format!("{}*", name_prefix()))
            .arg("COUNT")
            .arg(1000)
            .query_async(&mut connection)
            .await?;
        if !keys.is_empty() {
            redis::cmd("UNLINK").arg(keys).exec_async(&mut connection).await?;
        }
        if next == 0 {
            return Ok(());
        }
        cursor = next;
    }
}

/// Removes the queues of this run. The server also does this, but not more than 10 000 a minute.
async fn remove_nodes(address: &str) -> anyhow::Result<()> {
    const AT_ONCE: usize = 256;

    let client = zookeeper::connect(address).await?;
    let own = name_prefix().trim_end_matches(':');
    let queues = client.list_children("/").await?;
    let queues: Vec<String> = queues.into_iter().filter(|name| name.starts_with(own)).collect();
    for queues in queues.chunks(AT_ONCE) {
        let mut removals = JoinSet::new();
        for queue in queues {
            let (client, path) = (client.clone(), format!("/{queue}"));
            removals.spawn(async move { client.delete(&path, None).await });
        }
        while let Some(removed) = removals.join_next().await {
            match removed? {
                // The server removes a queue with nodes after these nodes.
                Ok(()) | Err(Error::NoNode | Error::NotEmpty) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
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

/// ZooKeeper does not report `forceSync`. It counts log syncs, and it logs each new session. So the
/// counter shows whether it syncs.
async fn zookeeper(address: &str) -> anyhow::Result<Facts> {
    let before = send_command(address, "mntr").await?;
    drop(zookeeper::connect(address).await?);
    let after = send_command(address, "mntr").await?;
    let synced = has_grown("zk_cnt_fsynctime", &before, &after)
        .context("the server does not answer `mntr`: set 4lw.commands.whitelist=srvr,mntr")?;
    let version = line_of(&after, "zk_version").unwrap_or("of unknown version");
    let version = version.split(['-', ',']).next().unwrap_or(version).to_owned();
    let settings = vec![("forceSync".to_owned(), if synced { "yes" } else { "no" }.to_owned())];
    Ok(Facts { system: System::ZooKeeper, name: "ZooKeeper".to_owned(), version, settings, durable: synced })
}

/// etcd does not report `unsafe-no-fsync`. It counts log syncs, and it logs each new lease. So the
/// counter shows whether it syncs.
async fn etcd(url: &str) -> anyhow::Result<Facts> {
    let address = url.strip_prefix("http://").context("the address must begin with http://")?;
    let address = address.trim_end_matches('/');
    let metrics = format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n");
    let etcd = Etcd::connect(url).await?;
    let version = etcd.version().await?;
    let before = send_command(address, &metrics).await?;
    let lease = etcd.grant_lease(60).await?;
    etcd.revoke_lease(lease).await?;
    let after = send_command(address, &metrics).await?;
    let synced = has_grown("etcd_disk_wal_fsync_duration_seconds_count", &before, &after)
        .context("the server does not offer /metrics")?;
    let settings = vec![("unsafe-no-fsync".to_owned(), (!synced).to_string())];
    Ok(Facts { system: System::Etcd, name: "etcd".to_owned(), version, settings, durable: synced })
}

/// Sends a command and reads until the server closes the connection.
async fn send_command(address: &str, command: &str) -> anyhow::Result<String> {
    let mut connection = TcpStream::connect(address).await?;
    connection.write_all(command.as_bytes()).await?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await?;
    Ok(answer)
}

fn line_of<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix([' ', '\t']))
}

fn has_grown(counter: &str, before: &str, after: &str) -> Option<bool> {
    let number = |text| line_of(text, counter)?.trim().parse::<f64>().ok();
    Some(number(after)? > number(before)?)
}
