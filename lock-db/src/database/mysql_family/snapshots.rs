//! Finds out whose read views keep old row versions.

use sqlx::Row;
use sqlx::mysql::MySqlConnection;

use super::errors::{ACCESS_DENIED, number};
use crate::database::driver;
use crate::database::{OldSnapshots, Server};

/// Purge removes no version that the server's oldest read view may see. Both servers show how many
/// transactions purge has left and which transactions are open, to accounts with the PROCESS
/// privilege.
///
/// A transaction is old after ten minutes, or after two seconds while purge has left many. InnoDB
/// reports times in the server's own time zone.
const OLD: &str = "
SELECT CAST(transaction.trx_mysql_thread_id AS CHAR), CONVERT(COALESCE(session.user, '') USING utf8mb4),
    CONVERT(COALESCE(session.host, '') USING utf8mb4),
    CONVERT(COALESCE(session.command, '') USING utf8mb4),
    CAST(TIMESTAMPDIFF(SECOND, transaction.trx_started, now.here) AS SIGNED), CAST(history.length AS SIGNED)
FROM information_schema.innodb_trx AS transaction
JOIN (
    SELECT MAX(count) AS length FROM information_schema.innodb_metrics WHERE name = 'trx_rseg_history_len') AS history
JOIN (SELECT CONVERT_TZ(UTC_TIMESTAMP(), '+00:00', 'SYSTEM') AS here) AS now
LEFT JOIN information_schema.processlist AS session ON session.id = transaction.trx_mysql_thread_id
WHERE transaction.trx_mysql_thread_id <> CONNECTION_ID()
    AND (transaction.trx_started < now.here - INTERVAL 10 MINUTE
        OR (history.length >= 5000 AND transaction.trx_started < now.here - INTERVAL 2 SECOND))
ORDER BY transaction.trx_started LIMIT 3";

pub(super) async fn old(connection: &mut MySqlConnection, _server: &Server) -> driver::Result<OldSnapshots> {
    let found = match sqlx::raw_sql(OLD).fetch_all(connection).await {
        Ok(found) => found,
        Err(error) if number(&error) == Some(ACCESS_DENIED) => {
            let unseen = "whether an old transaction makes hot locks slow can't be seen: GRANT PROCESS shows \
                          `information_schema.innodb_trx`";
            return Ok(OldSnapshots { found: None, unseen: Some(unseen.into()) });
        }
        Err(sqlx::Error::Database(error)) => {
            return Ok(OldSnapshots::unseen(&*error));
        }
        Err(error) => return Err(error.into()),
    };
    let Some(oldest) = found.first() else { return Ok(OldSnapshots::default()) };
    let length: i64 = oldest.try_get(5)?;
    let mut holders = Vec::with_capacity(found.len());
    for row in &found {
        let text = |index: usize| row.try_get::<String, _>(index).map(|text| text.escape_debug().to_string());
        let seconds: i64 = row.try_get(4)?;
        let (id, user, host, command) = (text(0)?, text(1)?, text(2)?, text(3)?);
        holders
            .push(format!("connection {id} of '{user}'@'{host}', {command}, since {seconds} s (KILL {id})"));
    }
    let found = format!(
        "InnoDB keeps the old versions of {length} transactions (history list length), because a transaction is open for long, so plain \
         reads with an old snapshot and purge get slower until it ends: {}",
        holders.join("; ")
    );
    Ok(OldSnapshots { found: Some(found), unseen: None })
}
