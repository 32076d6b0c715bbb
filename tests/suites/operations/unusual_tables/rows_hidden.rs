//! Row level security, for a role that does not own the table.

use lock_db::Locks;
use lock_tests::{PostgresServer, TestDatabase, account, pool};
use sqlx::Postgres;

use super::requests::{all_are_granted, ask, is_refused_as_unsupported, locks_in_use};

lock_tests::cases! {
    on postgres:
    rows_that_are_hidden_from_the_role_are_not_taken_for_held_ones,
    roles_that_see_all_rows_are_not_refused,
}

pub const ENABLE: &str = "ALTER TABLE distributed_lock ENABLE ROW LEVEL SECURITY";

pub async fn grant(database: &PostgresServer, role: &str) {
    database
        .run(&format!(
            "GRANT SELECT, INSERT, UPDATE ON distributed_lock TO {role}; GRANT SELECT ON _lock_db_migrations TO {role}"
        ))
        .await;
}

async fn rows_that_are_hidden_from_the_role_are_not_taken_for_held_ones(database: &PostgresServer) {
    let owner = locks_in_use(database).await;
    let (url, role, _at_end) = account(database).await;
    grant(database, &role).await;
    database.run(ENABLE).await;
    // Even when nothing is hidden at the moment, a policy may hide the next name.
    for policy in [
        "",
        "CREATE POLICY reads ON distributed_lock FOR SELECT USING (true)",
        "CREATE POLICY inserts ON distributed_lock FOR INSERT WITH CHECK (true)",
        "CREATE POLICY updates ON distributed_lock FOR UPDATE USING (lock_name <> 'used')",
        "DROP POLICY updates ON distributed_lock; CREATE POLICY updates ON distributed_lock FOR UPDATE USING (true)",
    ] {
        if !policy.is_empty() {
            database.run(policy).await;
        }
        let pool = pool::<Postgres>(&url, 4).await;
        let locks = Locks::new(pool.clone());
        is_refused_as_unsupported(policy, &locks, &pool, "row level security").await;
        locks.close().await;
        pool.close().await;
    }
    // Its owner sees all.
    all_are_granted("the owner", &ask(&owner, &database.pool(4).await).await);
}

async fn roles_that_see_all_rows_are_not_refused(database: &PostgresServer) {
    locks_in_use(database).await.close().await;
    let (url, role, _at_end) = account(database).await;
    grant(database, &role).await;
    database.run(ENABLE).await;
    for change in [
        format!("ALTER ROLE {role} BYPASSRLS"),
        format!("ALTER ROLE {role} NOBYPASSRLS; ALTER TABLE distributed_lock OWNER TO {role}"),
    ] {
        database.run(&change).await;
        let pool = pool::<Postgres>(&url, 4).await;
        let locks = Locks::new(pool.clone());
        locks.check().await.unwrap();
        all_are_granted(&change, &ask(&locks, &pool).await);
        locks.close().await;
    }
    // Unless the policies are for the owner, too.
    database.run("ALTER TABLE distributed_lock FORCE ROW LEVEL SECURITY").await;
    let pool = pool::<Postgres>(&url, 4).await;
    is_refused_as_unsupported("forced", &Locks::new(pool.clone()), &pool, "row level security").await;
    database.run("ALTER TABLE distributed_lock OWNER TO CURRENT_USER").await;
}
