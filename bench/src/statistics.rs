//! Database statistics: counters of writes, and the size of the lock table.

use lock_db::LockDatabase;
use serde::{Deserialize, Serialize};
use sqlx::{Connection, MySql, Postgres, Sqlite};

use crate::database::{Database, Options};

/// Counters since the start of the server.
#[derive(Clone, Copy, Default)]
pub(crate) struct Written {
    /// Bytes of the log that a commit waits for: WAL or redo log.
    pub(crate) bytes: u64,
    /// The number of transactions that wrote something.
    pub(crate) commits: u64,
}

/// The size of the table `distributed_lock`.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct TableSize {
    pub(crate) table_bytes: u64,
    pub(crate) index_bytes: u64,
    /// The number of dead row versions. On InnoDB: the number of transactions whose old versions
    /// are not purged yet. SQLite keeps no old versions.
    pub(crate) dead: Option<u64>,
    /// All updates so far. PostgreSQL only.
    pub(crate) updates: Option<u64>,
    /// Updates that did not change the indexes (HOT). PostgreSQL only.
    pub(crate) hot_updates: Option<u64>,
}

/// A database that counts its writes and reports the size of the lock table.
pub(crate) trait DatabaseStatistics: Database {
    /// The address of the server. `None`: there is no network.
    fn address(options: &Options<Self>) -> Option<(String, u16)>;

    /// Changes the options so that `written` can count. With a port, the connection goes to that
    /// port on loopback if the database has an address.
    fn for_measuring(options: Options<Self>, port: Option<u16>) -> Options<Self>;

    /// Call this before `written`, on a connection that stays open.
    fn begin_counting(connection: &mut Self::Connection) -> impl Future<Output = sqlx::Result<()>> + Send;

    fn written(
        connection: &mut Self::Connection,
        options: &Options<Self>,
    ) -> impl Future<Output = anyhow::Result<Written>> + Send;

    fn table_size(
        connection: &mut Self::Connection,
    ) -> impl Future<Output = anyhow::Result<TableSize>> + Send;
}

/// A connection that reads the statistics. It does not go through the proxy.
pub(crate) struct StatisticsReader<DB: LockDatabase> {
    connection: DB::Connection,
    options: Options<DB>,
}

impl<DB: DatabaseStatistics> StatisticsReader<DB> {
    pub(crate) async fn start(url: &str) -> anyhow::Result<Self> {
        let options = DB::for_measuring(DB::options(url)?, None);
        let mut connection = DB::Connection::connect_with(&options).await?;
        DB::begin_counting(&mut connection).await?;
        Ok(Self { connection, options })
    }

    pub(crate) async fn written(&mut self) -> anyhow::Result<Written> {
        DB::written(&mut self.connection, &self.options).await
    }

    pub(crate) async fn table_size(&mut self) -> anyhow::Result<TableSize> {
        DB::table_size(&mut self.connection).await
    }
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}

impl DatabaseStatistics for Postgres {
    fn address(options: &Options<Self>) -> Option<(String, u16)> {
        Some((options.get_host().to_owned(), options.get_port()))
    }

    fn for_measuring(options: Options<Self>, port: Option<u16>) -> Options<Self> {
        match port {
            Some(port) => options.host("127.0.0.1").port(port),
            None => options,
        }
    }

    async fn begin_counting(_connection: &mut Self::Connection) -> sqlx::Result<()> {
        Ok(())
    }

    async fn written(connection: &mut Self::Connection, _options: &Options<Self>) -> anyhow::Result<Written> {
        // A transaction gets an id when it writes. `pg_stat_database` also counts transactions, but
        // with a delay.
        const WRITTEN: &str = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint, \
            txid_snapshot_xmax(txid_current_snapshot())";

        let (bytes, commits): (i64, i64) = sqlx::query_as(WRITTEN).fetch_one(connection).await?;
        Ok(Written { bytes: unsigned(bytes), commits: unsigned(commits) })
    }

    async fn table_size(connection: &mut Self::Connection) -> anyhow::Result<TableSize> {
        const SIZE: &str = "SELECT pg_table_size(relid), pg_indexes_size(relid), n_dead_tup, n_tup_upd, n_tup_hot_upd \
            FROM pg_stat_user_tables WHERE relid = 'distributed_lock'::regclass";

        let (table, indexes, dead, updates, hot): (i64, i64, i64, i64, i64) =
            sqlx::query_as(SIZE).fetch_one(connection).await?;
        Ok(TableSize {
            table_bytes: unsigned(table),
            index_bytes: unsigned(indexes),
            dead: Some(unsigned(dead)),
            updates: Some(unsigned(updates)),
            hot_updates: Some(unsigned(hot)),
        })
    }
}

impl DatabaseStatistics for MySql {
    fn address(options: &Options<Self>) -> Option<(String, u16)> {
        Some((options.get_host().to_owned(), options.get_port()))
    }

    fn for_measuring(options: Options<Self>, port: Option<u16>) -> Options<Self> {
        match port {
            Some(port) => options.host("127.0.0.1").port(port),
            None => options,
        }
    }

    /// The other counters of commits either include transactions that only read, or do not include
    /// autocommit statements.
    async fn begin_counting(connection: &mut Self::Connection) -> sqlx::Result<()> {
        const ENABLE: &str = "SET GLOBAL innodb_monitor_enable = 'trx_rw_commits'";
        sqlx::raw_sql(ENABLE).execute(connection).await.map(drop)
    }

    async fn written(connection: &mut Self::Connection, _options: &Options<Self>) -> anyhow::Result<Written> {
        const BYTES: &str = "SHOW GLOBAL STATUS LIKE 'Innodb_os_log_written'";

        let (_name, bytes): (String, String) =
            sqlx::query_as(sqlx::AssertSqlSafe(BYTES)).fetch_one(&mut *connection).await?;
        let commits = metric(connection, "trx_rw_commits").await?;
        Ok(Written { bytes: bytes.parse()?, commits })
    }

    async fn table_size(connection: &mut Self::Connection) -> anyhow::Result<TableSize> {
        const SIZE: &str = "SELECT CAST(data_length AS SIGNED), CAST(index_length AS SIGNED) \
            FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = 'distributed_lock'";

        // The sizes come from the table statistics. This updates them.
        sqlx::raw_sql("ANALYZE TABLE distributed_lock").execute(&mut *connection).await?;
        let (table, indexes): (i64, i64) = sqlx::query_as(SIZE).fetch_one(&mut *connection).await?;
        let dead = metric(connection, "trx_rseg_history_len").await?;
        Ok(TableSize {
            table_bytes: unsigned(table),
            index_bytes: unsigned(indexes),
            dead: Some(dead),
            ..TableSize::default()
        })
    }
}

async fn metric(connection: &mut sqlx::MySqlConnection, name: &str) -> sqlx::Result<u64> {
    const METRIC: &str =
        "SELECT CAST(`count` AS SIGNED) FROM information_schema.innodb_metrics WHERE name = ?";
    Ok(unsigned(sqlx::query_scalar(METRIC).bind(name).fetch_one(connection).await?))
}

impl DatabaseStatistics for Sqlite {
    fn address(_options: &Options<Self>) -> Option<(String, u16)> {
        None
    }

    /// Without checkpoints every write makes the WAL file longer.
    fn for_measuring(options: Options<Self>, _port: Option<u16>) -> Options<Self> {
        options.pragma("wal_autocheckpoint", "0")
    }

    async fn begin_counting(connection: &mut Self::Connection) -> sqlx::Result<()> {
        sqlx::raw_sql("PRAGMA wal_checkpoint(TRUNCATE)").execute(connection).await.map(drop)
    }

    async fn written(_connection: &mut Self::Connection, options: &Options<Self>) -> anyhow::Result<Written> {
        let mut file = options.get_filename().to_owned().into_os_string();
        file.push("-wal");
        Ok(count_frames(&std::fs::read(file)?))
    }

    async fn table_size(connection: &mut Self::Connection) -> anyhow::Result<TableSize> {
        let pages: i64 = sqlx::query_scalar("PRAGMA page_count").fetch_one(&mut *connection).await?;
        let page_size: i64 = sqlx::query_scalar("PRAGMA page_size").fetch_one(connection).await?;
        Ok(TableSize { table_bytes: unsigned(pages * page_size), ..TableSize::default() })
    }
}

/// Counts the frames and commits of a WAL file. The file has a header of 32 bytes, which contains
/// the page size. Frames follow: a header of 24 bytes and a page. In the last frame of a
/// transaction the header contains the size of the database; in the others that field is 0.
fn count_frames(wal: &[u8]) -> Written {
    const HEADER: usize = 32;
    const FRAME_HEADER: usize = 24;

    let number = |bytes: &[u8]| bytes.iter().fold(0, |number, byte| number << 8 | usize::from(*byte));
    let Some((header, frames)) = wal.split_at_checked(HEADER) else { return Written::default() };
    let frame = FRAME_HEADER + number(&header[8..12]);
    let commits = frames.chunks_exact(frame).filter(|frame| number(&frame[4..8]) > 0).count();
    Written { bytes: frames.len() as u64, commits: commits as u64 }
}
