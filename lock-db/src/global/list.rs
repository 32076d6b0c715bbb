//! Lists of locks of a database that is known only at run time.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use super::ErasedLocks;
use crate::{Error, LockInfo};

/// A request for a list of locks, from [`AnyLocks::list`](crate::AnyLocks::list). It is sent by
/// `.await`.
#[derive(Clone)]
#[must_use = "it is sent by `.await`"]
pub struct AnyListLocks {
    locks: Arc<dyn ErasedLocks>,
    pattern: String,
    held_only: bool,
    limit: Option<usize>,
    after: Option<String>,
}

impl AnyListLocks {
    pub(super) fn new(locks: Arc<dyn ErasedLocks>, pattern: &str) -> Self {
        Self { locks, pattern: pattern.to_owned(), held_only: false, limit: None, after: None }
    }

    /// Only locks that are held, as [`ListLocks::held_only`](crate::ListLocks::held_only).
    pub fn held_only(mut self) -> Self {
        self.held_only = true;
        self
    }

    /// At most this many locks, at least one. Without it, all of them.
    pub fn limit(mut self, limit: usize) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Only locks whose names come after this one: the last name of the page before.
    pub fn after(mut self, name: impl AsRef<str>) -> Self {
        self.after = Some(name.as_ref().to_owned());
        self
    }
}

impl IntoFuture for AnyListLocks {
    type Output = Result<Vec<LockInfo>, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { locks, pattern, held_only, limit, after } = self;
        locks.list(&pattern, held_only, limit, after.as_deref())
    }
}

impl fmt::Debug for AnyListLocks {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("AnyListLocks")
            .field("pattern", &self.pattern)
            .field("held_only", &self.held_only)
            .field("limit", &self.limit)
            .field("after", &self.after)
            .finish_non_exhaustive()
    }
}
