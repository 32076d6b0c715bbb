//! What the library does not hold up yet.

use lock_db::{Error, Locks};
use lock_tests::{PostgresServer, TestDatabase, TestServer, migrated, pool};
use sqlx::Postgres;

use super::asking::{Answer, Answers, account, all_are_granted, ask, locks_in_use, nothing_is_called_held};
use super::rows_hidden::{ENABLE, grant};
use super::triggers::is_not_granted_under;

lock_tests::__tests_on!(postgres PostgresServer
    new_names_can_be_locked_although_their_ids_were_given_away,
    security_that_is_enabled_while_the_table_is_in_use,
    a_row_lock_that_a_trigger_does_not_let_be_written_is_not_granted,
    columns_of_another_type
);
lock_tests::__tests_on!(mariadb MariaDbServer
    owners_in_another_character_set,
    columns_of_another_type
);
lock_tests::__tests_on!(mysql MySqlServer
    owners_in_another_character_set,
    columns_of_another_type
);

/// The identity sequence behind the rows, as logical replication leaves it on a new primary.
///
/// Or the first request for a new name fails with an error that names the duplicate key.
async fn new_names_can_be_locked_although_their_ids_were_given_away(database: &PostgresServer) {
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
                assert!(matches!(error, Error::Database { .. }) && !error.is_retryable(), "{error:?}");
                assert!(error.to_string().contains("duplicate key"), "{error}");
            }
        }
        locks.close().await;
    }
}

async fn a_row_lock_that_a_trigger_does_not_let_be_written_is_not_granted(database: &PostgresServer) {
    let keep = "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END';
            CREATE TRIGGER keep BEFORE UPDATE ON distributed_lock FOR EACH ROW EXECUTE FUNCTION keep()";
    is_not_granted_under(database, keep).await;
}

/// A table that somebody has converted: it works, or `check()` says that it does not.
async fn owners_in_another_character_set<T: TestServer>(database: &T) {
    let pool = database.pool(4).await;
    migrated(Locks::new(pool.clone())).await.close().await;
    for column in ["CHARACTER SET latin1", "CHARACTER SET utf8mb3", "CHARACTER SET ascii"] {
        database
            .run(&format!(
                "ALTER TABLE distributed_lock MODIFY owner VARCHAR(255) {column} NOT NULL DEFAULT ''"
            ))
            .await;
        let locks = Locks::builder(pool.clone()).label("größe in € 🦀").build();
        let checked = locks.check().await;
        let answers = ask(&locks, &pool).await;
        nothing_is_called_held(column, &answers);
        if checked.is_ok() {
            all_are_granted(column, &answers);
        }
        locks.close().await;
    }
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

/// They work, or `check()` says that they do not.
async fn columns_of_another_type<T: TestServer>(database: &T) {
    let columns: &[(&str, &str)] = match T::NAME {
        "postgres" => &[
            ("fencing_token", "INTEGER"),
            ("fencing_token", "NUMERIC"),
            ("fencing_token", "TEXT"),
            ("previous_token", "INTEGER"),
            ("id", "INTEGER"),
            ("id", "NUMERIC"),
            ("ttl_micros", "INTEGER"),
            ("secret_key", "VARCHAR(8)"),
            ("secret_key", "CHAR(40)"),
            ("owner", "VARCHAR(5)"),
            ("waiters", "VARCHAR(10)"),
            ("lock_kind", "CHAR(16)"),
            ("expire_time", "TIMESTAMPTZ(0)"),
            ("expire_time", "TIMESTAMP"),
            ("expire_time", "DATE"),
            ("lock_name", "VARCHAR(255)"),
            ("lock_name", "VARCHAR(2)"),
        ],
        _ => &[
            ("fencing_token", "INT NOT NULL DEFAULT 0"),
            ("fencing_token", "DECIMAL(30) NOT NULL DEFAULT 0"),
            ("fencing_token", "BIGINT UNSIGNED NOT NULL DEFAULT 0"),
            ("previous_token", "INT NOT NULL DEFAULT 0"),
            ("id", "INT NOT NULL AUTO_INCREMENT"),
            ("id", "BIGINT UNSIGNED NOT NULL AUTO_INCREMENT"),
            ("ttl_micros", "INT NOT NULL DEFAULT 0"),
            ("secret_key", "VARCHAR(8) NOT NULL DEFAULT ''"),
            ("secret_key", "CHAR(40) NOT NULL DEFAULT ''"),
            ("owner", "VARCHAR(5) NOT NULL DEFAULT ''"),
            ("waiters", "VARCHAR(10) NOT NULL DEFAULT ''"),
            ("lock_kind", "CHAR(16) NOT NULL DEFAULT 'insert'"),
            ("expire_time", "DATETIME NOT NULL DEFAULT '1970-01-01 00:00:00'"),
            ("expire_time", "DATE NOT NULL DEFAULT '1970-01-01'"),
            ("lock_name", "VARBINARY(10) NOT NULL"),
        ],
    };
    let mut problems = Vec::new();
    for (column, kind) in columns {
        migrated(Locks::new(database.pool(1).await)).await.close().await;
        let change = if T::NAME == "postgres" {
            database.run("ALTER TABLE distributed_lock ALTER id DROP IDENTITY IF EXISTS").await;
            database.run("CREATE SEQUENCE IF NOT EXISTS ids").await;
            database.run("ALTER TABLE distributed_lock ALTER id SET DEFAULT nextval('ids')").await;
            format!(
                "ALTER TABLE distributed_lock DROP CONSTRAINT IF EXISTS distributed_lock_lock_kind_check,
                ALTER {column} DROP DEFAULT, ALTER {column} TYPE {kind} USING NULL"
            )
        } else {
            format!("ALTER TABLE distributed_lock MODIFY {column} {kind}")
        };
        database.run(&change).await;
        if T::NAME == "postgres" {
            let default = match *column {
                "id" => "nextval('ids')",
                "lock_kind" => "'insert'",
                "expire_time" => "'1970-01-01'",
                "lock_name" | "owner" | "secret_key" | "waiters" => "''",
                _ => "0",
            };
            database.run(&format!("ALTER TABLE distributed_lock ALTER {column} SET DEFAULT {default}")).await;
        }
        let pool = database.pool(4).await;
        let locks = Locks::new(pool.clone());
        let checked = locks.check().await;
        for answer in ask(&locks, &pool).await {
            let is_right = match &answer.granted {
                Ok(true) => true,
                Ok(false) | Err(Error::Timeout { .. }) => false,
                Err(_) => checked.is_err(),
            };
            if !is_right {
                // One of each column is enough.
                problems.push(format!("{column} {kind}: check() {checked:?}, {answer:?}"));
                break;
            }
        }
        locks.close().await;
        pool.close().await;
        database.run("DROP TABLE distributed_lock").await;
    }
    assert!(problems.is_empty(), "{problems:#?}");
}
