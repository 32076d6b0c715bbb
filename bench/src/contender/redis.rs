//! Redis. One contender is the crate rslock with its defaults: it retries within 200 ms at random,
//! and has no fencing token. The other one uses two scripts that also count the grants, and retries
//! in the same way.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Script};
use rslock::{Lock, LockManager};
use tokio::time::sleep;

use super::{Boxed, Caller, CallerGroup, Contender, Job};

const TTL: Duration = Duration::from_secs(30);

/// The counter has no expiry: a token must be larger than all earlier tokens of the name, including
/// those from before the key expired.
const LOCK: &str = "\
    if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then \
        return redis.call('INCR', KEYS[2]) \
    end \
    return false";
const UNLOCK: &str = "\
    if redis.call('GET', KEYS[1]) == ARGV[1] then \
        return redis.call('DEL', KEYS[1]) \
    end \
    return 0";

/// The maximum pause of rslock between two attempts, in milliseconds.
const LONGEST_PAUSE: u64 = 200;

struct Rslock {
    manager: LockManager,
    name: Vec<u8>,
    lock: Option<Lock>,
}

impl Caller for Rslock {
    fn set_name(&mut self, name: &str) {
        self.name = name.as_bytes().to_vec();
    }

    fn acquire(&mut self) -> Boxed<'_, anyhow::Result<Option<i64>>> {
        Box::pin(async {
            self.lock = Some(self.manager.acquire_no_guard(self.name.as_slice(), TTL).await?);
            Ok(None)
        })
    }

    fn release(&mut self) -> Boxed<'_, anyhow::Result<()>> {
        Box::pin(async {
            let lock = self.lock.take().context("not held")?;
            self.manager.unlock(&lock).await;
            Ok(())
        })
    }
}

struct Scripts {
    lock: Script,
    unlock: Script,
}

struct TokenLock {
    connection: MultiplexedConnection,
    scripts: Arc<Scripts>,
    name: String,
    counter: String,
    /// The value of the key while this caller holds the lock. Each acquisition has a new one.
    value: String,
}

impl Caller for TokenLock {
    fn set_name(&mut self, name: &str) {
        name.clone_into(&mut self.name);
        self.counter = format!("{name}:token");
    }

    fn acquire(&mut self) -> Boxed<'_, anyhow::Result<Option<i64>>> {
        Box::pin(async {
            self.value = format!("{:032x}", fastrand::u128(..));
            loop {
                let mut lock = self.scripts.lock.key(&self.name);
                lock.key(&self.counter).arg(&self.value).arg(TTL.as_secs() * 1000);
                let token: Option<i64> = lock.invoke_async(&mut self.connection).await?;
                if token.is_some() {
                    return Ok(token);
                }
                sleep(Duration::from_millis(fastrand::u64(0..LONGEST_PAUSE))).await;
            }
        })
    }

    fn release(&mut self) -> Boxed<'_, anyhow::Result<()>> {
        Box::pin(async {
            let mut unlock = self.scripts.unlock.key(&self.name);
            let deleted: i64 = unlock.arg(&self.value).invoke_async(&mut self.connection).await?;
            anyhow::ensure!(deleted == 1, "the lock had another owner");
            Ok(())
        })
    }
}

pub(super) async fn connect(job: &Job) -> anyhow::Result<CallerGroup> {
    // No timeout: an answer that arrives after it would be a lock that no caller knows of.
    let config = AsyncConnectionConfig::new().set_response_timeout(None);
    // Connects for rslock as well, which retries forever without an error if it can't connect.
    let connection =
        redis::Client::open(job.url.as_str())?.get_multiplexed_async_connection_with_config(&config).await?;
    let callers = if job.contender == Contender::Rslock {
        let manager = LockManager::new(vec![job.url.as_str()]);
        let caller = |name: &String| -> Box<dyn Caller> {
            Box::new(Rslock { manager: manager.clone(), name: name.clone().into_bytes(), lock: None })
        };
        job.names.iter().map(caller).collect()
    } else {
        let scripts = Arc::new(Scripts { lock: Script::new(LOCK), unlock: Script::new(UNLOCK) });
        let caller = |name: &String| -> Box<dyn Caller> {
            Box::new(TokenLock {
                connection: connection.clone(),
                scripts: scripts.clone(),
                name: name.clone(),
                counter: format!("{name}:token"),
                value: String::new(),
            })
        };
        job.names.iter().map(caller).collect()
    };
    Ok(CallerGroup { callers, end: Box::pin(async {}) })
}
