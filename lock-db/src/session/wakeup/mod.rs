//! How a waiter learns that a lock is free: by a notification, by a user lock of the server, or by a
//! scan for many waiters. Otherwise it polls.

pub(super) mod notify;
pub(super) mod scan;
pub(super) mod user_lock;
