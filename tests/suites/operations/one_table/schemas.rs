//! `LocksBuilder::schema`: a schema on PostgreSQL, a database of the server on MySQL and MariaDB.

use lock_db::{Error, Kind, Locks, LocksBuilder};
use lock_tests::{AtEnd, Backend, TestDatabase};
use sqlx::Connection;
use tokio::task::JoinSet;

use super::elsewhere::{Ask, BOTH_KINDS, ask_in, is_free};

lock_tests::cases! {
    on every database:
    a_schema_that_is_not_the_file_is_refused_on_sqlite,
    a_table_that_was_created_again_is_found;

    on every server:
    two_schemas_are_independent,
    names_of_schemas_may_need_quotes,
    a_schema_is_not_looked_for_elsewhere,
    sixteen_create_a_schema_at_once,
}

/// Characters that mean something in SQL, and letters that are folded.
const ODD: [&str; 9] =
    ["Upper", "with space", "a.b", "a\"b\"\"c", "a`b``c", "a'b", "select", "größe", "$1{table}?%s"];

/// On MySQL and MariaDB databases are of the whole server, so this has the name of the test's own in it; there it is dropped
/// with what is answered besides.
async fn schema<T: TestDatabase>(database: &T, name: &str) -> (String, Option<AtEnd<T::Database>>) {
    if T::NAME == "postgres" {
        return (name.to_owned(), None);
    }
    let name = format!("{}_{name}", database.text("SELECT DATABASE()").await);
    let drop_it = format!("DROP DATABASE IF EXISTS `{}`", name.replace('`', "``"));
    let limit = "SET lock_wait_timeout = 20".to_owned();
    (name, Some(AtEnd::new(database.url(), [limit, drop_it])))
}

async fn in_schema<T: TestDatabase>(database: &T, schema: &str) -> LocksBuilder<T::Database> {
    Locks::builder(database.pool(2).await).schema(schema)
}

async fn two_schemas_are_independent<T: lock_tests::TestServer>(database: &T) {
    let ((one, _drop_one), (two, _drop_two)) = (schema(database, "one").await, schema(database, "two").await);
    let (here, one, two) = (
        database.locks().await,
        in_schema(database, &one).await.build(),
        in_schema(database, &two).await.build(),
    );
    for locks in [&one, &two] {
        let error = locks.check().await.unwrap_err();
        assert!(matches!(error, Error::SchemaMissing { .. }), "{error:?}");
        let error = locks.insert_lock("a").acquire().await.unwrap_err();
        assert!(matches!(error, Error::SchemaMissing { .. }), "{error:?}");
        locks.migrate().await.unwrap();
        locks.migrate().await.unwrap();
        locks.check().await.unwrap();
    }
    let mut leases = Vec::new();
    for locks in [&here, &one, &two] {
        leases.push(locks.insert_lock("a").try_acquire().await.unwrap().expect("it is free in this schema"));
    }
    assert!(leases.iter().all(lock_db::Lease::is_held));
    let guard = one.row_lock("row").acquire().await.unwrap();
    assert!(is_free(&two, Kind::Row, "row").await && is_free(&here, Kind::Row, "row").await);
    guard.commit().await.unwrap();
    // One transaction may have the locks of several.
    let mut transaction = database.pool(1).await.begin().await.unwrap();
    for locks in [&here, &one, &two] {
        for kind in BOTH_KINDS {
            let name = format!("{kind:?}");
            assert!(ask_in(locks, kind, &name, Ask::Try, &mut transaction).await.unwrap());
        }
    }
    for lease in &leases {
        lease.verify_in(&mut transaction).await.unwrap();
    }
    transaction.commit().await.unwrap();
    for lease in leases {
        lease.release().await.unwrap();
    }
    for locks in [&here, &one, &two] {
        locks.close().await;
    }
}

async fn names_of_schemas_may_need_quotes<T: lock_tests::TestServer>(database: &T) {
    // A table that is found although it was not meant would be this one.
    drop(database.locks().await);
    for name in ODD {
        let (schema, _drop_it) = schema(database, name).await;
        let locks = in_schema(database, &schema).await.build();
        let other = in_schema(database, &schema).await.build();
        locks.migrate().await.unwrap_or_else(|error| panic!("{name}: {error:?}"));
        locks.check().await.unwrap_or_else(|error| panic!("{name}: {error:?}"));
        let lease = locks.insert_lock("lease").acquire().await.unwrap();
        assert!(!is_free(&other, Kind::Insert, "lease").await);
        lease.begin().await.unwrap().commit().await.unwrap();
        let mut connection = database.connection().await;
        let mut transaction = connection.begin().await.unwrap();
        for (kind, ask) in [(Kind::Insert, Ask::Acquire), (Kind::Row, Ask::Acquire), (Kind::Row, Ask::Try)] {
            let name = format!("{kind:?} {ask:?}");
            assert!(ask_in(&locks, kind, &name, ask, &mut transaction).await.unwrap());
            assert!(!is_free(&other, kind, &name).await);
        }
        lease.release_in(&mut transaction).await.unwrap();
        transaction.commit().await.unwrap();
        assert!(is_free(&other, Kind::Insert, "lease").await);
        let guard = locks.row_lock("row").acquire().await.unwrap();
        assert!(!is_free(&other, Kind::Row, "row").await);
        guard.commit().await.unwrap();
        assert!(locks.info("lease").await.unwrap().is_some());
        locks.insert_locks(["b", "c"]).acquire().await.unwrap().release().await.unwrap();

        let quote = if T::NAME == "postgres" { "\"" } else { "`" };
        let quoted = format!("{quote}{}{quote}", schema.replace(quote, &quote.repeat(2)));
        let sql = format!("SELECT COUNT(*) FROM {quoted}.distributed_lock");
        let rows = T::Database::find_number(&mut connection, &sql).await.unwrap();
        assert!(rows >= Some(5), "{name}: the table is elsewhere");
        locks.close().await;
        other.close().await;
        connection.close().await.unwrap();
    }
    assert_eq!(database.number("SELECT COUNT(*) FROM distributed_lock").await, 0);
}

async fn a_schema_is_not_looked_for_elsewhere<T: lock_tests::TestServer>(database: &T) {
    drop(database.locks().await);
    // Where names of databases are told apart by their letters, this is another one than the one that is there.
    for name in ["missing", "PUBLIC", "", "public,", "public.distributed_lock"] {
        let name = if T::NAME == "postgres" { name.to_owned() } else { schema(database, name).await.0 };
        let locks = in_schema(database, &name).await.build();
        for error in [
            locks.check().await.map(drop).unwrap_err(),
            locks.insert_lock("a").try_acquire().await.map(drop).unwrap_err(),
            locks.row_lock("b").try_acquire().await.map(drop).unwrap_err(),
        ] {
            let is_refused = matches!(
                error,
                Error::SchemaMissing { .. }
                    | Error::Database { .. }
                    | Error::Unreachable { .. }
                    | Error::Refused { .. }
            );
            assert!(is_refused && !error.is_retryable(), "{name}: {error:?}");
        }
    }
    assert_eq!(database.number("SELECT COUNT(*) FROM distributed_lock").await, 0);
}

async fn sixteen_create_a_schema_at_once<T: lock_tests::TestServer>(database: &T) {
    let (schema, _drop_it) = schema(database, "Many Makers").await;
    let mut migrating = JoinSet::new();
    for _ in 0..16 {
        let locks = Locks::builder(database.pool(1).await).schema(&schema).build();
        migrating.spawn(async move {
            locks.migrate().await?;
            locks.check().await?;
            locks.close().await;
            Ok::<_, Error>(())
        });
    }
    while let Some(migrated) = migrating.join_next().await {
        migrated.unwrap().unwrap();
    }
}

async fn a_schema_that_is_not_the_file_is_refused_on_sqlite<T: TestDatabase>(database: &T) {
    if T::NAME != "sqlite" {
        return;
    }
    let locks = in_schema(database, "main").await.build();
    locks.migrate().await.unwrap();
    locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    for schema in ["temp", "another"] {
        let locks = in_schema(database, schema).await.build();
        for error in [
            locks.migrate().await.unwrap_err(),
            locks.check().await.map(drop).unwrap_err(),
            locks.insert_lock("a").acquire().await.map(drop).unwrap_err(),
            locks.row_lock("b").try_acquire().await.map(drop).unwrap_err(),
        ] {
            assert!(matches!(error, Error::InvalidOption { option: "schema", .. }), "{error:?}");
        }
    }
}

/// Dropped, and migrated again by another process. On PostgreSQL it is another table then.
async fn a_table_that_was_created_again_is_found<T: TestDatabase>(database: &T) {
    let pool = database.pool(4).await;
    let locks = lock_tests::migrated(Locks::new(pool.clone())).await;
    let lease = locks.insert_lock("lease").acquire().await.unwrap();
    for kind in BOTH_KINDS {
        assert!(is_free(&locks, kind, &format!("{kind:?}")).await);
    }
    database.run("DROP TABLE distributed_lock").await;
    let other = database.locks().await;
    // The lease has gone with its table, and no guard takes another row for it.
    let transaction = lease.begin().await;
    if let Ok(transaction) = transaction {
        assert!(transaction.commit().await.is_err());
    }
    for kind in BOTH_KINDS {
        let name = format!("{kind:?}");
        let mut transaction = pool.begin().await.unwrap();
        // Rows that were known are not there any more.
        match ask_in(&locks, kind, &name, Ask::Acquire, &mut transaction).await {
            Err(Error::Serialization { .. }) => {
                transaction.rollback().await.unwrap();
                transaction = pool.begin().await.unwrap();
                assert!(ask_in(&locks, kind, &name, Ask::Acquire, &mut transaction).await.unwrap());
            }
            granted => assert!(granted.unwrap()),
        }
        assert!(!is_free(&other, kind, &name).await);
        transaction.commit().await.unwrap();
        assert!(is_free(&other, kind, &name).await);
    }
    assert!(is_free(&locks, Kind::Insert, "new").await);
}
