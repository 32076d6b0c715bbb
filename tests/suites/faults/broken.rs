//! Leases as people write them by hand, each with one mistake; and one without, which shows that it is the mistake that
//! is found.

use std::time::Duration;

use lock_tests::Backend;
use sqlx::{Pool, Transaction};
use tokio::time::{sleep, timeout};

use super::history::{Moment, Outcome, now};

pub(crate) const TABLE: &str = "CREATE TABLE broken_lock
    (name VARCHAR(50) PRIMARY KEY, secret BIGINT NOT NULL, token BIGINT NOT NULL, expires BIGINT NOT NULL)";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mistake {
    None,
    /// The release frees the lock of whoever has it by then.
    ReleaseWithoutSecret,
    /// Every second client's clock is ahead, and it judges by that whether a lease is over.
    ExpiryByTheClientsClock,
    /// The check before the commit reads the lock's row without locking it.
    GuardWithoutRowLock,
}

impl Mistake {
    pub(crate) const ALL: [Self; 4] =
        [Self::None, Self::ReleaseWithoutSecret, Self::ExpiryByTheClientsClock, Self::GuardWithoutRowLock];
}

#[derive(Debug)]
pub(crate) struct BrokenLocks<DB: Backend> {
    pub(crate) pool: Pool<DB>,
    pub(crate) mistake: Mistake,
    /// Of the client: distinguishes secrets.
    pub(crate) client: i64,
}

pub(crate) struct BrokenLease<DB: Backend> {
    locks: BrokenLocks<DB>,
    name: String,
    token: i64,
    until: Moment,
}

impl<DB: Backend> Clone for BrokenLocks<DB> {
    fn clone(&self) -> Self {
        Self { pool: self.pool.clone(), ..*self }
    }
}

impl<DB: Backend> BrokenLocks<DB> {
    /// The clock that all agree on; or not, by mistake. In milliseconds.
    fn clock(&self, ttl: Duration) -> i64 {
        let ahead = self.mistake == Mistake::ExpiryByTheClientsClock && self.client % 2 == 0;
        let millis = Duration::from_nanos(now()) + if ahead { 2 * ttl } else { Duration::ZERO };
        i64::try_from(millis.as_millis()).unwrap()
    }

    pub(crate) async fn acquire(&self, name: &str, ttl: Duration, wait: Duration) -> Option<BrokenLease<DB>> {
        let deadline = now() + u64::try_from(wait.as_nanos()).unwrap();
        loop {
            if let Ok(Some(lease)) = self.try_acquire(name, ttl).await {
                return Some(lease);
            }
            if now() > deadline {
                return None;
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    async fn try_acquire(&self, name: &str, ttl: Duration) -> sqlx::Result<Option<BrokenLease<DB>>> {
        let mut connection = self.pool.acquire().await?;
        let until = now() + u64::try_from(ttl.as_nanos()).unwrap() * 9 / 10;
        let (secret, clock) = (self.client, self.clock(ttl));
        let expires = clock + i64::try_from(ttl.as_millis()).unwrap();
        let take = format!(
            "UPDATE broken_lock SET secret = {secret}, token = token + 1, expires = {expires}
             WHERE name = '{name}' AND expires < {clock}"
        );
        if DB::run(&mut connection, &take).await? == 0 {
            return Ok(None);
        }
        let look = format!("SELECT token FROM broken_lock WHERE name = '{name}' AND secret = {secret}");
        let token = DB::find_number(&mut connection, &look).await?;
        Ok(token.map(|token| BrokenLease { locks: self.clone(), name: name.to_owned(), token, until }))
    }
}

impl<DB: Backend> BrokenLease<DB> {
    pub(crate) fn token(&self) -> i64 {
        self.token
    }

    pub(crate) fn is_held(&self) -> bool {
        now() < self.until
    }

    pub(crate) async fn lost(&self) {
        sleep(Duration::from_nanos(self.until.saturating_sub(now()))).await;
    }

    pub(crate) async fn begin(&self) -> Option<Transaction<'static, DB>> {
        let mut connection = self.locks.pool.acquire().await.ok()?;
        if DB::NAME != "PostgreSQL" {
            let level = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED";
            DB::run(&mut connection, level).await.ok()?;
        }
        Transaction::begin(connection, None).await.ok()
    }

    pub(crate) async fn commit(&self, mut transaction: Transaction<'static, DB>) -> Outcome {
        let Self { name, token, locks, .. } = self;
        let lock = if locks.mistake == Mistake::GuardWithoutRowLock { "" } else { " FOR UPDATE" };
        let guard = format!(
            "SELECT token FROM broken_lock WHERE name = '{name}' AND secret = {} AND token = {token}{lock}",
            locks.client
        );
        match DB::find_number(&mut transaction, &guard).await {
            Ok(Some(_)) => {}
            _ => return Outcome::Refused,
        }
        // A network that is not the fastest.
        sleep(Duration::from_millis(20)).await;
        match transaction.commit().await {
            Ok(()) => Outcome::Committed,
            Err(_) => Outcome::Unknown,
        }
    }

    pub(crate) async fn release(self) {
        let Self { name, token, locks, .. } = self;
        let condition = match locks.mistake {
            Mistake::ReleaseWithoutSecret => String::new(),
            _ => format!(" AND secret = {} AND token = {token}", locks.client),
        };
        let release = format!("UPDATE broken_lock SET expires = 0 WHERE name = '{name}'{condition}");
        let released = async {
            let mut connection = locks.pool.acquire().await?;
            DB::run(&mut connection, &release).await
        };
        drop(timeout(Duration::from_secs(5), released).await);
    }
}
