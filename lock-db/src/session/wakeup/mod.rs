//! How a waiter learns that a lock is free: by a notification, or by a user lock of the server. On
//! databases without either, it polls.

pub(super) mod notify;
pub(super) mod user_lock;
