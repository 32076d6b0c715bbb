//! Finding the table, and making it.

use std::collections::HashMap;

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection, Row};

use super::listener::is_direct;
use super::transaction::DOLLAR_QUOTE;
use crate::database::columns::{COLUMNS, Compared, Content, compare, length_of};
use crate::database::server::Table;
use crate::database::{Cluster, Found, Server};
use crate::schema;

/// What is given up here after five seconds is to end on the server, too: else each such statement would keep a session there, as long as
/// somebody has the table locked.
const LIMIT: &str = "SET lock_timeout = '2s'; SET statement_timeout = '5s'";

/// What has to be known before the table is trusted, in one message. `$1` is the name, quoted as in SQL.
const FIND: &str = "
SELECT pg_is_in_recovery(), current_setting('transaction_read_only') = 'on', current_setting('server_encoding'),
    current_database()::text, namespace.nspname::text, class.oid::bigint, class.relkind::text, class.relpersistence::text,
    class.relispartition, EXISTS (SELECT 1 FROM pg_inherits WHERE class.oid IN (inhparent, inhrelid)),
    row_security_active(class.oid),
    EXISTS (SELECT 1 FROM pg_rewrite WHERE ev_class = class.oid),
    ARRAY(
        SELECT attname::text || ' ' || format_type(atttypid, atttypmod) FROM pg_attribute
        WHERE attrelid = class.oid AND attnum > 0 AND NOT attisdropped),
    EXISTS (
        SELECT 1 FROM pg_index
        JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0] AND attname = 'lock_name'
        JOIN pg_collation ON pg_collation.oid = attcollation
        WHERE indrelid = class.oid AND indisunique AND indisvalid AND indimmediate AND indpred IS NULL
            AND indnkeyatts = 1 AND atttypid = 'text'::regtype AND collisdeterministic),
    EXISTS (SELECT 1 FROM pg_proc WHERE oid = to_regprocedure('pg_catalog.pg_control_system()') AND proacl IS NULL)
FROM (SELECT to_regclass($1) AS oid) AS asked
LEFT JOIN pg_class AS class ON class.oid = asked.oid
LEFT JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace";

/// The number that a server was given when it was made, and shares with its standbys. Where everybody may ask for it.
const SERVER: &str = "SELECT system_identifier FROM pg_control_system()";

const SCHEMAS_WITH_TABLE: &str = "
SELECT namespace.nspname::text FROM pg_class AS class
JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
WHERE class.relname = 'distributed_lock' AND current_database() = $1";

const QUOTE: &str = "SELECT quote_ident($1)";

/// What locks do to the table, to no row.
const USE: &str = "
SELECT * FROM {table} WHERE false FOR UPDATE;
UPDATE {table} SET secret_key = secret_key, fencing_token = fencing_token, previous_token = previous_token, owner = owner,
    acquire_time = acquire_time, expire_time = expire_time, ttl_micros = ttl_micros, waiters = waiters
WHERE false;
INSERT INTO {table} (lock_name, lock_kind) SELECT lock_name, lock_kind FROM {table} WHERE false";

/// Held to the end of the migrating transaction. The number is `lock-db` in ASCII.
const LOCK_MIGRATIONS: &str = "SELECT pg_advisory_xact_lock(30521770275333218)";
/// Whatever the default of the database: what others have applied while this one waited has to be seen.
const BEGIN_MIGRATION: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";
const LIMIT_MIGRATION: &str = "
SELECT set_config('lock_timeout', '60s', true), set_config('statement_timeout', '0', true)";
const HAS_SCHEMA: &str = "SELECT EXISTS (SELECT 1 FROM pg_namespace WHERE nspname = $1)";
const WORK_IN_SCHEMA: &str = "SELECT set_config('search_path', $1, true)";
const HAS_TABLE: &str = "SELECT to_regclass($1) IS NOT NULL";
const CREATE_LEDGER: &str = "
CREATE TABLE IF NOT EXISTS _lock_db_migrations (
    version BIGINT PRIMARY KEY,
    applied_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp())";
const APPLIED: &str = "SELECT version FROM _lock_db_migrations";
const NOTE_APPLIED: &str = "INSERT INTO _lock_db_migrations (version) VALUES ($1) ON CONFLICT DO NOTHING";
const MIGRATIONS: [(i64, &str); 1] = [(1, schema::POSTGRES)];

/// Behind a pooler nothing is set: others would be given the connection with it.
pub(super) async fn prepare(connection: &mut PgConnection) -> sqlx::Result<()> {
    if is_direct(connection).await? {
        sqlx::raw_sql(LIMIT).execute(connection).await?;
    }
    Ok(())
}

/// When the database has one table of this name in all, no `search_path` makes it another one.
pub(super) async fn find_only(
    connection: &mut PgConnection,
    database: &str,
    schema: Option<&str>,
) -> sqlx::Result<Option<Server>> {
    let schemas: Vec<String> =
        sqlx::query_scalar(SCHEMAS_WITH_TABLE).bind(database).fetch_all(&mut *connection).await?;
    let found = match (schema, &*schemas) {
        (Some(schema), found) if found.iter().any(|found| found == schema) => schema,
        (None, [only]) => only,
        _ => return Ok(None),
    };
    match find(connection, Some(found)).await? {
        Found::Table(server) => Ok(Some(server)),
        _ => Ok(None),
    }
}

pub(super) async fn find(connection: &mut PgConnection, schema: Option<&str>) -> sqlx::Result<Found> {
    let name = match schema {
        Some(schema) => format!("{}.distributed_lock", quoted(connection, schema).await?),
        None => "distributed_lock".to_owned(),
    };
    let row = sqlx::query(FIND).bind(name).fetch_one(&mut *connection).await?;
    if row.try_get(0)? {
        let standby = std::io::Error::other("the server is a standby, which only reads");
        return Err(sqlx::Error::Io(standby));
    }
    if row.try_get(1)? {
        let setting =
            "the session may only read: `default_transaction_read_only` is on for this role or database";
        return Err(sqlx::Error::Configuration(setting.into()));
    }
    let Some(oid) = row.try_get::<Option<i64>, _>(5)? else { return Ok(Found::Nothing) };
    let (schema, kind, persistence): (&str, &str, &str) = (row.try_get(4)?, row.try_get(6)?, row.try_get(7)?);
    let unusable = |reason: &str| Ok(Found::Unusable(format!("`{schema}.distributed_lock` {reason}")));
    if schema.contains(DOLLAR_QUOTE) {
        return unusable("is in a schema whose name has in it what lock-db quotes its statements with");
    }
    match kind {
        "r" => {}
        "p" => return unusable("is partitioned: a row there can't be found again by where it lies"),
        "f" => return unusable("is a foreign table: its rows can't be locked from here"),
        "v" | "m" => return unusable("is a view: lock-db needs the table itself"),
        _ => return unusable("is no table"),
    }
    if persistence != "p" {
        return unusable("is unlogged or temporary: a crash of the server would forget who holds a lock");
    }
    if row.try_get(8)? || row.try_get(9)? {
        return unusable("takes part in inheritance or partitioning: its rows may lie in other tables");
    }
    if row.try_get(10)? {
        return unusable(
            "has row level security, which hides rows from this role: give the role BYPASSRLS, make it the owner of the \
             table, or disable row level security there",
        );
    }
    if row.try_get(11)? {
        return unusable("has rewrite rules, so that statements do something else than they say");
    }
    match compare(COLUMNS.into_iter(), &declared(&row.try_get::<Vec<_>, _>(12)?), needed) {
        Compared::Fit => {}
        Compared::Missing => return Ok(Found::Differs),
        Compared::Unfit(reason) => return unusable(&reason),
    }
    if !row.try_get::<bool, _>(13)? {
        return unusable(
            "has no valid unique index on `lock_name` alone, a text column with a deterministic collation: two rows of one \
             name would be two locks",
        );
    }
    let (encoding, database): (&str, &str) = (row.try_get(2)?, row.try_get(3)?);
    let mut server = String::new();
    if row.try_get(14)? {
        server = sqlx::query_scalar::<_, i64>(SERVER).fetch_one(connection).await?.to_string();
    }
    Ok(Found::Table(Server {
        table: Table::new(schema, '"', format!("{database}/{oid}/{server}")).into(),
        cluster: Cluster::SinglePrimary,
        is_mariadb: false,
        keeps_counter: false,
        is_ascii_only: !matches!(encoding, "UTF8" | "SQL_ASCII"),
    }))
}

/// Columns and their types, of `name type` each. A name with a blank in it is none of ours.
fn declared(columns: &[String]) -> HashMap<String, String> {
    let parts = columns.iter().filter_map(|column| column.split_once(' '));
    parts.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect()
}

/// What a column needs if this type, as `format_type` names it, does not do. CHAR does not: it is
/// filled up with blanks.
fn needed(content: Content, kind: &str) -> Option<String> {
    let (fits, needed) = match content {
        Content::Id | Content::Integer => (kind == "bigint", "BIGINT".to_owned()),
        // As text, or the index is not used.
        Content::Name => (kind == "text", "TEXT".to_owned()),
        Content::Ascii(longest) | Content::Label(longest) => {
            let is_long_enough = length_of(kind, "character varying").is_some_and(|length| length >= longest);
            let fits = matches!(kind, "text" | "character varying") || is_long_enough;
            (fits, format!("TEXT, or VARCHAR({longest}) at least"))
        }
        Content::Time => {
            let fits = matches!(kind, "timestamp with time zone" | "timestamp(6) with time zone");
            (fits, "TIMESTAMPTZ(6)".to_owned())
        }
    };
    (!fits).then_some(needed)
}

pub(super) async fn check(connection: &mut PgConnection, server: &Server) -> sqlx::Result<Vec<String>> {
    sqlx::raw_sql(server.table.sql(USE)).execute(connection).await?;
    Ok(Vec::new())
}

/// When all is applied this only reads, so that a role without the right to create anything may call it.
pub(super) async fn migrate(connection: &mut PgConnection, schema: Option<&str>) -> sqlx::Result<()> {
    let mut transaction = connection.begin_with(BEGIN_MIGRATION).await?;
    sqlx::query(LIMIT_MIGRATION).execute(&mut *transaction).await?;
    sqlx::query(LOCK_MIGRATIONS).execute(&mut *transaction).await?;
    if let Some(schema) = schema {
        let quoted = quoted(&mut transaction, schema).await?;
        let is_there: bool = sqlx::query_scalar(HAS_SCHEMA).bind(schema).fetch_one(&mut *transaction).await?;
        if !is_there {
            let sql = AssertSqlSafe(format!("CREATE SCHEMA IF NOT EXISTS {quoted}"));
            sqlx::raw_sql(sql).execute(&mut *transaction).await?;
        }
        sqlx::query(WORK_IN_SCHEMA).bind(quoted).execute(&mut *transaction).await?;
    }
    let applied: Vec<i64> = if has_table(&mut transaction, "_lock_db_migrations").await? {
        sqlx::query_scalar(APPLIED).fetch_all(&mut *transaction).await?
    } else {
        sqlx::query(CREATE_LEDGER).execute(&mut *transaction).await?;
        Vec::new()
    };
    // The ledger may have outlived the table.
    let is_gone = !has_table(&mut transaction, "distributed_lock").await?;
    for (version, sql) in MIGRATIONS {
        if is_gone || !applied.contains(&version) {
            sqlx::raw_sql(sql).execute(&mut *transaction).await?;
            sqlx::query(NOTE_APPLIED).bind(version).execute(&mut *transaction).await?;
        }
    }
    transaction.commit().await
}

async fn has_table(connection: &mut PgConnection, name: &str) -> sqlx::Result<bool> {
    sqlx::query_scalar(HAS_TABLE).bind(name).fetch_one(connection).await
}

async fn quoted(connection: &mut PgConnection, name: &str) -> sqlx::Result<String> {
    sqlx::query_scalar(QUOTE).bind(name).fetch_one(connection).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_that_hold_as_much_are_as_good() {
        let fits = |content, kind| needed(content, kind).is_none();
        for (content, good, bad) in [
            (Content::Id, &["bigint"][..], &["integer", "numeric", "text"][..]),
            (Content::Integer, &["bigint"], &["integer", "numeric", "numeric(20,0)", "double precision"]),
            (Content::Name, &["text"], &["character varying", "character(255)", "bytea", "citext"]),
            (
                Content::Ascii(32),
                &["text", "character varying", "character varying(32)", "character varying(40)"],
                &["character varying(31)", "character(32)", "bytea", "uuid"],
            ),
            (
                Content::Time,
                &["timestamp with time zone", "timestamp(6) with time zone"],
                &["timestamp(3) with time zone", "timestamp without time zone", "date"],
            ),
        ] {
            assert!(good.iter().all(|kind| fits(content, kind)), "{content:?}");
            assert!(!bad.iter().any(|kind| fits(content, kind)), "{content:?}");
        }
    }
}
