//! Finds problems before the first lock does: missing privileges, rows that can't be created, and
//! settings.

use std::fmt::Write as _;

use sqlx::postgres::PgConnection;
use sqlx::{Connection, Row};

use super::sequence::{self, Behind};
use crate::database::StepError;
use crate::database::driver;
use crate::database::{Server, foreign_write, name_for_check};
use crate::{Finding, FindingKind};

/// The privileges that locks need and this role lacks, and the role's name. Column privileges are
/// not enough: LOCK TABLE needs table privileges.
const RIGHTS: &str = "
SELECT ARRAY(
        SELECT privilege FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) AS needed (privilege)
        WHERE NOT has_table_privilege(class.oid, privilege)),
    quote_ident(current_user::text)
FROM pg_class AS class WHERE class.oid = to_regclass($1)";

/// The sequence of `id` belongs to the column and needs no privilege, unless it was created
/// otherwise.
const SEQUENCE_RIGHT: &str = "
SELECT depends.refobjid::regclass::text FROM pg_attrdef AS filled
JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum AND attname = 'id'
JOIN pg_depend AS depends ON depends.classid = 'pg_attrdef'::regclass AND depends.objid = filled.oid
    AND depends.refclassid = 'pg_class'::regclass
JOIN pg_class AS sequence ON sequence.oid = depends.refobjid
WHERE adrelid = to_regclass($1)
    AND CASE WHEN sequence.relkind = 'S' THEN NOT has_sequence_privilege(sequence.oid, 'USAGE,UPDATE') ELSE false END
LIMIT 1";

/// What locks do, on a row that is rolled back.
const MAKE: &str =
    "INSERT INTO {table} (lock_name, lock_kind) VALUES ($1, 'insert') ON CONFLICT (lock_name) DO NOTHING";
const LOCK: &str = "SELECT * FROM {table} WHERE lock_name = $1 FOR UPDATE NOWAIT";
const WRITE: &str = "
UPDATE {table} SET secret_key = secret_key, fencing_token = fencing_token, previous_token = previous_token, owner = owner,
    acquire_time = acquire_time, expire_time = expire_time, ttl_micros = ttl_micros, waiters = waiters
WHERE lock_name = $1";

/// The connections of standbys, and of tools that copy the log, are visible to every role.
const SETTINGS: &str = "
SELECT current_setting('fsync') = 'off', current_setting('synchronous_commit') = 'off',
    COALESCE(current_setting('idle_session_timeout', true), '0'),
    current_setting('synchronous_commit') = 'local', current_setting('synchronous_standby_names') = '',
    (SELECT count(*) FROM pg_stat_replication)";

pub(super) async fn check(connection: &mut PgConnection, server: &Server) -> driver::Result<Vec<Finding>> {
    let table = server.table.name();
    let row = sqlx::query(RIGHTS).bind(table).fetch_one(&mut *connection).await?;
    let (missing, role): (Vec<String>, String) = (row.try_get(0)?, row.try_get(1)?);
    let mut lacks = String::new();
    if !missing.is_empty() {
        let rights = missing.join(", ");
        let _infallible = write!(
            lacks,
            "permission denied for table {table}: the role {role} lacks the right {rights} (GRANT {rights} ON {table} TO {role})"
        );
    }
    let sequence: Option<String> =
        sqlx::query_scalar(SEQUENCE_RIGHT).bind(table).fetch_optional(&mut *connection).await?;
    if let Some(sequence) = sequence {
        let and = if lacks.is_empty() { "" } else { "; " };
        let _infallible = write!(
            lacks,
            "{and}permission denied for sequence {sequence} of {table}: the role {role} lacks the right USAGE \
             (GRANT USAGE ON SEQUENCE {sequence} TO {role})"
        );
    }
    if !lacks.is_empty() {
        return Err(StepError::refused(lacks));
    }
    let mut findings = Vec::new();
    match sequence::is_behind(connection, server).await? {
        Behind::No => {}
        Behind::Later => findings.push(Finding::new(
            FindingKind::Sequence,
            format!(
            "the sequence of the column `id` of {table} is behind the rows: some day new names can't be locked; mend it by \
             `{}`",
            sequence::remedy(server)
        ),
        )),
        Behind::Now => {
            let message = format!(
                "new names can't be locked in {table}: duplicate key, as the sequence of its column `id` is behind the rows; \
                 mend it by `locks.migrate()` as the owner of the table, or by `{}`",
                sequence::remedy(server)
            );
            return Err(StepError::refused(message));
        }
    }
    try_out(connection, server).await?;
    settings(connection, &mut findings).await?;
    Ok(findings)
}

/// Creates a row, locks and writes it, and rolls back. Any obstacle to one of these steps shows as
/// an error.
async fn try_out(connection: &mut PgConnection, server: &Server) -> driver::Result<()> {
    let name = name_for_check()?;
    let mut transaction = connection.begin_with("BEGIN").await?;
    let made = sqlx::query(server.table.sql(MAKE)).bind(&name).execute(&mut *transaction).await;
    let made = made.map_err(|error| sequence::explained(server, error.into()))?;
    let locked = sqlx::query(server.table.sql(LOCK)).bind(&name).fetch_optional(&mut *transaction).await?;
    let written = sqlx::query(server.table.sql(WRITE)).bind(&name).execute(&mut *transaction).await?;
    transaction.rollback().await?;
    if made.rows_affected() == 1 && locked.is_some() && written.rows_affected() == 1 {
        return Ok(());
    }
    Err(foreign_write())
}

async fn settings(connection: &mut PgConnection, findings: &mut Vec<Finding>) -> driver::Result<()> {
    let row = sqlx::query(SETTINGS).fetch_one(connection).await?;
    let (no_fsync, is_asynchronous, idle): (bool, bool, String) =
        (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let (is_only_local, no_standby_counts, standbys): (bool, bool, i64) =
        (row.try_get(3)?, row.try_get(4)?, row.try_get(5)?);
    if no_fsync {
        findings.push(Finding::of_setting(
            FindingKind::NotDurable,
            "fsync",
            "`fsync` is off: a crash of the server's host may damage the database, with the locks in it",
        ));
    }
    if is_asynchronous {
        findings.push(Finding::of_setting(
            FindingKind::NotDurable,
            "synchronous_commit",
            "`synchronous_commit` is off: a crash of the server forgets the newest grants, and then a lock may be granted \
             twice; set it to `on` for this role",
        ));
    }
    if standbys > 0 && (no_standby_counts || is_only_local) {
        let (setting, is, remedy) = if no_standby_counts {
            ("synchronous_standby_names", "empty", "name the standbys there")
        } else {
            ("synchronous_commit", "local", "set it to `on` for this role")
        };
        findings.push(Finding::of_setting(
            FindingKind::AsynchronousStandby,
            setting,
            format!(
                "`{setting}` is {is}, so commits wait for none of the {standbys} standbys: a failover forgets the newest \
                 grants, and then a lock may be granted twice; {remedy}"
            ),
        ));
    }
    if idle != "0" {
        findings.push(Finding::of_setting(
            FindingKind::IdleTimeout,
            "idle_session_timeout",
            format!(
                "`idle_session_timeout` is {idle}: the server ends the connections of lock-db when nothing is locked for so \
                 long, and the next lock waits for a new one; set it to 0 for this role"
            ),
        ));
    }
    Ok(())
}
