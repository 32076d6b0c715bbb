//! Rights of the account: what is missing is said by `check()`, and nothing is waited for.

use std::time::Duration;

use lock_db::{Error, Locks};
use lock_tests::{PostgresServer, TestDatabase, TestServer, account, pool};
use sqlx::Postgres;

use super::requests::{all_are_granted, all_are_refused, ask, locks_in_use};

lock_tests::cases! {
    on every server:
    the_documented_privileges_are_enough,
    each_missing_privilege_is_named,
    an_account_that_may_only_read,
    an_account_that_may_not_delete;

    in modules: of_postgres
}

/// Of the table, as SQL names it.
fn tables<T: TestServer>(database: &T) -> (String, String) {
    if T::NAME == "postgres" {
        return ("distributed_lock".to_owned(), "_lock_db_migrations".to_owned());
    }
    let schema = database.url().rsplit('/').next().unwrap();
    (format!("{schema}.distributed_lock"), format!("{schema}._lock_db_migrations"))
}

async fn the_documented_privileges_are_enough<T: TestServer>(database: &T) {
    locks_in_use(database).await.close().await;
    let (url, account, _at_end) = account(database).await;
    let (table, ledger) = tables(database);
    database.run(&format!("GRANT SELECT, INSERT, UPDATE ON {table} TO {account}")).await;
    database.run(&format!("GRANT SELECT ON {ledger} TO {account}")).await;
    let pool = pool::<T::Database>(&url, 4).await;
    let locks = Locks::new(pool.clone());
    // There is nothing to migrate, so nothing is created.
    locks.migrate().await.unwrap();
    locks.check().await.unwrap();
    all_are_granted("all rights", &ask(&locks, &pool).await);
    locks.close().await;
    pool.close().await;
}

async fn each_missing_privilege_is_named<T: TestServer>(database: &T) {
    locks_in_use(database).await.close().await;
    let (url, account, _at_end) = account(database).await;
    let (table, _) = tables(database);
    // On MySQL an account without any right to a database can't use it.
    let (other, _) = (table.replace("distributed_lock", "another"), ());
    database.run(&format!("CREATE TABLE {other} (n INTEGER)")).await;
    database.run(&format!("GRANT SELECT ON {other} TO {account}")).await;
    for (rights, missing) in
        [("SELECT, INSERT", "UPDATE"), ("SELECT, UPDATE", "INSERT"), ("INSERT, UPDATE", "SELECT")]
    {
        database.run(&format!("GRANT {rights} ON {table} TO {account}")).await;
        let pool = pool::<T::Database>(&url, 4).await;
        let locks = Locks::new(pool.clone());
        let error = locks.check().await.expect_err(missing);
        assert!(
            matches!(
                error,
                Error::Database { .. }
                    | Error::Unreachable { .. }
                    | Error::Refused { .. }
                    | Error::UnsupportedTable { .. }
            ),
            "{missing}: {error:?}"
        );
        assert!(!error.is_retryable(), "{missing}: {error:?}");
        let told = error.to_string();
        assert!(told.contains("denied") && told.contains("distributed_lock"), "{missing}: {told}");
        assert!(told.contains(missing) && told.contains("GRANT"), "{missing}: {told}");
        // So does the first lock that fails.
        for error in [
            locks.insert_lock("used").acquire().await.map(drop).err(),
            locks.insert_lock("new").acquire().await.map(drop).err(),
            locks.row_lock("used row").acquire().await.map(drop).err(),
            locks.row_lock("new row").acquire().await.map(drop).err(),
        ] {
            let Some(error) = error else { continue };
            let told = error.to_string();
            assert!(
                !error.is_retryable() && told.contains("denied") && told.contains(missing),
                "{missing}: {told}"
            );
        }
        locks.close().await;
        pool.close().await;
        database.run(&format!("REVOKE {rights} ON {table} FROM {account}")).await;
    }
}

/// Its locks work, and nothing is pruned.
async fn an_account_that_may_not_delete<T: TestServer>(database: &T) {
    locks_in_use(database).await.close().await;
    let (url, account, _at_end) = account(database).await;
    let (table, _) = tables(database);
    database.run(&format!("GRANT SELECT, INSERT, UPDATE ON {table} TO {account}")).await;
    let pool = pool::<T::Database>(&url, 4).await;
    let told = async |locks: &Locks<T::Database>| {
        let report = locks.check().await.unwrap();
        let told = report.warnings().iter().filter(|warning| warning.contains("DELETE"));
        told.cloned().collect::<Vec<_>>()
    };
    let never = Locks::builder(pool.clone()).prune_after(None).build();
    assert_eq!(told(&never).await, Vec::<String>::new());
    let locks = Locks::new(pool.clone());
    let told = told(&locks).await;
    let [told] = &*told else { panic!("one warning: {told:?}") };
    assert!(told.contains("GRANT DELETE ON") && told.contains("prune_after(None)"), "{told}");
    // With nothing to remove, the right is not needed.
    assert_eq!(locks.prune(Duration::from_hours(1)).await.unwrap(), 0);
    let old = "'2020-01-01 00:00:00'";
    database
        .run(&format!(
            "UPDATE distributed_lock SET create_time = {old}, acquire_time = {old}, fencing_token = 1"
        ))
        .await;
    locks.insert_lock("newest").acquire().await.unwrap().release().await.unwrap();
    let refused = locks.prune(Duration::from_hours(1)).await;
    let Err(error @ Error::Refused { .. }) = refused else { panic!("{refused:?}") };
    let told = error.to_string();
    assert!(!error.is_retryable() && told.contains("denied"), "{told}");
    locks.insert_lock("used").acquire().await.unwrap().release().await.unwrap();
    locks.close().await;
    never.close().await;
    pool.close().await;
}

async fn an_account_that_may_only_read<T: TestServer>(database: &T) {
    locks_in_use(database).await.close().await;
    let (url, account, _at_end) = account(database).await;
    let (table, _) = tables(database);
    database.run(&format!("GRANT SELECT ON {table} TO {account}")).await;
    let pool = pool::<T::Database>(&url, 4).await;
    let locks = Locks::new(pool.clone());
    let is_denied = |error: &Error| {
        matches!(error, Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. })
            && error.to_string().contains("denied")
            && !error.is_retryable()
    };
    let checked = locks.check().await;
    assert!(checked.as_ref().is_err_and(is_denied), "{checked:?}");
    assert!(locks.info("used").await.unwrap().is_some(), "it may be read");
    if T::NAME != "postgres" {
        all_are_refused("only SELECT", &ask(&locks, &pool).await, is_denied);
    } else {
        // There the refusal ends a transaction, as any error does.
        let started = std::time::Instant::now();
        for error in [
            locks.insert_lock("used").try_acquire().await.map(drop).unwrap_err(),
            locks.insert_lock("used").acquire().await.map(drop).unwrap_err(),
            locks.insert_locks(["new", "used"]).acquire().await.map(drop).unwrap_err(),
            locks.row_lock("used row").try_acquire().await.map(drop).unwrap_err(),
            locks.row_lock("new row").acquire().await.map(drop).unwrap_err(),
        ] {
            assert!(is_denied(&error), "{error:?}");
        }
        // Far less than the default waits.
        assert!(started.elapsed() < std::time::Duration::from_secs(60));
    }
    locks.close().await;
    pool.close().await;
}

/// What only PostgreSQL knows.
mod of_postgres {
    use super::*;

    lock_tests::cases! {
        on postgres:
        a_schema_that_may_not_be_used,
        a_sequence_that_may_not_be_used,
        privileges_on_columns_are_not_enough,
    }

    /// PostgreSQL passes over such a schema in the search path, as if there were no table.
    async fn a_schema_that_may_not_be_used(database: &PostgresServer) {
        let (url, role, _at_end) = account(database).await;
        database
            .run(&format!("CREATE SCHEMA locks; ALTER ROLE {role} SET search_path = locks, public"))
            .await;
        let owner = Locks::builder(database.pool(2).await).schema("locks").build();
        owner.migrate().await.unwrap();
        database.run(&format!("GRANT SELECT, INSERT, UPDATE ON locks.distributed_lock TO {role}")).await;
        let found_by_path = Locks::new(pool::<Postgres>(&url, 2).await);
        let named = Locks::builder(pool::<Postgres>(&url, 2).await).schema("locks").build();
        for locks in [&found_by_path, &named] {
            for error in [
                locks.check().await.map(drop).unwrap_err(),
                locks.insert_lock("a").acquire().await.map(drop).unwrap_err(),
            ] {
                assert!(
                    matches!(
                        error,
                        Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. }
                    ) && !error.is_retryable(),
                    "{error:?}"
                );
                assert!(error.report().to_string().contains("permission denied for schema locks"), "{error}");
            }
        }
        database.run(&format!("GRANT USAGE ON SCHEMA locks TO {role}")).await;
        for locks in [found_by_path, named] {
            locks.check().await.unwrap();
            locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
            locks.close().await;
        }
        // Else its pools would keep the role.
        owner.close().await;
    }

    /// That of an identity needs no right; one in a default does.
    async fn a_sequence_that_may_not_be_used(database: &PostgresServer) {
        locks_in_use(database).await.close().await;
        let (url, role, _at_end) = account(database).await;
        database
            .run(&format!(
                "ALTER TABLE distributed_lock ALTER id DROP IDENTITY; CREATE SEQUENCE ids START 100;
            ALTER TABLE distributed_lock ALTER id SET DEFAULT nextval('ids');
            GRANT SELECT, INSERT, UPDATE ON distributed_lock TO {role}"
            ))
            .await;
        let pool = pool::<Postgres>(&url, 2).await;
        let locks = Locks::new(pool.clone());
        let error = locks.check().await.unwrap_err();
        assert!(!error.is_retryable(), "{error:?}");
        for told in ["denied", "sequence ids", "USAGE", "GRANT"] {
            assert!(error.to_string().contains(told), "{told}: {error}");
        }
        let error = locks.insert_lock("new").acquire().await.map(drop).unwrap_err();
        assert!(!error.is_retryable() && error.to_string().contains("denied"), "{error:?}");
        database.run(&format!("GRANT USAGE ON SEQUENCE ids TO {role}")).await;
        locks.check().await.unwrap();
        all_are_granted("with its sequence", &ask(&locks, &pool).await);
        locks.close().await;
        pool.close().await;
    }

    /// LOCK TABLE, with which a transaction waits, asks for those to the table.
    async fn privileges_on_columns_are_not_enough(database: &PostgresServer) {
        locks_in_use(database).await.close().await;
        let (url, role, _at_end) = account(database).await;
        let columns = "secret_key, fencing_token, previous_token, owner, acquire_time, expire_time, ttl_micros, waiters";
        database
            .run(&format!("GRANT SELECT, INSERT, UPDATE ({columns}) ON distributed_lock TO {role}"))
            .await;
        let pool = pool::<Postgres>(&url, 2).await;
        let locks = Locks::new(pool.clone());
        let error = locks.check().await.unwrap_err();
        assert!(error.to_string().contains("lacks the right UPDATE"), "{error}");
        locks.close().await;
        pool.close().await;
    }
}
