//! Creating the table, checking it, and the errors when it is missing.

use std::fs;
use std::path::{Path, PathBuf};

use lock_db::{Error, Locks};
use lock_tests::{AtEnd, Backend, TestDatabase, TestServer, pool};
use sqlx::Connection;
use sqlx::migrate::Migrator;
use tempfile::TempDir;
use tokio::task::JoinSet;

lock_tests::cases! {
    on every database:
    first_use_without_the_table_says_what_to_run,
    sixteen_migrations_at_once,
    a_failed_migration_leaves_nothing_behind,
    the_application_keeps_its_own_ledger,
    a_table_created_by_hand_is_the_same_table,
    a_table_of_another_version_is_recognised,
    a_missing_table_with_an_applied_ledger_is_created_again,
    a_missing_or_incomplete_ledger_is_rebuilt,
    a_ledger_of_a_newer_version_is_accepted,
    columns_that_prevent_inserts_are_reported,
    beside_the_applications_migrations_by_migrate,
    as_one_of_the_applications_migrations,
    beside_the_applications_migrations_with_two_ledgers,
    beside_the_applications_migrations_ignoring_missing;

    on every server:
    a_role_that_may_only_use_the_table_migrates_what_is_applied,
    a_role_that_may_not_create_is_told_what_to_do,
}

async fn first_use_without_the_table_says_what_to_run<T: TestDatabase>(database: &T) {
    let pool = database.pool(4).await;
    let locks = Locks::new(pool.clone());
    let says_what_to_run = |error: Error| {
        let Error::SchemaMissing { .. } = &error else { panic!("not SchemaMissing: {error:?}") };
        assert!(error.to_string().contains("locks.migrate()"), "{error}");
        assert!(!error.is_retryable());
    };
    says_what_to_run(locks.check().await.unwrap_err());
    says_what_to_run(locks.insert_lock("a").acquire().await.unwrap_err());
    says_what_to_run(locks.insert_lock("a").try_acquire().await.unwrap_err());
    says_what_to_run(locks.row_lock("a").acquire().await.unwrap_err());
    let mut transaction = pool.begin().await.unwrap();
    says_what_to_run(locks.row_lock("a").acquire_in(&mut transaction).await.unwrap_err());
    says_what_to_run(locks.info("a").await.unwrap_err());
    drop(transaction);

    locks.migrate().await.unwrap();
    locks.check().await.unwrap();
    locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
}

async fn sixteen_migrations_at_once<T: TestDatabase>(database: &T) {
    let mut migrating = JoinSet::new();
    for _ in 0..16 {
        let locks = Locks::new(database.pool(1).await);
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
    assert_eq!(database.number("SELECT COUNT(*) FROM _lock_db_migrations").await, 1);
    assert_eq!(database.number("SELECT COUNT(*) FROM distributed_lock").await, 0);
}

async fn a_failed_migration_leaves_nothing_behind<T: TestDatabase>(database: &T) {
    // A ledger with the wrong columns: the migration fails in the middle, with its lock taken.
    database.run("CREATE TABLE _lock_db_migrations (nonsense INT)").await;
    let locks = Locks::new(database.pool(1).await);
    let error = locks.migrate().await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Database { .. }
                | Error::Unreachable { .. }
                | Error::Refused { .. }
                | Error::SchemaMissing { .. }
        ),
        "{error:?}"
    );

    // Another process does not have to wait for anything that the first one left.
    database.run("DROP TABLE _lock_db_migrations").await;
    let other = Locks::new(database.pool(1).await);
    other.migrate().await.unwrap();
    locks.migrate().await.unwrap();
    locks.close().await;
    other.close().await;
    lock_tests::eventually(std::time::Duration::from_secs(10), async || {
        database.activity().await.transactions == 0
    })
    .await;
}

async fn the_application_keeps_its_own_ledger<T: TestDatabase>(database: &T) {
    database.run("CREATE TABLE _sqlx_migrations (version BIGINT PRIMARY KEY)").await;
    database.run("INSERT INTO _sqlx_migrations VALUES (42)").await;
    Locks::new(database.pool(1).await).migrate().await.unwrap();
    assert_eq!(database.number("SELECT COUNT(*) FROM _sqlx_migrations").await, 1);
}

async fn a_table_created_by_hand_is_the_same_table<T: TestDatabase>(database: &T) {
    let schema = match T::NAME {
        "postgres" => lock_db::schema::POSTGRES,
        "sqlite" => lock_db::schema::SQLITE,
        _ => lock_db::schema::MYSQL,
    };
    database.run(schema).await;
    let locks = Locks::new(database.pool(1).await);
    locks.check().await.unwrap();
    let lease = locks.insert_lock("a").acquire().await.unwrap();
    // And migrating afterwards changes nothing.
    locks.migrate().await.unwrap();
    assert!(locks.insert_lock("a").try_acquire().await.unwrap().is_none());
    lease.release().await.unwrap();
}

async fn a_table_of_another_version_is_recognised<T: TestDatabase>(database: &T) {
    database.run("CREATE TABLE distributed_lock (lock_name VARCHAR(255) PRIMARY KEY)").await;
    let locks = Locks::new(database.pool(1).await);
    let error = locks.check().await.unwrap_err();
    assert!(matches!(error, Error::SchemaMissing { .. }), "{error:?}");
    let error = locks.insert_lock("a").acquire().await.unwrap_err();
    assert!(matches!(error, Error::SchemaMissing { .. }), "{error:?}");
}

fn sql<T: TestDatabase>() -> &'static str {
    match T::NAME {
        "postgres" => lock_db::schema::POSTGRES,
        "sqlite" => lock_db::schema::SQLITE,
        _ => lock_db::schema::MYSQL,
    }
}

/// By restarts, while services are running.
async fn a_missing_table_with_an_applied_ledger_is_created_again<T: TestDatabase>(database: &T) {
    let used = database.locks().await;
    used.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    database.run("DROP TABLE distributed_lock").await;
    let locks = Locks::new(database.pool(1).await);
    locks.migrate().await.unwrap();
    for locks in [locks, used] {
        locks.check().await.unwrap();
        locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    }
}

async fn a_missing_or_incomplete_ledger_is_rebuilt<T: TestDatabase>(database: &T) {
    let used = database.locks().await;
    let lease = used.insert_lock("a").acquire().await.unwrap();
    for left in ["DROP TABLE _lock_db_migrations", "DELETE FROM _lock_db_migrations"] {
        database.run(left).await;
        let locks = Locks::new(database.pool(1).await);
        locks.migrate().await.unwrap();
        assert_eq!(database.number("SELECT COUNT(*) FROM _lock_db_migrations WHERE version = 1").await, 1);
        // The table stays as it is.
        assert!(locks.insert_lock("a").try_acquire().await.unwrap().is_none());
    }
    lease.release().await.unwrap();
}

/// A program that was rolled back, on a table that its successor has migrated.
async fn a_ledger_of_a_newer_version_is_accepted<T: TestDatabase>(database: &T) {
    drop(database.locks().await);
    database.run("INSERT INTO _lock_db_migrations (version) VALUES (7)").await;
    database.run("ALTER TABLE distributed_lock ADD COLUMN newer VARCHAR(20) DEFAULT 'x' NOT NULL").await;
    let locks = Locks::new(database.pool(2).await);
    locks.migrate().await.unwrap();
    locks.check().await.unwrap();
    locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    locks.row_lock("b").acquire().await.unwrap().commit().await.unwrap();

    database.run("ALTER TABLE distributed_lock DROP COLUMN waiters").await;
    let locks = Locks::new(database.pool(2).await);
    for error in [
        locks.migrate().await.unwrap_err(),
        locks.check().await.map(drop).unwrap_err(),
        locks.insert_lock("a").try_acquire().await.map(drop).unwrap_err(),
        locks.row_lock("b").acquire().await.map(drop).unwrap_err(),
    ] {
        let Error::UnsupportedTable { reason, .. } = &error else { panic!("{error:?}") };
        for told in ["newer version", "migration 7", "`waiters`"] {
            assert!(reason.contains(told), "{told}: {reason}");
        }
    }
}

/// Added columns, and tables that were copied without their defaults.
async fn columns_that_prevent_inserts_are_reported<T: TestDatabase>(database: &T) {
    drop(database.locks().await);
    let lost = match T::NAME {
        "postgres" => "ALTER TABLE distributed_lock ALTER COLUMN owner DROP DEFAULT".to_owned(),
        "sqlite" => format!(
            "DROP TABLE distributed_lock; {}",
            sql::<T>().replace("owner         TEXT NOT NULL DEFAULT ''", "owner TEXT NOT NULL")
        ),
        _ => "ALTER TABLE distributed_lock MODIFY owner VARCHAR(255) NOT NULL".to_owned(),
    };
    let added = match T::NAME {
        "sqlite" => format!(
            "DROP TABLE distributed_lock; {}",
            sql::<T>().replace("CONSTRAINT", "tenant TEXT NOT NULL, CONSTRAINT")
        ),
        _ => "ALTER TABLE distributed_lock ADD COLUMN tenant VARCHAR(20) NOT NULL".to_owned(),
    };
    for (column, change) in [("owner", lost), ("tenant", added)] {
        database.run(&change).await;
        let locks = Locks::new(database.pool(2).await);
        for error in [
            locks.check().await.map(drop).unwrap_err(),
            locks.insert_lock("a").try_acquire().await.map(drop).unwrap_err(),
            locks.row_lock("b").acquire().await.map(drop).unwrap_err(),
        ] {
            let Error::UnsupportedTable { reason, .. } = &error else { panic!("{column}: {error:?}") };
            assert!(reason.contains(&format!("`{column}`")) && reason.contains("default"), "{reason}");
        }
        database.run("DROP TABLE distributed_lock").await;
        locks.migrate().await.unwrap();
        locks.check().await.unwrap();
    }
}

/// An account without any privilege, its name in SQL, and the prefix of table names.
async fn account<T: TestServer>(database: &T) -> (String, String, String, AtEnd<T::Database>) {
    let mut url = url::Url::parse(database.url()).unwrap();
    let name = url.path()[1..].to_owned();
    let account = format!("{}_m", name.replace("lock_db_test", "ldt"));
    url.set_username(&account).unwrap();
    url.set_password(Some("secret")).unwrap();
    if T::NAME == "postgres" {
        let at_end =
            AtEnd::new(database.url(), [format!("DROP OWNED BY {account}"), format!("DROP ROLE {account}")]);
        database.run(&format!("CREATE ROLE {account} LOGIN PASSWORD 'secret'")).await;
        return (url.into(), account, String::new(), at_end);
    }
    let account = format!("'{account}'@'%'");
    let at_end = AtEnd::new(database.url(), [format!("DROP USER {account}")]);
    database.run(&format!("CREATE USER {account} IDENTIFIED BY 'secret'")).await;
    (url.into(), account, format!("{name}."), at_end)
}

async fn a_role_that_may_only_use_the_table_migrates_what_is_applied<T: TestServer>(database: &T) {
    drop(database.locks().await);
    let (url, account, schema, _at_end) = account(database).await;
    database.run(&format!("GRANT SELECT, INSERT, UPDATE ON {schema}distributed_lock TO {account}")).await;
    // The account may not read the ledger; may read it; finds nothing in it; finds none, as after
    // sqlx-cli.
    for left in [
        String::new(),
        format!("GRANT SELECT ON {schema}_lock_db_migrations TO {account}"),
        "DELETE FROM _lock_db_migrations".to_owned(),
        "DROP TABLE _lock_db_migrations".to_owned(),
    ] {
        if !left.is_empty() {
            database.run(&left).await;
        }
        let pool = pool::<T::Database>(&url, 2).await;
        let locks = Locks::new(pool.clone());
        locks.migrate().await.unwrap_or_else(|error| panic!("{left}: {error:?}"));
        locks.check().await.unwrap();
        locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
        locks.close().await;
        pool.close().await;
    }
    // Nothing stays locked for others.
    assert_eq!(database.advisory_locks().await, 0);
}

async fn a_role_that_may_not_create_is_told_what_to_do<T: TestServer>(database: &T) {
    let (url, account, schema, _at_end) = account(database).await;
    database.run("CREATE TABLE another (n INTEGER)").await;
    database.run(&format!("GRANT SELECT ON {schema}another TO {account}")).await;
    if T::NAME == "postgres" {
        database.run("REVOKE CREATE ON SCHEMA public FROM PUBLIC").await;
    }
    let locks = Locks::new(pool::<T::Database>(&url, 2).await);
    let error = locks.migrate().await.unwrap_err();
    assert!(
        matches!(error, Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. })
            && !error.is_retryable(),
        "{error:?}"
    );
    for told in ["denied", "may create tables", "SELECT, INSERT and UPDATE"] {
        assert!(error.to_string().contains(told), "{error}");
    }
    locks.close().await;
    // Another one does not have to wait.
    database.locks().await.check().await.unwrap();
}

/// The two ways in which sqlx numbers files.
const OWN: [&str; 2] = ["0001_app.sql", "20250101000000_app.sql"];

fn folder<T: TestDatabase>() -> PathBuf {
    let dialect = if T::NAME == "postgres" || T::NAME == "sqlite" { T::NAME } else { "mysql" };
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../lock-db/migrations").join(dialect)
}

/// The folder of an application with one migration of its own.
fn application(file: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(file), "CREATE TABLE app (n INTEGER)").unwrap();
    folder
}

async fn of(folder: &Path) -> Migrator {
    Migrator::new(folder).await.unwrap()
}

/// As one start of the program, or one call of sqlx-cli.
async fn apply<T: TestDatabase>(database: &T, migrations: &Migrator) {
    let mut connection = database.connection().await;
    T::Database::apply(&mut connection, migrations).await.unwrap();
    connection.close().await.unwrap();
}

/// Checks that both exist, and empties the database for the next order.
async fn are_applied<T: TestDatabase>(database: &T) {
    assert_eq!(database.number("SELECT COUNT(*) FROM app").await, 0);
    let locks = Locks::new(database.pool(2).await);
    locks.check().await.unwrap();
    locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    locks.close().await;
    for table in
        ["app", "distributed_lock", "_sqlx_migrations", "_lock_db_migrations", "_lock_db_sqlx_migrations"]
    {
        database.run(&format!("DROP TABLE IF EXISTS {table}")).await;
    }
}

async fn beside_the_applications_migrations_by_migrate<T: TestDatabase>(database: &T) {
    for file in OWN {
        for ours_first in [true, false] {
            let application = application(file);
            let migrations = of(application.path()).await;
            for start in 0..2 {
                let locks = Locks::new(database.pool(1).await);
                if ours_first || start > 0 {
                    locks.migrate().await.unwrap();
                }
                apply(database, &migrations).await;
                locks.migrate().await.unwrap();
                locks.close().await;
            }
            are_applied(database).await;
        }
    }
}

/// The file copied as it is: before the first start, or into a folder that is in use, or after
/// `migrate()`.
async fn as_one_of_the_applications_migrations<T: TestDatabase>(database: &T) {
    for file in OWN {
        for order in ["at once", "later", "after migrate()"] {
            let application = application(file);
            if order != "at once" {
                apply(database, &of(application.path()).await).await;
            }
            if order == "after migrate()" {
                let locks = Locks::new(database.pool(1).await);
                locks.migrate().await.unwrap();
                locks.close().await;
            }
            for file in fs::read_dir(folder::<T>()).unwrap() {
                let file = file.unwrap();
                fs::copy(file.path(), application.path().join(file.file_name())).unwrap();
            }
            for _ in 0..2 {
                apply(database, &of(application.path()).await).await;
            }
            // The application adds its next number.
            fs::write(application.path().join("0002_app.sql"), "CREATE TABLE more (n INTEGER)").unwrap();
            apply(database, &of(application.path()).await).await;
            database.run("DROP TABLE more").await;
            are_applied(database).await;
        }
    }
}

/// As `table-name` in a `sqlx.toml` for sqlx-cli.
async fn beside_the_applications_migrations_with_two_ledgers<T: TestDatabase>(database: &T) {
    let mut ours = of(&folder::<T>()).await;
    ours.dangerous_set_table_name("_lock_db_sqlx_migrations");
    in_each_order(database, &ours, |_| {}).await;
}

/// As `--ignore-missing`, on both sides.
async fn beside_the_applications_migrations_ignoring_missing<T: TestDatabase>(database: &T) {
    let mut ours = of(&folder::<T>()).await;
    ours.set_ignore_missing(true);
    in_each_order(database, &ours, |application| {
        application.set_ignore_missing(true);
    })
    .await;
}

async fn in_each_order<T: TestDatabase>(database: &T, ours: &Migrator, set: impl Fn(&mut Migrator)) {
    for file in OWN {
        let application = application(file);
        let mut application = of(application.path()).await;
        set(&mut application);
        for order in [[&application, ours], [ours, &application]] {
            for _start in 0..2 {
                for migrations in order {
                    apply(database, migrations).await;
                }
            }
            are_applied(database).await;
        }
    }
}
