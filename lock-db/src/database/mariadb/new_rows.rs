//! Claims of names that have no rows yet, on MariaDB. The rows are made already granted.
//!
//! Each is one message, which the server completes without the client. Names are looked for with a
//! dirty read. It also finds the row that an open transaction has made, and does not wait for that
//! transaction. If another transaction makes one of the rows at the same time, the INSERT waits for
//! its commit, and leaves that row as it is. It then returns that row, which has another secret. (With
//! the same secret it is an earlier copy of the same claim.)
//!
//! `ON DUPLICATE KEY UPDATE` also needs the privilege without which the lease could neither be renewed
//! nor released.
//!
//! New rows are a list of values. An INSERT with a SELECT would lock the counter of the table and use
//! up numbers.

use sqlx::mysql::{MySqlConnection, MySqlRow};

use super::{ACQUIRE, BATCH_OF_ASKED, bind_claim, taken};
use crate::database::driver;
use crate::database::mysql_family::batch::{NewRows, batch_as_json};
use crate::database::{Claim, Grant, Server};
use crate::options::micros;

/// `ACQUIRE`, which is `{statement}`, or the row.
const ACQUIRE_OR_MAKE: &str = "
BEGIN NOT ATOMIC
    DECLARE wanted VARBINARY(255) DEFAULT ?;
    DECLARE found BIGINT;
    DECLARE EXIT HANDLER FOR SQLEXCEPTION BEGIN ROLLBACK; RESIGNAL; END;
    SET TRANSACTION ISOLATION LEVEL READ UNCOMMITTED;
    SELECT MAX(id) INTO found FROM {table} FORCE INDEX (distributed_lock_name) WHERE lock_name = wanted;
    START TRANSACTION;
    IF found IS NULL THEN
        INSERT INTO {table} (lock_name, secret_key, owner, ttl_micros, expire_time, fencing_token)
        VALUES (wanted, ?, ?, ?, TIMESTAMPADD(MICROSECOND, ?, UTC_TIMESTAMP(6)),
            TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)))
        ON DUPLICATE KEY UPDATE
            expire_time = IF(distributed_lock.secret_key = VALUES(secret_key), VALUES(expire_time), distributed_lock.expire_time),
            ttl_micros = IF(distributed_lock.secret_key = VALUES(secret_key), VALUES(ttl_micros), distributed_lock.ttl_micros)
        RETURNING fencing_token, id, FALSE, fencing_token - previous_token, secret_key;
    ELSE
        {statement};
    END IF;
    COMMIT;
END";

/// `BATCH`, which is `{statement}` and reads the variable `asked`, and the rows that are new. A claim
/// whose row turns out to exist becomes a part of the batch.
///
/// The client sends what it takes if all of them are new: a query for their rows, and the values of the
/// INSERT, as text. Reading JSON takes several times as long, so the server only does that if the query
/// has found a row. All texts are digits and letters. `group_concat_max_len` limits those that the
/// server makes.
///
/// The new rows come last. While other transactions wait for them, this one waits for nothing any more,
/// such as the counter of the table.
const BATCH_AND_MAKE: &str = concat!(
    r#"
BEGIN NOT ATOMIC
    DECLARE new LONGTEXT CHARACTER SET ascii DEFAULT ?;
    DECLARE made LONGTEXT CHARACTER SET ascii DEFAULT ?;
    DECLARE asked LONGTEXT CHARACTER SET ascii DEFAULT ?;
    DECLARE found LONGTEXT CHARACTER SET ascii;
    DECLARE EXIT HANDLER FOR SQLEXCEPTION BEGIN ROLLBACK; RESIGNAL; END;
    SET TRANSACTION ISOLATION LEVEL READ UNCOMMITTED;
    EXECUTE IMMEDIATE ?;
    IF @lock_db_found > 0 THEN
        SET TRANSACTION ISOLATION LEVEL READ UNCOMMITTED;
        SELECT GROUP_CONCAT(CASE WHEN lease.id IS NULL THEN CONCAT(
                '(x''', new.lock_name, ''',''', new.secret_key, ''',@lock_db_owner,', new.ttl, ',TIMESTAMPADD(MICROSECOND,',
                new.ttl, ',@lock_db_now),@lock_db_token)') END),
            GROUP_CONCAT(CASE WHEN lease.id IS NOT NULL THEN CONCAT(
                '["', new.lock_name, '","', new.secret_key, '",', new.ttl, ',"', new.queue_key, '"]') END)
        INTO made, found
        FROM JSON_TABLE(new, '$[*]' COLUMNS (
                lock_name VARCHAR(510) /*M!101100 CHARACTER SET ascii */ PATH '$[0]',
                secret_key VARCHAR(32) /*M!101100 CHARACTER SET ascii */ PATH '$[1]', ttl BIGINT PATH '$[2]',
                queue_key VARCHAR("#,
    layout!(key),
    r#") /*M!101100 CHARACTER SET ascii */ PATH '$[3]')) AS new
        LEFT JOIN {table} AS lease FORCE INDEX (distributed_lock_name) ON lease.lock_name = UNHEX(new.lock_name);
    END IF;
    IF found IS NOT NULL THEN
        SET asked = CONCAT(LEFT(asked, LENGTH(asked) - 1), IF(asked = '[]', '', ','), found, ']');
    END IF;
    START TRANSACTION;
    IF asked <> '[]' THEN
        {statement};
    END IF;
    SET @lock_db_owner = ?, @lock_db_now = UTC_TIMESTAMP(6),
        @lock_db_token = TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6));
    IF made IS NOT NULL THEN
        EXECUTE IMMEDIATE CONCAT(?, made, ' ON DUPLICATE KEY UPDATE
            expire_time = IF(distributed_lock.secret_key = VALUES(secret_key), VALUES(expire_time), distributed_lock.expire_time),
            ttl_micros = IF(distributed_lock.secret_key = VALUES(secret_key), VALUES(ttl_micros), distributed_lock.ttl_micros)
            RETURNING secret_key, fencing_token, id, TRUE, FALSE, fencing_token - previous_token');
    END IF;
    COMMIT;
END"#
);

const FIND: &str = "
SELECT COUNT(*) INTO @lock_db_found FROM {table} FORCE INDEX (distributed_lock_name) WHERE lock_name IN ";

const INSERT: &str = "
INSERT INTO {table} (lock_name, secret_key, owner, ttl_micros, expire_time, fencing_token) VALUES ";

pub(in crate::database) async fn acquire(
    connection: &mut MySqlConnection,
    server: &Server,
    claim: &Claim,
) -> driver::Result<Option<Grant>> {
    let (secret, ttl, owner) = (claim.secret.as_str(), micros(claim.ttl), server.storable(&claim.owner));
    let query = sqlx::query(server.table.sql_in(ACQUIRE_OR_MAKE, ACQUIRE)).bind(claim.name.as_bytes());
    let query = query.bind(secret).bind(owner).bind(ttl).bind(ttl);
    taken(connection, bind_claim(query, server, claim), claim).await
}

/// Returns the rows that were written. `known` are the releases, and the claims whose rows are
/// known, as `batch_as_json` writes them.
pub(super) async fn batch(
    connection: &mut MySqlConnection,
    server: &Server,
    known: &str,
    claims: &[Claim],
    owner: &str,
    rest: &str,
) -> driver::Result<Vec<MySqlRow>> {
    let NewRows { names, values } = NewRows::of(claims);
    let new = batch_as_json(&[], claims.iter().filter(|claim| claim.makes_row));
    let (find, insert) =
        (format!("{}{names}", server.table.sql(FIND).0), server.table.sql(INSERT).0.to_string());
    let query = sqlx::query(server.table.sql_in(BATCH_AND_MAKE, BATCH_OF_ASKED));
    let query = query.bind(new).bind(values).bind(known).bind(find);
    let query = query.bind(owner).bind(rest).bind(owner).bind(insert);
    Ok(query.fetch_all(connection).await?)
}
