//! Names: equal bytes are one lock, different bytes are two, on every database.

use lock_db::Error;
use lock_tests::TestDatabase;

lock_tests::cases! {
    on every database:
    names_that_look_alike_are_different_locks,
    names_of_row_locks_that_look_alike_are_different_locks,
    the_longest_name_works,
    names_are_data_and_never_sql,
}

/// Case, accents, Unicode forms, blanks, invisible characters, widths: differences that collations
/// fold.
const ALIKE: [&str; 16] = [
    "job",
    "JOB",
    "Job",
    "job ",
    " job",
    "job  ",
    "jób",
    "jo\u{301}b",
    "job\t",
    "job\u{200d}",
    "ｊｏｂ",
    "job\n",
    "ß",
    "ss",
    "😀",
    "😁",
];

async fn names_that_look_alike_are_different_locks<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let other = lock_db::Locks::new(database.pool(1).await);
    let mut held = Vec::new();
    for name in ALIKE {
        let lease = locks.insert_lock(name).try_acquire().await.unwrap();
        held.push(lease.unwrap_or_else(|| panic!("{name:?} is taken by another name")));
    }
    for name in ALIKE {
        assert!(other.insert_lock(name).try_acquire().await.unwrap().is_none(), "{name:?}");
        assert_eq!(other.info(name).await.unwrap().unwrap().name, name);
    }
    assert_eq!(database.number("SELECT COUNT(*) FROM distributed_lock").await, 16);
    for lease in held {
        lease.release().await.unwrap();
    }
}

async fn names_of_row_locks_that_look_alike_are_different_locks<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let mut transaction = database.pool(1).await.begin().await.unwrap();
    for name in ALIKE {
        locks.row_lock(name).acquire_in(&mut transaction).await.unwrap();
    }
    transaction.commit().await.unwrap();
    assert_eq!(database.number("SELECT COUNT(*) FROM distributed_lock").await, 16);
}

async fn the_longest_name_works<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let other = lock_db::Locks::new(database.pool(1).await);
    for name in ["x".repeat(255), "é".repeat(127), "😀".repeat(63)] {
        let lease = locks.insert_lock(&name).acquire().await.unwrap();
        assert_eq!(lease.name(), name);
        assert!(other.insert_lock(&name).try_acquire().await.unwrap().is_none());
        // Names are not truncated: a prefix is another lock.
        let mut shorter = name.clone();
        shorter.pop();
        assert!(other.insert_lock(&shorter).try_acquire().await.unwrap().is_some());
        lease.release().await.unwrap();
    }
    let row = "y".repeat(255);
    locks.row_lock(&row).acquire().await.unwrap().commit().await.unwrap();
    for name in ["x".repeat(256), "é".repeat(128)] {
        assert!(matches!(locks.insert_lock(&name).acquire().await, Err(Error::InvalidName { .. })));
        assert!(matches!(locks.row_lock(&name).acquire().await, Err(Error::InvalidName { .. })));
        assert!(matches!(locks.info(&name).await, Err(Error::InvalidName { .. })));
    }
}

async fn names_are_data_and_never_sql<T: TestDatabase>(database: &T) {
    let label = "a'b\"c\\d; -- %s $1 ? {}";
    let locks = lock_db::Locks::builder(database.pool(2).await).label(label).build();
    locks.migrate().await.unwrap();
    for name in
        ["'", "\"", "\\", "'; DROP TABLE distributed_lock; --", "%", "_", "$1", "?", "{}", "[\"x\",1]", "a,b"]
    {
        let lease = locks.insert_lock(name).ttl(std::time::Duration::from_secs(10)).acquire().await.unwrap();
        assert_eq!(locks.info(name).await.unwrap().unwrap().name, name);
        lease.release().await.unwrap();
        let row = format!("row {name}");
        locks.row_lock(&row).acquire().await.unwrap().commit().await.unwrap();
        assert!(locks.info(&row).await.unwrap().unwrap().owner.ends_with(label));
    }
}
