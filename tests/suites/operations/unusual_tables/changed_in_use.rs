//! What is done to a table that is in use: by replication, policies and triggers.

use lock_db::{Error, Locks};
use lock_tests::{PostgresServer, TestDatabase, account, pool};
use sqlx::Postgres;

use super::requests::{Answer, Answers, all_are_granted, ask, locks_in_use, nothing_is_called_held};
use super::rows_hidden::{ENABLE, grant};
use super::triggers::is_not_granted_under;

lock_tests::cases! {
    on postgres:
    new_names_can_be_locked_although_their_ids_are_in_use,
    a_check_finds_a_sequence_behind_the_rows,
    a_migration_repairs_a_sequence_in_use,
    security_that_is_enabled_while_the_table_is_in_use,
    a_row_lock_that_a_trigger_does_not_let_be_written_is_not_granted,
}

/// The identity sequence behind the rows, as logical replication leaves it on a new primary.
///
/// Or the first request for a new name fails with an error that names the duplicate key.
async fn new_names_can_be_locked_although_their_ids_are_in_use(database: &PostgresServer) {
    let used = locks_in_use(database).await;
    database
        .run(
            "INSERT INTO distributed_lock (lock_name) SELECT 'old:' || g FROM generate_series(1, 5000) g;
            ALTER TABLE distributed_lock ALTER COLUMN id RESTART WITH 1",
        )
        .await;
    let pool = database.pool(4).await;
    for locks in [Locks::new(pool.clone()), used] {
        assert!(locks.insert_lock("old:1").try_acquire().await.unwrap().is_some());
        match locks.insert_lock("new:1").try_acquire().await {
            Ok(lease) => {
                assert!(lease.is_some(), "nobody holds it");
                let answers = ask(&locks, &pool).await;
                nothing_is_called_held("sequence", &answers);
                all_are_granted("sequence", &answers);
            }
            Err(error) => {
                assert!(
                    matches!(
                        error,
                        Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. }
                    ) && !error.is_retryable(),
                    "{error:?}"
                );
                assert!(error.to_string().contains("duplicate key"), "{error}");
            }
        }
        locks.close().await;
    }
}

/// With the statement that mends it; without the right to look, by a row that can't be made.
async fn a_check_finds_a_sequence_behind_the_rows(database: &PostgresServer) {
    let owner = locks_in_use(database).await;
    owner.check().await.unwrap();
    let (url, role, _at_end) = account(database).await;
    grant(database, &role).await;
    let behind = "ALTER TABLE distributed_lock ALTER COLUMN id RESTART WITH 1";
    database.run(behind).await;
    let pool = pool::<Postgres>(&url, 2).await;
    let restricted = Locks::new(pool.clone());
    for locks in [&owner, &restricted] {
        let error = locks.check().await.unwrap_err();
        assert!(
            matches!(error, Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. })
                && !error.is_retryable(),
            "{error:?}"
        );
        let told = error.to_string();
        assert!(told.contains("duplicate key") && told.contains("setval"), "{told}");
        let (_, statement) = told.rsplit_once("or by `").unwrap();
        let (statement, _) = statement.rsplit_once('`').unwrap();
        // It is complete.
        database.run(statement).await;
        for locks in [&owner, &restricted] {
            locks.check().await.unwrap();
        }
        database.run(behind).await;
    }
    let statement = "SELECT setval(pg_get_serial_sequence('distributed_lock', 'id'), (SELECT max(id) FROM distributed_lock))";
    database.run(statement).await;
    // It is told before it comes to that.
    database.run("INSERT INTO distributed_lock (id, lock_name) VALUES (1000000, 'far')").await;
    let report = owner.check().await.unwrap();
    assert!(report.warnings().iter().any(|warning| warning.contains("setval")), "{report:?}");
    restricted.close().await;
    pool.close().await;
}

/// While others make rows.
async fn a_migration_repairs_a_sequence_in_use(database: &PostgresServer) {
    let locks = locks_in_use(database).await;
    let restart = "ALTER TABLE distributed_lock ALTER COLUMN id RESTART WITH 1";
    for round in 0..5 {
        database.run(restart).await;
        let making = tokio::spawn({
            let locks = locks.clone();
            async move {
                for number in 0..20 {
                    // Or an error that says so, as long as it is behind.
                    if let Err(error) = locks.insert_lock(format!("{round}: {number}")).try_acquire().await {
                        assert!(error.to_string().contains("duplicate key"), "{error:?}");
                    }
                }
            }
        });
        let others = [Locks::new(database.pool(1).await), Locks::new(database.pool(1).await)];
        let (one, two) = tokio::join!(others[0].migrate(), others[1].migrate());
        one.unwrap();
        two.unwrap();
        locks.check().await.unwrap();
        locks
            .insert_lock(format!("{round}: new"))
            .try_acquire()
            .await
            .unwrap()
            .unwrap()
            .release()
            .await
            .unwrap();
        making.await.unwrap();
    }
}

async fn a_row_lock_that_a_trigger_does_not_let_be_written_is_not_granted(database: &PostgresServer) {
    let keep = "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END';
            CREATE TRIGGER keep BEFORE INSERT OR UPDATE ON distributed_lock FOR EACH ROW EXECUTE FUNCTION keep()";
    is_not_granted_under(database, keep).await;
}

async fn security_that_is_enabled_while_the_table_is_in_use(database: &PostgresServer) {
    let owner = locks_in_use(database).await;
    let (url, role, _at_end) = account(database).await;
    grant(database, &role).await;
    for policies in [
        "CREATE POLICY reads ON distributed_lock FOR SELECT USING (true)",
        "CREATE POLICY inserts ON distributed_lock FOR INSERT WITH CHECK (true)",
        "CREATE POLICY updates ON distributed_lock FOR UPDATE USING (lock_name NOT LIKE 'used%')",
    ] {
        let pool = pool::<Postgres>(&url, 4).await;
        let locks = Locks::new(pool.clone());
        locks.insert_lock("used").acquire().await.unwrap().release().await.unwrap();
        database.run(ENABLE).await;
        database.run(policies).await;
        nothing_is_called_held(policies, &ask_one_by_one(&locks).await);
        locks.close().await;
        pool.close().await;
        database.run("ALTER TABLE distributed_lock DISABLE ROW LEVEL SECURITY").await;
        // Nothing was left behind.
        all_are_granted("the owner", &ask(&owner, &database.pool(4).await).await);
    }
}

/// What a policy refuses ends a transaction, so this asks for no locks in transactions.
async fn ask_one_by_one(locks: &Locks<Postgres>) -> Answers {
    let lease = async |name: &str| -> Result<bool, Error> {
        let lease = locks.insert_lock(name).try_acquire().await?;
        if let Some(lease) = lease {
            lease.release().await?;
            return Ok(true);
        }
        Ok(false)
    };
    let row = async |name: &str| -> Result<bool, Error> {
        let guard = locks.row_lock(name).try_acquire().await?;
        if let Some(guard) = guard {
            guard.commit().await?;
            return Ok(true);
        }
        Ok(false)
    };
    vec![
        Answer::new("lease", lease("used").await),
        Answer::new("new lease", lease("new").await),
        Answer::new("row lock", row("used row").await),
        Answer::new("new row lock", row("new row").await),
    ]
}
