//! Lists of locks of a database that is known only at run time.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use super::ErasedLocks;
use crate::locks::ListOptions;
use crate::{Error, LockInfo};

/// A request for a list of locks, from [`AnyLocks::list`](crate::AnyLocks::list). It is sent by
/// `.await`.
#[derive(Clone)]
#[must_use = "it is sent by `.await`"]
pub struct AnyListLocks {
    locks: Arc<dyn ErasedLocks>,
    asked: ListOptions,
}

impl AnyListLocks {
    pub(super) fn new(locks: Arc<dyn ErasedLocks>, pattern: &str) -> Self {
        Self { locks, asked: ListOptions::new(pattern) }
    }

    /// Only locks that are held, as [`ListLocks::held_only`](crate::ListLocks::held_only).
    pub fn held_only(mut self) -> Self {
        self.asked.held_only = true;
        self
    }

    /// At most this many locks, at least one. Without it, all of them.
    pub fn limit(mut self, limit: usize) -> Self {
        self.asked.limit = Some(limit);
        self
    }

    /// Only locks whose names come after this one: the last name of the page before.
    pub fn after(mut self, name: impl AsRef<str>) -> Self {
        name.as_ref().clone_into(&mut self.asked.after);
        self
    }
}

impl IntoFuture for AnyListLocks {
    type Output = Result<Vec<LockInfo>, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        self.locks.list(self.asked)
    }
}

impl fmt::Debug for AnyListLocks {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("AnyListLocks").field("asked", &self.asked).finish_non_exhaustive()
    }
}
