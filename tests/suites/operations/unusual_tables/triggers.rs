//! Triggers with an idea of their own: what was not written is not granted.

use lock_db::Locks;
use lock_tests::TestDatabase;

use super::requests::{Answer, ask, locks_in_use, nothing_is_called_held};

lock_tests::cases! {
    on every database:
    a_lock_that_a_trigger_does_not_let_be_written_is_not_granted,
}

/// Of what trigger there is how many statements.
fn triggers<T: TestDatabase>() -> Vec<&'static str> {
    match T::NAME {
        "postgres" => vec![
            "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
            CREATE TRIGGER swallow BEFORE INSERT OR UPDATE ON distributed_lock FOR EACH ROW EXECUTE FUNCTION swallow()",
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''frozen''; END';
            CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON distributed_lock FOR EACH ROW EXECUTE FUNCTION refuse()",
        ],
        "sqlite" => vec![
            "CREATE TRIGGER swallow BEFORE UPDATE ON distributed_lock BEGIN SELECT RAISE(IGNORE); END;
            CREATE TRIGGER swallow_new BEFORE INSERT ON distributed_lock BEGIN SELECT RAISE(IGNORE); END",
            "CREATE TRIGGER refuse BEFORE UPDATE ON distributed_lock BEGIN SELECT RAISE(ABORT, 'frozen'); END;
            CREATE TRIGGER refuse_new BEFORE INSERT ON distributed_lock BEGIN SELECT RAISE(ABORT, 'frozen'); END",
        ],
        _ => vec![
            "CREATE TRIGGER keep BEFORE UPDATE ON distributed_lock FOR EACH ROW
            SET NEW.secret_key = OLD.secret_key, NEW.expire_time = OLD.expire_time, NEW.fencing_token = OLD.fencing_token;
            CREATE TRIGGER keep_new BEFORE INSERT ON distributed_lock FOR EACH ROW
            SET NEW.secret_key = '', NEW.expire_time = '1970-01-01 00:00:00', NEW.ttl_micros = 0, NEW.fencing_token = 0",
            "CREATE TRIGGER refuse BEFORE UPDATE ON distributed_lock FOR EACH ROW
            SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'frozen';
            CREATE TRIGGER refuse_new BEFORE INSERT ON distributed_lock FOR EACH ROW
            SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'frozen'",
        ],
    }
}

async fn a_lock_that_a_trigger_does_not_let_be_written_is_not_granted<T: TestDatabase>(database: &T) {
    for trigger in triggers::<T>() {
        is_not_granted_under(database, trigger).await;
    }
}

pub async fn is_not_granted_under<T: TestDatabase>(database: &T, trigger: &str) {
    let used = locks_in_use(database).await;
    database.run(trigger).await;
    let pool = database.pool(4).await;
    let locks = Locks::new(pool.clone());
    for locks in [&used, &locks] {
        let answers = ask(locks, &pool).await;
        nothing_is_called_held(trigger, &answers);
        for Answer { way, granted, .. } in answers {
            assert!(granted.is_err(), "{trigger}: {way}: {granted:?}");
        }
    }
    database.run("DROP TABLE distributed_lock").await;
}
