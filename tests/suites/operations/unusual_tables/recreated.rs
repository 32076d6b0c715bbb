//! A table that operators drop, empty, restore, rename or alter under running services, which have prepared their
//! statements and know their rows.

use std::time::Duration;

use lock_db::{Error, Lease, Locks, Loss};
use lock_tests::{Backend, Queued, TestDatabase, TestServer, eventually, foreign_entry};
use sqlx::Pool;

use super::requests::{Answer, all_are_granted, ask, nothing_is_called_held};

lock_tests::cases! {
    on every database:
    a_new_table_costs_a_service_one_call_at_most,
    a_table_that_is_missing_for_a_while,
    rows_of_an_older_dump,
    leases_held_over_the_end_of_the_table_are_lost;

    on every server:
    an_open_transaction_during_a_change_of_the_table,
    leases_are_renewed_in_a_table_of_another_collation,
}

const PATIENCE: Duration = Duration::from_secs(20);

/// One of several processes.
struct Service<DB: Backend> {
    pool: Pool<DB>,
    locks: Locks<DB>,
}

impl<DB: Backend> Service<DB> {
    async fn new<T: TestDatabase<Database = DB>>(database: &T) -> Self {
        let pool = database.pool(2).await;
        let service = Self { locks: Locks::new(pool.clone()), pool };
        // Twice: then all statements are prepared, and all rows known.
        for _ in 0..2 {
            all_are_granted("before", &ask(&service.locks, &service.pool).await);
        }
        service
    }

    /// At most one call fails, and says that it may be made again. Then all is as before.
    async fn goes_on_after(&self, change: &str) {
        let answers = ask(&self.locks, &self.pool).await;
        nothing_is_called_held(change, &answers);
        let failed: Vec<&Answer> = answers.iter().filter(|answer| answer.granted.is_err()).collect();
        assert!(failed.len() <= 1, "{change}: {failed:?}");
        for answer in failed {
            assert!(answer.granted.as_ref().is_err_and(Error::is_retryable), "{change}: {answer:?}");
        }
        all_are_granted(change, &ask(&self.locks, &self.pool).await);
    }
}

fn schema<T: TestDatabase>() -> &'static str {
    match T::NAME {
        "postgres" => lock_db::schema::POSTGRES,
        "sqlite" => lock_db::schema::SQLITE,
        _ => lock_db::schema::MYSQL,
    }
}

/// What operators do, after which the table can keep locks as before.
fn changes<T: TestDatabase>() -> Vec<(&'static str, String)> {
    let schema = schema::<T>();
    let mut changes = vec![
        ("dropped and made anew", format!("DROP TABLE distributed_lock; {schema}")),
        ("a column added", "ALTER TABLE distributed_lock ADD COLUMN note VARCHAR(40)".to_owned()),
        ("a column dropped", "ALTER TABLE distributed_lock DROP COLUMN note".to_owned()),
    ];
    let more: &[(&str, &str)] = match T::NAME {
        "postgres" => &[
            ("truncated", "TRUNCATE distributed_lock RESTART IDENTITY"),
            (
                "renamed away and back",
                "ALTER TABLE distributed_lock RENAME TO away; ALTER TABLE away RENAME TO distributed_lock",
            ),
            (
                "moved away and back",
                "CREATE SCHEMA away; ALTER TABLE distributed_lock SET SCHEMA away;
                ALTER TABLE away.distributed_lock SET SCHEMA public; DROP SCHEMA away",
            ),
            ("another type", "ALTER TABLE distributed_lock ALTER COLUMN owner TYPE VARCHAR(300)"),
            (
                "another type of several",
                "ALTER TABLE distributed_lock ALTER COLUMN secret_key TYPE VARCHAR(40), ALTER COLUMN waiters TYPE VARCHAR,
                ALTER COLUMN owner TYPE TEXT, ALTER COLUMN lock_kind TYPE VARCHAR(20)",
            ),
            (
                "another index",
                "ALTER TABLE distributed_lock DROP CONSTRAINT distributed_lock_name;
                ALTER TABLE distributed_lock ADD CONSTRAINT distributed_lock_name UNIQUE (lock_name)",
            ),
            ("an index more", "CREATE INDEX more ON distributed_lock (owner)"),
            ("vacuumed in full", "VACUUM FULL distributed_lock"),
            ("clustered", "CLUSTER distributed_lock USING distributed_lock_name"),
            ("reindexed", "REINDEX TABLE distributed_lock"),
            ("another fill factor", "ALTER TABLE distributed_lock SET (fillfactor = 70)"),
        ],
        "sqlite" => &[
            ("emptied", "DELETE FROM distributed_lock; DELETE FROM sqlite_sequence"),
            (
                "renamed away and back",
                "ALTER TABLE distributed_lock RENAME TO away; ALTER TABLE away RENAME TO distributed_lock",
            ),
            ("vacuumed", "VACUUM"),
            ("an index more", "CREATE INDEX more ON distributed_lock (owner)"),
            ("reindexed", "REINDEX"),
            ("analyzed", "ANALYZE"),
        ],
        _ => &[
            ("truncated", "TRUNCATE distributed_lock"),
            ("renamed away and back", "RENAME TABLE distributed_lock TO away, away TO distributed_lock"),
            ("another type", "ALTER TABLE distributed_lock MODIFY owner VARCHAR(300) CHARACTER SET utf8mb4 NOT NULL DEFAULT ''"),
            (
                "another character set",
                "ALTER TABLE distributed_lock MODIFY owner VARCHAR(255) CHARACTER SET latin1 NOT NULL DEFAULT ''",
            ),
            ("converted", "ALTER TABLE distributed_lock CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci"),
            ("converted anew", "ALTER TABLE distributed_lock CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci"),
            (
                "another index",
                "ALTER TABLE distributed_lock DROP INDEX distributed_lock_name, ADD UNIQUE distributed_lock_name (lock_name)",
            ),
            ("an index more", "CREATE INDEX more ON distributed_lock (acquire_time)"),
            ("optimized", "OPTIMIZE TABLE distributed_lock"),
            ("rebuilt", "ALTER TABLE distributed_lock ENGINE = InnoDB, ALGORITHM = COPY"),
            (
                "columns in another order",
                "ALTER TABLE distributed_lock MODIFY owner VARCHAR(255) CHARACTER SET utf8mb4 NOT NULL DEFAULT '' FIRST",
            ),
        ],
    };
    changes.extend(more.iter().map(|(what, sql)| (*what, (*sql).to_owned())));
    changes.push(("dropped and made anew in the end", format!("DROP TABLE distributed_lock; {schema}")));
    changes
}

async fn a_new_table_costs_a_service_one_call_at_most<T: TestDatabase>(database: &T) {
    drop(database.locks().await);
    let services = [Service::new(database).await, Service::new(database).await];
    for (what, sql) in changes::<T>() {
        database.run(&sql).await;
        for service in &services {
            service.goes_on_after(what).await;
        }
    }
    for service in services {
        service.locks.close().await;
        service.pool.close().await;
    }
}

/// While it is away, calls say what to run, and the next one after it has come back succeeds.
async fn a_table_that_is_missing_for_a_while<T: TestDatabase>(database: &T) {
    drop(database.locks().await);
    let service = Service::new(database).await;
    let away = |error: &Error| {
        matches!(error, Error::SchemaMissing { .. }) && error.to_string().contains("migrate()")
    };
    for round in 0..2 {
        database
            .run(if round == 0 {
                "DROP TABLE distributed_lock"
            } else {
                "ALTER TABLE distributed_lock RENAME TO away"
            })
            .await;
        for lost in [
            service.locks.insert_lock("used").try_acquire().await.map(drop).unwrap_err(),
            service.locks.insert_lock("new").wait(PATIENCE).acquire().await.map(drop).unwrap_err(),
            service.locks.row_lock("used row").try_acquire().await.map(drop).unwrap_err(),
            service.locks.row_lock("new row").wait(PATIENCE).acquire().await.map(drop).unwrap_err(),
            service.locks.check().await.map(drop).unwrap_err(),
            service.locks.info("used").await.map(drop).unwrap_err(),
        ] {
            assert!(away(&lost), "{lost:?}");
        }
        let mut transaction = service.pool.begin().await.unwrap();
        let error = service.locks.row_lock("used row").acquire_in(&mut transaction).await.unwrap_err();
        assert!(away(&error), "{error:?}");
        transaction.rollback().await.unwrap();
        if round == 0 {
            // The ledger is still there.
            service.locks.migrate().await.unwrap();
        } else {
            database.run("ALTER TABLE away RENAME TO distributed_lock").await;
        }
        service.goes_on_after("it is back").await;
    }
}

/// As a dump brings them: held long ago, held by a process that is gone, until a moment in the future, with a queue.
async fn rows_of_an_older_dump<T: TestDatabase>(database: &T) {
    drop(database.locks().await);
    let service = Service::new(database).await;
    let (ago, ahead) = match T::NAME {
        "postgres" => ("clock_timestamp() - interval '400 days'", "clock_timestamp() + interval '400 days'"),
        "sqlite" => (
            "strftime('%Y-%m-%d %H:%M:%f000', 'now', '-400 days')",
            "strftime('%Y-%m-%d %H:%M:%f000', 'now', '+400 days')",
        ),
        _ => ("UTC_TIMESTAMP(6) - INTERVAL 400 DAY", "UTC_TIMESTAMP(6) + INTERVAL 400 DAY"),
    };
    let secret = "0123456789abcdef0123456789abcdef";
    // A place that lasted until a moment in the future, one that is over, and what is no place.
    let entry = Queued { secret: secret.into(), ..Queued::abandoned(0) };
    let waiters: String = [
        Queued { until: 9_999_999_999_999, listener: 7, ..entry.clone() }.text(),
        Queued { until: 1, listener: 7, ..entry }.text(),
        foreign_entry(),
    ]
    .concat();
    for (name, expires, ttl) in [
        ("ago", ago, 30_000_000),
        ("ahead", ahead, 1_000_000),
        ("kept", ahead, -1_000_000),
        ("noticed", ahead, 0),
    ] {
        database
            .run(&format!(
                "INSERT INTO distributed_lock
                    (lock_name, secret_key, fencing_token, previous_token, owner, create_time, acquire_time, expire_time,
                        ttl_micros, waiters)
                VALUES ('{name}', '{secret}', 17, 16, 'a host that is gone', {ago}, {ago}, {expires}, {ttl}, '{waiters}')"
            ))
            .await;
    }
    for name in ["ago", "ahead", "kept", "noticed"] {
        let lease = service.locks.insert_lock(name).wait(PATIENCE).acquire().await.unwrap();
        assert!(lease.fencing_token() > 17);
        lease.release().await.unwrap();
        let mut transaction = service.pool.begin().await.unwrap();
        service.locks.insert_lock(name).wait(PATIENCE).acquire_in(&mut transaction).await.unwrap();
        transaction.rollback().await.unwrap();
    }
}

async fn leases_held_over_the_end_of_the_table_are_lost<T: TestDatabase>(database: &T) {
    const TTL: Duration = Duration::from_secs(3);
    let (locks, other) = (database.locks().await, database.locks().await);
    let schema = schema::<T>();
    let ends = match T::NAME {
        "sqlite" => vec!["DELETE FROM distributed_lock".to_owned()],
        _ => vec!["TRUNCATE TABLE distributed_lock".to_owned()],
    };
    for end in ends
        .into_iter()
        .chain([format!("DROP TABLE distributed_lock; {schema}"), "DROP TABLE distributed_lock".to_owned()])
    {
        let held: [Lease<T::Database>; 2] = [
            locks.insert_lock("a").ttl(TTL).wait(PATIENCE).acquire().await.unwrap(),
            locks.insert_lock("b").ttl(TTL).wait(PATIENCE).acquire().await.unwrap(),
        ];
        // On SQLite a guarded transaction is the one writer.
        let mut guarded = None;
        if T::NAME != "sqlite" {
            guarded = Some(held[0].begin().await.unwrap());
        }
        database.run(&end).await;
        for lease in &held {
            tokio::time::timeout(TTL, lease.lost()).await.unwrap_or_else(|_| panic!("{end}: still held"));
            assert!(!lease.is_held());
        }
        if let Some(guarded) = guarded {
            let refused = guarded.commit().await.unwrap_err();
            assert!(
                matches!(refused, Error::Lost { .. } | Error::SchemaMissing { .. }),
                "{end}: {refused:?}"
            );
        }
        let refused = held[1].begin().await.map(drop).unwrap_err();
        assert!(matches!(refused, Error::Lost { .. }), "{end}: {refused:?}");
        for lease in held {
            let released = lease.release().await;
            assert!(
                matches!(
                    released,
                    Err(Error::Lost { reason: Loss::TakenOver | Loss::RowDeleted | Loss::NotRenewed, .. })
                ),
                "{released:?}"
            );
        }
        other.migrate().await.unwrap();
        other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    }
}

/// A transaction of the caller that was open, with a snapshot, before the change, and asks for its first lock after it.
async fn an_open_transaction_during_a_change_of_the_table<T: TestServer>(database: &T) {
    database.run("CREATE TABLE business (n BIGINT)").await;
    database.run("INSERT INTO business VALUES (1)").await;
    drop(database.locks().await);
    let service = Service::new(database).await;
    for (what, sql) in changes::<T>() {
        for kind in ["row", "lease"] {
            let mut transaction = service.pool.begin().await.unwrap();
            T::Database::find_number(&mut transaction, "SELECT n FROM business").await.unwrap();
            if kind == "row" {
                database.run(&sql).await;
            }
            let locked = match kind {
                "row" => service
                    .locks
                    .row_lock("used row")
                    .wait(PATIENCE)
                    .acquire_in(&mut transaction)
                    .await
                    .map(drop),
                _ => service
                    .locks
                    .insert_lock("used")
                    .wait(PATIENCE)
                    .acquire_in(&mut transaction)
                    .await
                    .map(drop),
            };
            if let Err(error) = locked {
                assert!(error.is_retryable(), "{what}: {kind}: {error:?}");
                transaction.rollback().await.unwrap();
                let mut again = service.pool.begin().await.unwrap();
                let locked = match kind {
                    "row" => service
                        .locks
                        .row_lock("used row")
                        .wait(PATIENCE)
                        .acquire_in(&mut again)
                        .await
                        .map(drop),
                    _ => service
                        .locks
                        .insert_lock("used")
                        .wait(PATIENCE)
                        .acquire_in(&mut again)
                        .await
                        .map(drop),
                };
                locked.unwrap_or_else(|error| panic!("{what}: {kind}: {error:?}"));
                again.commit().await.unwrap();
            } else {
                transaction.commit().await.unwrap();
            }
        }
    }
}

/// What is compared with the columns has a collation of its own.
async fn leases_are_renewed_in_a_table_of_another_collation<T: TestServer>(database: &T) {
    const TTL: Duration = Duration::from_secs(6);
    if T::NAME == "postgres" {
        return; // It compares without a collation that could be mixed.
    }
    let locks = database.locks().await;
    for collation in ["utf8mb4_general_ci", "utf8mb4_unicode_ci", "utf8mb4_bin"] {
        let convert = "ALTER TABLE distributed_lock CONVERT TO CHARACTER SET utf8mb4 COLLATE";
        database.run(&format!("{convert} {collation}")).await;
        let lease = locks.insert_lock("a").ttl(TTL).wait(PATIENCE).acquire().await.unwrap();
        let expires = "SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', expire_time) FROM distributed_lock";
        let granted = database.number(expires).await;
        eventually(TTL, async || database.number(expires).await > granted).await;
        lease.release().await.unwrap_or_else(|error| panic!("{collation}: {error:?}"));
    }
}
