//! Finds out whose snapshots keep old row versions.

use sqlx::Row;
use sqlx::postgres::{PgConnection, PgRow};

use crate::database::driver;
use crate::database::{OldSnapshots, Server};

/// The oldest three. The server removes a version when it is visible to no snapshot of the same
/// database, to no snapshot that a standby reports (`hot_standby_feedback`), and to no replication
/// slot. Nothing else matters.
///
/// A snapshot is old if it was taken a given number of transactions ago while a given number of
/// versions is kept, or if it is ten minutes old. Snapshots of autovacuum workers do not count. A
/// role that may not see other roles' sessions (`pg_read_all_stats`) sees who they are and what
/// they hold, but not what they do.
const OLD: &str = "
WITH holding AS (
    SELECT 'session' AS kind, pid::text AS id, usename::text AS role, application_name AS application,
        state, xact_start AS since, GREATEST(age(backend_xmin), age(backend_xid)) AS age, state IS NULL AS is_hidden
    FROM pg_stat_activity
    WHERE pid <> pg_backend_pid() AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
        AND (datname = current_database() OR datname IS NULL)
        AND COALESCE(backend_type, '') <> 'autovacuum worker'
    UNION ALL
    SELECT 'prepared', gid, owner::text, NULL, NULL, prepared, age(transaction), false
    FROM pg_prepared_xacts WHERE database = current_database()
    UNION ALL
    SELECT 'slot', slot_name::text, NULL, NULL, CASE WHEN active THEN 'active' ELSE 'inactive' END, NULL, age(xmin), false
    FROM pg_replication_slots WHERE xmin IS NOT NULL)
SELECT kind, id, role, application, state,
    extract(epoch FROM clock_timestamp() - since)::bigint, is_hidden, COALESCE(dead, 0)
FROM holding
LEFT JOIN (
    SELECT n_dead_tup AS dead FROM pg_stat_user_tables WHERE relid = to_regclass($1)) AS statistics ON true
WHERE (age >= 1000 AND dead >= 1000) OR since < clock_timestamp() - interval '10 minutes'
ORDER BY age DESC LIMIT 3";

pub(super) async fn old(connection: &mut PgConnection, server: &Server) -> driver::Result<OldSnapshots> {
    let found = match sqlx::query(OLD).bind(server.table.name()).fetch_all(connection).await {
        Ok(found) => found,
        // The operator has revoked access to the views, or this kind of server does not have them.
        Err(sqlx::Error::Database(error)) => {
            return Ok(OldSnapshots::unseen(&*error));
        }
        Err(error) => return Err(error.into()),
    };
    let Some(oldest) = found.first() else { return Ok(OldSnapshots::default()) };
    let dead: i64 = oldest.try_get(7)?;
    let mut holders = Vec::with_capacity(found.len());
    let mut is_hidden = false;
    for row in &found {
        holders.push(holder(row)?);
        is_hidden |= row.try_get::<bool, _>(6)?;
    }
    let mut text = format!(
        "`distributed_lock` has {dead} dead versions of rows, and an old snapshot in this database keeps those that died since, so hot \
         locks get slower until it ends: {}. End the oldest one, and set `idle_in_transaction_session_timeout` against the next",
        holders.join("; ")
    );
    if is_hidden {
        text.push_str(
            ". What other roles' sessions do is hidden from this one: GRANT pg_read_all_stats shows it",
        );
    }
    Ok(OldSnapshots { found: Some(text), unseen: None })
}

/// Users choose the names, so they are escaped for the log.
fn holder(row: &PgRow) -> driver::Result<String> {
    let text =
        |index: usize| row.try_get::<Option<&str>, _>(index).map(|text| text.unwrap_or("").escape_debug());
    let since = match row.try_get::<Option<i64>, _>(5)? {
        Some(seconds) => format!(", since {seconds} s"),
        None => String::new(),
    };
    let (id, role, application, state) = (text(1)?, text(2)?, text(3)?, text(4)?);
    Ok(match row.try_get::<&str, _>(0)? {
        "prepared" => {
            format!(
                "the prepared transaction '{id}' of '{role}'{since} (COMMIT PREPARED or ROLLBACK PREPARED)"
            )
        }
        "slot" => {
            format!("the {state} replication slot '{id}' (pg_drop_replication_slot, if nothing uses it)")
        }
        _ => format!(
            "session {id} of '{role}', application '{application}', {state}{since} (pg_terminate_backend({id}))"
        ),
    })
}
