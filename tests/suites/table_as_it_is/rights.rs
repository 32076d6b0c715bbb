//! Rights of the account: what is missing is said by `check()`, and nothing is waited for.

use lock_db::{Error, Locks};
use lock_tests::{TestServer, for_each_server, pool};

use super::asking::{account, all_are_granted, all_are_refused, ask, locks_in_use};

for_each_server! {
    the_rights_that_the_readme_names_are_enough,
    each_right_that_is_missing_is_said,
    an_account_that_may_only_read,
}

/// Of the table, as SQL names it.
fn tables<T: TestServer>(database: &T) -> (String, String) {
    if T::NAME == "postgres" {
        return ("distributed_lock".to_owned(), "_lock_db_migrations".to_owned());
    }
    let schema = database.url().rsplit('/').next().unwrap();
    (format!("{schema}.distributed_lock"), format!("{schema}._lock_db_migrations"))
}

async fn the_rights_that_the_readme_names_are_enough<T: TestServer>(database: &T) {
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

async fn each_right_that_is_missing_is_said<T: TestServer>(database: &T) {
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
            matches!(error, Error::Database { .. } | Error::UnsupportedTable { .. }),
            "{missing}: {error:?}"
        );
        assert!(!error.is_retryable(), "{missing}: {error:?}");
        let told = error.to_string();
        assert!(told.contains("denied") && told.contains("distributed_lock"), "{missing}: {told}");
        locks.close().await;
        pool.close().await;
        database.run(&format!("REVOKE {rights} ON {table} FROM {account}")).await;
    }
}

async fn an_account_that_may_only_read<T: TestServer>(database: &T) {
    locks_in_use(database).await.close().await;
    let (url, account, _at_end) = account(database).await;
    let (table, _) = tables(database);
    database.run(&format!("GRANT SELECT ON {table} TO {account}")).await;
    let pool = pool::<T::Database>(&url, 4).await;
    let locks = Locks::new(pool.clone());
    let is_denied = |error: &Error| {
        matches!(error, Error::Database { .. })
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
