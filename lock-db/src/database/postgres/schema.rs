//! Sets up a private connection, and finds the table.

use std::collections::HashMap;

use sqlx::Row;
use sqlx::postgres::{PgConnection, PgRow};

use super::row_lock::DOLLAR_QUOTE;
use super::{migrate, session};
use crate::database::StepError;
use crate::database::columns::{COLUMNS, Compared, Content, Declared, UnlessNamed, compare, length_of};
use crate::database::driver;
use crate::database::server::{Table, by_newer};
use crate::database::{Cluster, Found, Server};

/// Settings that the statements rely on, whatever the server, the role, the database and the pool's
/// hooks set.
///
/// `statement_timeout`: a statement that the client gives up after five seconds must end on the
/// server too. Otherwise each one would occupy a session for as long as another transaction has the
/// table locked. `default_transaction_isolation`: a single statement needs no lasting snapshot,
/// which would fail when others write.
///
/// `enable_seqscan`, `enable_bitmapscan`: the planner would read a small table completely, or by a
/// bitmap of all entries of a name. It would keep that plan when the table grows because an old
/// snapshot keeps all versions: see `newest!`. `jit`: a statement that can't avoid a disabled scan
/// has such a high cost that it would be compiled.
const PINS: &str = "
SET lock_timeout = '2s'; SET statement_timeout = '5s'; SET default_transaction_isolation = 'read committed';
SET default_transaction_deferrable = off; SET enable_seqscan = off; SET enable_bitmapscan = off; SET jit = off";

/// Everything that has to be known before the table is trusted, in one message. `$1` is the name,
/// quoted as in SQL.
const FIND: &str = "
SELECT pg_is_in_recovery(), current_setting('transaction_read_only') = 'on', current_setting('server_encoding'),
    current_database()::text, namespace.nspname::text, class.oid::bigint, class.relkind::text, class.relpersistence::text,
    class.relispartition, EXISTS (SELECT 1 FROM pg_inherits WHERE class.oid IN (inhparent, inhrelid)),
    row_security_active(class.oid),
    EXISTS (SELECT 1 FROM pg_rewrite WHERE ev_class = class.oid),
    ARRAY(
        SELECT CASE WHEN atthasdef OR attidentity <> '' THEN 'value' WHEN attnotnull THEN 'nothing' ELSE 'null' END
            || ' ' || attname::text || ' ' || format_type(atttypid, atttypmod)
        FROM pg_attribute WHERE attrelid = class.oid AND attnum > 0 AND NOT attisdropped),
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

/// The number that a server got when it was created, and shares with its standbys. Used only if
/// every role may read it.
const SERVER: &str = "SELECT system_identifier FROM pg_control_system()";

const SCHEMAS_WITH_TABLE: &str = "
SELECT namespace.nspname::text FROM pg_class AS class
JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
WHERE class.relname = 'distributed_lock' AND current_database() = $1";

/// The server ignores a schema of the search path that this role has no USAGE on.
const HIDDEN: &str = "
SELECT quote_ident(namespace.nspname::text), quote_ident(current_user::text) FROM pg_class AS class
JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
WHERE class.relname = 'distributed_lock' AND NOT has_schema_privilege(namespace.oid, 'USAGE')
    AND replace(namespace.nspname::text, current_user::text, '$user') = ANY (
        SELECT trim(both ' \"' FROM part) FROM unnest(string_to_array(current_setting('search_path'), ',')) AS part)
LIMIT 1";

const QUOTE: &str = "SELECT quote_ident($1)";

/// Sets nothing behind a pooler, because other clients would get the connection with these
/// settings.
pub(super) async fn prepare(connection: &mut PgConnection, session: i64) -> driver::Result<()> {
    if session::mark(connection, session).await? {
        sqlx::raw_sql(PINS).execute(connection).await?;
    }
    Ok(())
}

/// If the database has only one table of this name, `search_path` can't select another one.
pub(super) async fn find_only(
    connection: &mut PgConnection,
    database: &str,
    schema: Option<&str>,
) -> driver::Result<Option<Server>> {
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

pub(super) async fn find(connection: &mut PgConnection, schema: Option<&str>) -> driver::Result<Found> {
    let name = match schema {
        Some(schema) => format!("{}.distributed_lock", quoted(connection, schema).await?),
        None => "distributed_lock".to_owned(),
    };
    let row = sqlx::query(FIND).bind(name).fetch_one(&mut *connection).await?;
    if row.try_get(0)? {
        return Err(StepError::disconnected("the server is a standby, which only reads"));
    }
    if row.try_get(1)? {
        let setting =
            "the session may only read: `default_transaction_read_only` is on for this role or database";
        return Err(StepError::refused(setting));
    }
    let Some(oid) = row.try_get::<Option<i64>, _>(5)? else { return nothing(connection).await };
    let schema: &str = row.try_get(4)?;
    let unusable = |reason: &str| Ok(Found::Unusable(format!("`{schema}.distributed_lock` {reason}")));
    if let Some(reason) = unusable_form(&row)? {
        return unusable(reason);
    }
    match compare(&COLUMNS, &declared(&row.try_get::<Vec<_>, _>(12)?), needed) {
        Compared::Fit => {}
        Compared::Missing(column) => {
            let schema = schema.to_owned();
            return Ok(match migrate::newer(connection, &schema).await? {
                Some(version) => {
                    Found::Unusable(by_newer(&format!("{schema}.distributed_lock"), column, version))
                }
                None => Found::Differs(column),
            });
        }
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
        longest_message: usize::MAX,
        is_ascii_only: !matches!(encoding, "UTF8" | "SQL_ASCII"),
        keeps_statements: true,
    }))
}

/// No table was found, or none that this role may use.
async fn nothing(connection: &mut PgConnection) -> driver::Result<Found> {
    let hidden: Option<(String, String)> = sqlx::query_as(HIDDEN).fetch_optional(connection).await?;
    let Some((schema, role)) = hidden else { return Ok(Found::Nothing) };
    let message = format!(
        "permission denied for schema {schema}, which has a table `distributed_lock`: the role {role} needs the right \
         USAGE there"
    );
    Err(StepError::refused(message))
}

/// Why what `FIND` found can't keep locks, whatever its columns are. The text follows its name.
fn unusable_form(row: &PgRow) -> driver::Result<Option<&'static str>> {
    let (schema, kind, persistence): (&str, &str, &str) = (row.try_get(4)?, row.try_get(6)?, row.try_get(7)?);
    if schema.contains(DOLLAR_QUOTE) {
        return Ok(Some("is in a schema whose name has in it what lock-db quotes its statements with"));
    }
    match kind {
        "r" => {}
        "p" => return Ok(Some("is partitioned: a row there can't be found again by where it lies")),
        "f" => return Ok(Some("is a foreign table: its rows can't be locked from here")),
        "v" | "m" => return Ok(Some("is a view: lock-db needs the table itself")),
        _ => return Ok(Some("is no table")),
    }
    if persistence != "p" {
        return Ok(Some("is unlogged or temporary: a crash of the server would forget who holds a lock"));
    }
    if row.try_get(8)? || row.try_get(9)? {
        return Ok(Some("takes part in inheritance or partitioning: its rows may lie in other tables"));
    }
    if row.try_get(10)? {
        return Ok(Some(
            "has row level security, which hides rows from this role: give the role BYPASSRLS, make it the owner of the \
             table, or disable row level security there",
        ));
    }
    if row.try_get(11)? {
        return Ok(Some("has rewrite rules, so that statements do something else than they say"));
    }
    Ok(None)
}

/// Parses columns of the form `value name type`. A name with a blank is not one of ours.
/// `quote_all_identifiers` puts types in quotes.
fn declared(columns: &[String]) -> HashMap<String, Declared> {
    let parts = columns.iter().filter_map(|column| {
        let (unless_named, column) = column.split_once(' ')?;
        let (name, kind) = column.split_once(' ')?;
        let unless_named = UnlessNamed::parse(unless_named);
        Some((name.to_owned(), Declared { kind: kind.replace('"', ""), unless_named }))
    });
    parts.collect()
}

/// What a column needs if this type, as `format_type` names it, does not fit. CHAR does not fit,
/// because it is padded with blanks.
fn needed(content: Content, kind: &str) -> Option<String> {
    let (fits, needed) = match content {
        Content::Id | Content::Integer => (kind == "bigint", "BIGINT".to_owned()),
        // Only TEXT: with another type the index is not used.
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

pub(super) async fn quoted(connection: &mut PgConnection, name: &str) -> driver::Result<String> {
    Ok(sqlx::query_scalar(QUOTE).bind(name).fetch_one(connection).await?)
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
