//! Sets up a private connection, and finds the table.

use std::collections::HashMap;

use sha2::Digest;
use sqlx::Row;
use sqlx::mysql::MySqlConnection;

use super::{is_temporary, migrate};
use crate::database::StepError;
use crate::database::columns::{COLUMNS, Compared, Content, Declared, UnlessNamed, compare, length_of};
use crate::database::driver;
use crate::database::server::{Table, by_newer};
use crate::database::{Cluster, Found, Server, hexadecimal};
use crate::name::MAX_BYTES;

/// Settings that the statements rely on, whatever the server's defaults and the pool's hooks set.
/// One second is the shortest lock wait timeout that MySQL supports.
///
/// - `completion_type`: a COMMIT could begin a new transaction.
/// - `sql_safe_updates`: an UPDATE could be refused because its key is in a joined table.
/// - `sql_big_selects`: an UPDATE could be refused because it might read much.
/// - `sql_select_limit`: results could be cut off.
/// - `group_concat_max_len`: on MariaDB, a list of new names could be cut off.
/// - `sql_mode`: MariaDB's `EMPTY_STRING_IS_NULL`, for example.
/// - `time_zone`: for `SYSDATE`, which has no form in UTC.
/// - `max_statement_time` of MariaDB, `max_execution_time` of MySQL: statements could be cut off.
///   Waits are bounded by the lock wait timeouts.
const PREPARE: &str = "
SET SESSION innodb_lock_wait_timeout = 1, SESSION lock_wait_timeout = 2, SESSION group_concat_max_len = 16777216, SESSION autocommit = 1,
    SESSION completion_type = 0, SESSION sql_safe_updates = 0, SESSION sql_big_selects = 1,
    SESSION sql_select_limit = 18446744073709551615,
    SESSION sql_mode = 'STRICT_TRANS_TABLES,NO_ENGINE_SUBSTITUTION', SESSION time_zone = '+00:00'
    /*M! , SESSION max_statement_time = 0 */ /*!80000 , SESSION max_execution_time = 0 */";

/// SERIALIZABLE would turn each plain read in a transaction into a lock. READ UNCOMMITTED would
/// show uncommitted data.
const LEVEL: &str = "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ; {statement}";

/// MariaDB's claims are inserts. In REPEATABLE READ, an insert requests the gap before a row that
/// is already locked, behind all transactions that wait for the row. A statement-based binary log
/// does not allow an isolation level without gap locks.
const LEVEL_WITHOUT_GAPS: &str = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED; {statement}";

const SERVER_SETTINGS: &str = "
SHOW GLOBAL VARIABLES WHERE Variable_name IN (
    'wsrep_on', 'group_replication_group_name', 'group_replication_single_primary_mode',
    'innodb_rollback_on_timeout', 'version', 'log_bin', 'binlog_format', 'innodb_autoinc_lock_mode')";

/// A column that only the table of MySQL and MariaDB has.
const GUARD_COUNT: (&str, Content) = ("guard_count", Content::Integer);

/// Compares database names as the server does, which for its own tables differs from what their
/// collation says. MariaDB 11.2 and later also list temporary tables there.
const FIND: &str = "
SELECT CONVERT(table_schema USING utf8mb4), table_type = 'BASE TABLE', COALESCE(engine, '') = 'InnoDB',
    COALESCE(create_options, '') LIKE '%partitioned%', CAST(@@max_allowed_packet AS SIGNED)
FROM information_schema.tables
WHERE table_schema = COALESCE(?, DATABASE()) AND table_name = 'distributed_lock' AND table_type <> 'TEMPORARY'
    AND (@@lower_case_table_names <> 0 OR CAST(table_schema AS BINARY) = CAST(COALESCE(?, DATABASE()) AS BINARY))";

/// Shows the table that statements on this connection use: a temporary table, if there is one.
const SHOW: &str = "SHOW CREATE TABLE {table}";

/// Columns with their types, like `varchar(255) CHARACTER SET latin1`. MariaDB shows a default of
/// NULL as `NULL`.
const FIND_COLUMNS: &str = "
SELECT CONVERT(column_name USING utf8mb4),
    CONVERT(CONCAT(column_type, COALESCE(CONCAT(' CHARACTER SET ', character_set_name), '')) USING utf8mb4),
    CASE WHEN extra LIKE '%auto_increment%' OR extra LIKE '%GENERATED%' OR COALESCE(column_default, 'NULL') <> 'NULL' THEN 'value'
        WHEN is_nullable = 'YES' THEN 'null' ELSE 'nothing' END
FROM information_schema.columns
WHERE table_schema = ? AND table_name = 'distributed_lock'
    AND (@@lower_case_table_names <> 0 OR CAST(table_schema AS BINARY) = CAST(? AS BINARY))";

/// The columns of the index by which the statements find a name.
const FIND_INDEX: &str = "
SELECT CONVERT(column_name USING utf8mb4), non_unique = 0, sub_part IS NULL
FROM information_schema.statistics
WHERE table_schema = ? AND table_name = 'distributed_lock' AND index_name = 'distributed_lock_name'
    AND (@@lower_case_table_names <> 0 OR CAST(table_schema AS BINARY) = CAST(? AS BINARY))";

pub(super) async fn prepare(connection: &mut MySqlConnection) -> driver::Result<()> {
    sqlx::raw_sql(PREPARE).execute(connection).await?;
    Ok(())
}

pub(super) async fn find(connection: &mut MySqlConnection, schema: Option<&str>) -> driver::Result<Found> {
    let mut settings = HashMap::new();
    for row in sqlx::raw_sql(SERVER_SETTINGS).fetch_all(&mut *connection).await? {
        settings.insert(row.try_get::<String, _>(0)?, row.try_get::<String, _>(1)?);
    }
    let setting = |name: &str| settings.get(name).map_or("", String::as_str);
    if setting("innodb_rollback_on_timeout") == "ON" {
        // A lock timeout would roll the caller's transaction back, while its handle still looks
        // open.
        let text = "lock-db needs innodb_rollback_on_timeout = OFF, which is the default";
        return Err(StepError::refused(text));
    }
    let kind = kind_of_server(setting);
    let row = sqlx::query(FIND).bind(schema).bind(schema).fetch_optional(&mut *connection).await?;
    let Some(row) = row else { return Ok(Found::Nothing) };
    let schema: String = row.try_get(0)?;
    let unusable = |reason: &str| Ok(Found::Unusable(format!("`{schema}.distributed_lock` {reason}")));
    if row.try_get::<i64, _>(1)? == 0 {
        return unusable("is a view: lock-db needs the table itself");
    }
    if row.try_get::<i64, _>(2)? == 0 {
        return unusable("has another storage engine than InnoDB, the one with row locks");
    }
    if row.try_get::<i64, _>(3)? != 0 {
        return unusable("is partitioned");
    }
    let longest_message = longest_message(row.try_get(4)?);
    let table = Table::new(&schema, '`', String::new());
    // Shares a message with the isolation level.
    let level = if kind.has_gaps { LEVEL } else { LEVEL_WITHOUT_GAPS };
    let shown = sqlx::raw_sql(table.sql_in(level, SHOW)).fetch_all(&mut *connection).await?;
    if shown.last().is_some_and(is_temporary) {
        return unusable(
            "is hidden by a temporary table of the same name on each new connection: do not create it in \
             `after_connect` or `before_acquire` of the pool, nor by `init_connect` of the server",
        );
    }
    let query = sqlx::query_as::<_, (String, String, String)>(FIND_COLUMNS).bind(&schema).bind(&schema);
    let columns = query.fetch_all(&mut *connection).await?.into_iter().map(|(name, kind, unless_named)| {
        let unless_named = UnlessNamed::parse(&unless_named);
        (name, Declared { kind, unless_named })
    });
    let columns: HashMap<String, Declared> = columns.collect();
    match compare(&[&COLUMNS[..], &[GUARD_COUNT]].concat(), &columns, needed) {
        Compared::Fit => {}
        Compared::Missing(column) => {
            return Ok(match migrate::newer(connection, &schema).await? {
                Some(version) => {
                    Found::Unusable(by_newer(&format!("{schema}.distributed_lock"), column, version))
                }
                None => Found::Differs(column),
            });
        }
        Compared::Unfit(reason) => return unusable(&reason),
    }
    let query = sqlx::query_as::<_, (String, bool, bool)>(FIND_INDEX).bind(&schema).bind(&schema);
    let index = query.fetch_all(connection).await?;
    if !matches!(&*index, [(column, true, true)] if column == "lock_name") {
        return unusable(
            "has no unique index `distributed_lock_name` on `lock_name` alone: two rows of one name would be two locks",
        );
    }
    Ok(Found::Table(Server {
        table: table.into(),
        cluster: kind.cluster,
        is_mariadb: kind.is_mariadb,
        keeps_counter: kind.keeps_counter,
        longest_message,
        is_ascii_only: !columns.get("owner").is_some_and(|column| has_all_characters(&column.kind)),
        keeps_statements: true,
    }))
}

/// What a column needs if this type, as `FIND_COLUMNS` shows it, does not fit. CHAR does not fit,
/// because some SQL modes pad it with blanks. MariaDB, and MySQL before 8.0.19, show integers with
/// a width.
fn needed(content: Content, kind: &str) -> Option<String> {
    let (fits, needed) = match content {
        Content::Id | Content::Integer => {
            let fits = kind == "bigint" || length_of(kind, "bigint").is_some() && kind.ends_with(')');
            (fits, "BIGINT with a sign".to_owned())
        }
        Content::Name => (
            length_of(kind, "varbinary").is_some_and(|length| length >= MAX_BYTES),
            format!("VARBINARY({MAX_BYTES}): a collation would make one lock of several names"),
        ),
        Content::Ascii(longest) => (
            holds(kind, longest) && !has_wide_characters(kind),
            format!("VARCHAR({longest}) at least, in a character set like ascii or utf8mb4"),
        ),
        Content::Label(longest) => (holds(kind, longest), format!("VARCHAR({longest}) at least")),
        Content::Time => (kind == "datetime(6)", "DATETIME(6)".to_owned()),
    };
    (!fits).then_some(needed)
}

fn holds(kind: &str, longest: usize) -> bool {
    let (kind, _) = kind.split_once(' ').unwrap_or((kind, ""));
    matches!(kind, "text" | "mediumtext" | "longtext")
        || length_of(kind, "varchar").is_some_and(|length| length >= longest)
}

/// Whether ASCII is stored in another form than ASCII, which would change a digest.
fn has_wide_characters(kind: &str) -> bool {
    matches!(character_set(kind), "ucs2" | "utf16" | "utf16le" | "utf32")
}

/// Whether every text can be stored unchanged.
fn has_all_characters(kind: &str) -> bool {
    matches!(character_set(kind), "utf8mb4" | "utf16" | "utf16le" | "utf32" | "gb18030")
}

fn character_set(kind: &str) -> &str {
    kind.rsplit_once(" CHARACTER SET ").map_or("", |(_, set)| set)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct KindOfServer {
    cluster: Cluster,
    is_mariadb: bool,
    keeps_counter: bool,
    /// Whether private connections have to accept gap locks.
    has_gaps: bool,
}

/// Uses the settings of the server. MariaDB and MySQL each know only their own.
fn kind_of_server<'a>(setting: impl Fn(&str) -> &'a str) -> KindOfServer {
    let is_mariadb = setting("version").contains("MariaDB");
    let is_galera = setting("wsrep_on") == "ON";
    let is_group = !setting("group_replication_group_name").is_empty()
        && setting("group_replication_single_primary_mode") == "OFF";
    let has_log = setting("log_bin") == "ON";
    let logs_statements = has_log && setting("binlog_format") == "STATEMENT";
    KindOfServer {
        cluster: if is_galera || is_group { Cluster::MultiPrimary } else { Cluster::SinglePrimary },
        is_mariadb,
        keeps_counter: is_mariadb && has_log && setting("innodb_autoinc_lock_mode") != "2",
        has_gaps: !is_mariadb || logs_statements,
    }
}

/// The rest is reserved for the statement and what goes with it.
fn longest_message(max_allowed_packet: i64) -> usize {
    let bytes = usize::try_from(max_allowed_packet).unwrap_or_default();
    bytes.saturating_sub(8 * 1024).max(bytes / 2)
}

/// For the names of user locks, which have at most 64 characters.
pub(super) fn digest(schema: &str) -> String {
    hexadecimal(sha2::Sha224::digest(schema))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(settings: &[(&str, &'static str)]) -> KindOfServer {
        let settings: HashMap<_, _> = settings.iter().copied().collect();
        kind_of_server(|setting| settings.get(setting).copied().unwrap_or_default())
    }

    #[test]
    fn types_that_hold_as_much_are_as_good() {
        let fits = |content, kind| needed(content, kind).is_none();
        for (content, good, bad) in [
            (
                Content::Id,
                &["bigint", "bigint(20)"][..],
                &["int", "bigint unsigned", "bigint(20) unsigned"][..],
            ),
            (
                Content::Integer,
                &["bigint", "bigint(20)"],
                &["int(11)", "decimal(30,0)", "bigint(20) unsigned zerofill", "double"],
            ),
            (
                Content::Name,
                &["varbinary(255)", "varbinary(300)"],
                &["varbinary(254)", "binary(255)", "varchar(255) CHARACTER SET utf8mb4", "blob"],
            ),
            (
                Content::Ascii(32),
                &[
                    "varchar(32) CHARACTER SET ascii",
                    "varchar(40) CHARACTER SET latin1",
                    "text CHARACTER SET utf8mb4",
                ],
                &[
                    "varchar(31) CHARACTER SET ascii",
                    "char(32) CHARACTER SET ascii",
                    "varchar(32) CHARACTER SET utf16",
                ],
            ),
            (
                Content::Label(255),
                &["varchar(255) CHARACTER SET ascii", "varchar(255) CHARACTER SET utf32"],
                &["varchar(5) CHARACTER SET utf8mb4", "tinytext CHARACTER SET utf8mb4", "varbinary(255)"],
            ),
            (Content::Time, &["datetime(6)"], &["datetime", "datetime(3)", "timestamp(6)", "date"]),
        ] {
            assert!(good.iter().all(|kind| fits(content, kind)), "{content:?}");
            assert!(!bad.iter().any(|kind| fits(content, kind)), "{content:?}");
        }
    }

    #[test]
    fn character_sets_that_lack_characters_are_told_by_the_type() {
        assert!(has_all_characters("varchar(255) CHARACTER SET utf8mb4"));
        for set in ["latin1", "ascii", "utf8mb3", "utf8", "ucs2"] {
            assert!(!has_all_characters(&format!("varchar(255) CHARACTER SET {set}")), "{set}");
        }
        assert!(!has_all_characters("varbinary(255)"));
    }

    #[test]
    fn servers_without_locks_on_gaps_are_told_by_their_settings() {
        let (mariadb, mysql) = (("version", "10.11.6-MariaDB-log"), ("version", "9.7.0"));
        assert!(!of(&[mariadb, ("log_bin", "OFF"), ("binlog_format", "STATEMENT")]).has_gaps);
        assert!(!of(&[mariadb, ("log_bin", "ON"), ("binlog_format", "MIXED")]).has_gaps);
        assert!(of(&[mariadb, ("log_bin", "ON"), ("binlog_format", "STATEMENT")]).has_gaps);
        assert!(of(&[mysql, ("log_bin", "OFF")]).has_gaps);
    }

    #[test]
    fn multi_primary_servers_are_told_by_their_settings() {
        let of = |settings: &[(&str, &'static str)]| of(settings).cluster;
        assert_eq!(of(&[]), Cluster::SinglePrimary);
        assert_eq!(of(&[("wsrep_on", "OFF")]), Cluster::SinglePrimary);
        assert_eq!(of(&[("wsrep_on", "ON")]), Cluster::MultiPrimary);
        let group = ("group_replication_group_name", "aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa");
        let mode = |mode| ("group_replication_single_primary_mode", mode);
        assert_eq!(of(&[group, mode("ON")]), Cluster::SinglePrimary);
        assert_eq!(of(&[group, mode("OFF")]), Cluster::MultiPrimary);
        assert_eq!(of(&[("group_replication_group_name", ""), mode("OFF")]), Cluster::SinglePrimary);
    }
}
