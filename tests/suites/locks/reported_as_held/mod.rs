//! Only a lock that was seen to be held is reported as held: by `Error::Timeout`, by `None` from a
//! try, and by a function that is skipped. All other results are errors with a cause. A temporary
//! obstacle is waited for, and a permanent one fails immediately.
//!
//! Each case makes every kind of request: leases and row locks, one or several, in a transaction of
//! their own or of the caller, by a call or by the attribute with `skip`, with short waits and as
//! tries.

mod accounts;
mod held;
mod not_held;
mod permanent_obstacles;
mod requests;
mod temporary_obstacles;

lock_tests::cases! {
    in modules: held, not_held, permanent_obstacles, temporary_obstacles
}
