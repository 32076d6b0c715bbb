//! Lists of locks.

use std::pin::Pin;
use std::sync::Arc;

use super::Locks;
use crate::context::Context;
use crate::database::{ListPage, LockDatabase};
use crate::name::MAX_BYTES;
use crate::session::Request;
use crate::{Error, LockInfo};

/// How many locks are read in one statement.
const AT_ONCE: usize = 1000;

/// A request for a list of locks, from [`Locks::list`]. It is sent by `.await`.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let locks = lock_db::testing::locks().await?;
/// # let _lease = locks.insert_lock("order:41").acquire().await?;
/// // A page of a hundred, and the next one.
/// let page = locks.list("order:*").held_only().limit(100).await?;
/// if let Some(last) = page.last() {
///     let next = locks.list("order:*").held_only().limit(100).after(&last.name).await?;
///     assert!(next.is_empty());
/// }
/// # Ok(())
/// # }
/// ```
#[must_use = "it is sent by `.await`"]
pub struct ListLocks<DB: LockDatabase> {
    context: Arc<Context<DB>>,
    asked: ListOptions,
}

/// What a list is asked for.
#[derive(Debug, Clone)]
pub(crate) struct ListOptions {
    pub(crate) pattern: String,
    pub(crate) held_only: bool,
    pub(crate) limit: Option<usize>,
    pub(crate) after: String,
}

impl ListOptions {
    pub(crate) fn new(pattern: &str) -> Self {
        Self { pattern: pattern.to_owned(), held_only: false, limit: None, after: String::new() }
    }
}

impl<DB: LockDatabase> ListLocks<DB> {
    pub(crate) fn new(context: Arc<Context<DB>>, asked: ListOptions) -> Self {
        Self { context, asked }
    }

    /// Only locks that are held. Row locks are among them where the server tells which rows are
    /// locked: see [`RowHolder`](crate::RowHolder).
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

    async fn read(self) -> Result<Vec<LockInfo>, Error> {
        let Self { context, asked: ListOptions { pattern, held_only, limit, after } } = self;
        if limit == Some(0) {
            let (option, value) = ("limit", "0".to_owned());
            return Err(Error::InvalidOption { option, value, reason: "at least one lock is listed" });
        }
        let prefix = context.settings().name_prefix.clone();
        let invalid = |name: &str, reason| Err(Error::InvalidName { name: name.to_owned(), reason });
        for text in [&pattern, &after] {
            if text.contains('\0') {
                return invalid(text, "it contains a NUL byte, which PostgreSQL can't store");
            }
        }
        if pattern.is_empty() {
            return invalid("", "it is empty; `*` stands for all names");
        }
        let mut parts: Vec<String> = pattern.split('*').map(str::to_owned).collect();
        if let Some(first) = parts.first_mut() {
            first.insert_str(0, &prefix);
        }
        let mut found = Vec::new();
        // No name is longer.
        if parts.iter().map(String::len).sum::<usize>() > MAX_BYTES {
            return Ok(found);
        }
        let mut after = format!("{prefix}{after}");
        loop {
            let left = limit.map_or(AT_ONCE, |limit| (limit - found.len()).min(AT_ONCE));
            let page = ListPage {
                parts: parts.clone(),
                after,
                end: None,
                held_only,
                limit: i64::try_from(left).unwrap_or(i64::MAX),
            };
            let list = |answer| Request::List { page, prefix: prefix.len(), answer };
            let (read, end) = context.session().ask(list).await?;
            let is_full = read.len() >= left;
            found.extend(read);
            if limit.is_some_and(|limit| found.len() >= limit) {
                return Ok(found);
            }
            after = match (end, found.last()) {
                (_, Some(last)) if is_full => format!("{prefix}{}", last.name),
                (Some(end), _) => end,
                (None, _) => return Ok(found),
            };
        }
    }
}

impl<DB: LockDatabase> IntoFuture for ListLocks<DB> {
    type Output = Result<Vec<LockInfo>, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.read())
    }
}

impl<DB: LockDatabase> Locks<DB> {
    /// Lists locks, in the order of the bytes of their names. Returns a request, which is sent by
    /// `.await`.
    ///
    /// In `pattern`, `*` stands for anything, at the end or anywhere; `*` alone for all names. Only
    /// names with the [prefix](crate::LocksBuilder::name_prefix) of this `Locks` are listed. With
    /// [`limit`](ListLocks::limit) and [`after`](ListLocks::after) the list is read in pages.
    ///
    /// The result is for dashboards and logs, and out of date as soon as it is returned. No lock is
    /// touched.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let lease = locks.insert_lock("order:41").acquire().await?;
    /// for info in locks.list("order:*").held_only().await? {
    ///     println!("{} is held by {} for {:?}", info.name, info.owner, info.held_for);
    /// }
    /// # drop(lease);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// The request fails with
    ///
    /// - [`Error::InvalidName`] when the pattern is empty, or contains a NUL byte;
    /// - [`Error::InvalidOption`] when the limit is zero;
    /// - otherwise as [`info`](Self::info).
    ///
    /// # Cancel safety
    ///
    /// The request may be dropped at any time.
    pub fn list(&self, pattern: impl AsRef<str>) -> ListLocks<DB> {
        ListLocks::new(Arc::clone(self.context()), ListOptions::new(pattern.as_ref()))
    }
}

impl<DB: LockDatabase> Clone for ListLocks<DB> {
    fn clone(&self) -> Self {
        Self { context: Arc::clone(&self.context), asked: self.asked.clone() }
    }
}

impl<DB: LockDatabase> std::fmt::Debug for ListLocks<DB> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ListLocks").field("asked", &self.asked).finish_non_exhaustive()
    }
}
