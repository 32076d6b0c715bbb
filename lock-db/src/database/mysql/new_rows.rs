//! Claims of names that have no rows yet, on MySQL, in the message of a batch.
//!
//! If none of the names has a row, the rows are made already granted. Otherwise the missing ones are
//! made free, for the batch to take. MySQL has no compound statements, so the INSERT is prepared from
//! a variable, which has another text if a row was found.

use sqlx::mysql::MySqlConnection;

use crate::database::driver;
use crate::database::mysql_family::batch::{NewRows, batch_as_json, batch_part};
use crate::database::{Claim, Grant, ReleaseClaim, Server};

const DIRTY: &str = "SET TRANSACTION ISOLATION LEVEL READ UNCOMMITTED";

/// How many rows of the names there are that may be new. A dirty read, which locks nothing. It also
/// finds the row that an open transaction has made, so that nothing waits for that transaction.
const FIND: &str = "
SELECT COUNT(*) INTO @lock_db_found FROM {table} FORCE INDEX (distributed_lock_name) WHERE lock_name IN ";

/// Makes the rows, granted, if there are none. `ON DUPLICATE` leaves rows as they are that others make
/// at the same time. IGNORE would also hide that a secret was truncated. A row that is not made for its
/// id is found missing by the next attempt, which reports it.
///
/// A list of values: an INSERT with a SELECT uses up numbers of the counter.
const INSERT: &str = "
INSERT INTO {table} (lock_name, secret_key, owner, ttl_micros, expire_time, fencing_token) VALUES ";

const OR_LEAVE: &str = " ON DUPLICATE KEY UPDATE secret_key = distributed_lock.secret_key";

/// If some of the rows are there: the names of the others, as JSON in a variable. Also a dirty read. An
/// INSERT that reads the table itself would lock the gaps in which the rows belong, and two of them
/// would wait for each other.
pub(super) const NEW: &str = "
SELECT JSON_ARRAYAGG(asked.lock_name) INTO @lock_db_new
FROM JSON_TABLE(@lock_db_maybe, '$[*]' COLUMNS (
        lock_name VARCHAR(510) PATH '$[0]', makes_row BIGINT PATH '$[4]')) AS asked
LEFT JOIN {table} AS lease FORCE INDEX (distributed_lock_name) ON lease.lock_name = UNHEX(asked.lock_name)
WHERE asked.makes_row AND lease.id IS NULL";

/// Makes those rows, free, for `BATCH` to take. IGNORE can't hide a truncated name, because the column
/// was checked to hold the longest name.
pub(super) const MAKE: &str = "
INSERT IGNORE INTO {table} (lock_name)
SELECT UNHEX(new_name) FROM JSON_TABLE(@lock_db_new, '$[*]' COLUMNS (new_name VARCHAR(510) PATH '$')) AS made";

/// `acquire`, or makes the row.
pub(in crate::database) async fn acquire(
    connection: &mut MySqlConnection,
    server: &Server,
    claim: &Claim,
) -> driver::Result<Option<Grant>> {
    let taken = batch_part(connection, server, &[], std::slice::from_ref(claim)).await?;
    Ok(taken.grants.into_iter().next().flatten())
}

/// The message of `batch` that makes rows. `set` gives its variables their values. `begin` and `end`
/// are its parts that depend on the cluster.
pub(super) fn message(
    server: &Server,
    releases: &[ReleaseClaim],
    claims: &[Claim],
    set: &str,
    begin: &str,
    end: &str,
) -> String {
    let known = batch_as_json(releases, claims.iter().filter(|claim| !claim.makes_row));
    let NewRows { names, values } = NewRows::of(claims);
    let find = format!("{}{names}", server.table.sql(FIND).0);
    let insert = format!("{}{values}{OR_LEAVE}", server.table.sql(INSERT).0).replace('\'', "''");
    format!(
        "{set}; {DIRTY}; {find};
        SET @lock_db_all = @lock_db_asked, @lock_db_maybe = IF(@lock_db_found = 0, '[]', @lock_db_asked),
            @lock_db_insert = IF(@lock_db_found = 0, '{insert}', 'DO 0'),
            @lock_db_asked = IF(@lock_db_found = 0, '{known}', @lock_db_asked);
        {DIRTY}; EXECUTE lock_db_new; PREPARE lock_db_insert FROM @lock_db_insert;
        START TRANSACTION{begin}; EXECUTE lock_db_make; EXECUTE lock_db_batch;
        SET @lock_db_now = UTC_TIMESTAMP(6),
            @lock_db_token = TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6));
        EXECUTE lock_db_insert;
        SET @lock_db_asked = @lock_db_all; EXECUTE lock_db_outcome{end}"
    )
}
