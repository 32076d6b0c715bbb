//! What operators are told; and a session whose thread is kept by the application, in what it does with log lines.

use std::fmt::Write;
use std::sync::{Condvar, Mutex, Once};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, span};

use super::*;

lock_tests::cases! {
    on every server:
    calls_end_while_the_thread_of_the_session_is_blocked;

    in modules: of_an_account
}

/// Everything that lock-db says in this process, which other tests share.
struct Log;

/// By level.
static LINES: Mutex<Vec<(Level, String)>> = Mutex::new(Vec::new());
/// What must be in a line so that the thread that says it is blocked.
static BLOCKED: Mutex<Vec<String>> = Mutex::new(Vec::new());
static CHANGED: Condvar = Condvar::new();

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        write!(self.0, "{field}={value:?} ").unwrap();
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("lock_db")
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        let mut blocked = BLOCKED.lock().unwrap();
        while blocked.iter().any(|part| text.0.contains(part)) {
            blocked = CHANGED.wait(blocked).unwrap();
        }
        drop(blocked);
        LINES.lock().unwrap().push((*event.metadata().level(), text.0));
    }

    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| tracing::subscriber::set_global_default(Log).unwrap());
}

/// As by a subscriber that writes into a pipe which nobody reads.
async fn calls_end_while_the_thread_of_the_session_is_blocked<T: TestServer>(database: &T) {
    listen();
    let locks = database.locks().await;
    let name = format!("blocks {}", T::NAME);
    let other = locks.insert_lock("other").ttl(LONG_TTL).acquire().await.unwrap();
    let lease = locks.insert_lock(&name).ttl(LONG_TTL).acquire().await.unwrap();
    let transaction = lease.begin().await.unwrap();
    BLOCKED.lock().unwrap().push(name.clone());
    // The session says that this lease has ended.
    lease.commit_and_release(transaction).await.unwrap();

    let words = "the thread of this `Locks` has not run";
    let started = Instant::now();
    let error = locks.insert_lock("a").wait(Duration::from_secs(1)).acquire().await.unwrap_err();
    assert!(error.to_string().contains(words) && error.is_retryable(), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    let calls = async {
        tokio::join!(
            async { locks.insert_lock("a").try_acquire().await.unwrap_err().to_string() },
            async { locks.info("a").await.unwrap_err().to_string() },
            async { locks.check().await.unwrap_err().to_string() },
            async { locks.migrate().await.unwrap_err().to_string() },
            async { other.release().await.unwrap_err().to_string() },
        )
    };
    let (one, two, three, four, five) = timeout(PATIENCE, calls).await.expect("they end by themselves");
    for error in [one, two, three, four, five] {
        assert!(error.contains(words), "{error}");
    }
    timeout(PATIENCE, locks.close()).await.unwrap();
    BLOCKED.lock().unwrap().retain(|part| *part != name);
    CHANGED.notify_all();
}

mod of_an_account {
    use super::*;

    lock_tests::cases! {
        on postgres:
        a_single_connection_renews_and_is_warned_of_once,
    }

    /// A role that may open one connection less than are wanted.
    async fn a_single_connection_renews_and_is_warned_of_once(database: &PostgresServer) {
        const TTL: Duration = Duration::from_secs(3);
        listen();
        drop(database.locks().await);
        let role = format!("limited_{}", std::process::id());
        database.run(&format!("CREATE ROLE {role} LOGIN CONNECTION LIMIT 1")).await;
        database.run(&format!("GRANT SELECT, INSERT, UPDATE ON distributed_lock TO {role}")).await;
        let options = options_of::<PostgresServer>(database.url()).username(&role);
        let locks =
            Locks::new(PoolOptions::<sqlx::Postgres>::new().max_connections(1).connect_lazy_with(options));
        let lease = locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
        sleep(2 * TTL).await;
        assert!(lease.is_held());
        let told = |level: Level, part: &str| {
            let lines = LINES.lock().unwrap();
            lines.iter().filter(|(of, line)| *of == level && line.contains(part)).count()
        };
        assert_eq!(told(Level::WARN, &format!("too many connections for role \"{role}\"")), 1);
        // When there is room again, renewals have one of their own again.
        database.run(&format!("ALTER ROLE {role} CONNECTION LIMIT 5")).await;
        eventually(PATIENCE, async || told(Level::INFO, "over a connection of their own again") > 0).await;
        lease.release().await.unwrap();
        locks.close().await;
        eventually(PATIENCE, async || database.activity().await.connections == 0).await;
        database.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
    }
}
