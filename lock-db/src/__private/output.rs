//! What annotated functions return.

use crate::{Error, Skippable};

/// The return type of an annotated function. It must have an error that can say that the lock was
/// not taken.
#[diagnostic::on_unimplemented(
    message = "a locked function must return `Result<_, E>` where `E: From<lock_db::Error>`",
    label = "taking the lock can fail, and `{Self}` has nowhere to put that error",
    note = "write `Result<_, lock_db::Error>`, or implement `From<lock_db::Error>` for your error type"
)]
pub trait LockedOutput {
    fn refused(error: Error) -> Self;

    /// Whether it is a success.
    fn stands(&self) -> bool;
}

#[diagnostic::do_not_recommend]
impl<T, E: From<Error>> LockedOutput for Result<T, E> {
    fn refused(error: Error) -> Self {
        Err(error.into())
    }

    fn stands(&self) -> bool {
        self.is_ok()
    }
}

/// The return type of an annotated function with `skip`. It must be able to say that the body did
/// not run.
#[diagnostic::on_unimplemented(
    message = "a function that may be skipped must be able to say so",
    label = "`{Self}` can't say that the body did not run",
    note = "write `Result<Option<_>, E>` (`Ok(None)`: skipped) or `Result<(), E>`, or implement `lock_db::Skippable` for the type in `Ok`"
)]
pub trait SkippableOutput {
    fn skipped() -> Self;
}

#[diagnostic::do_not_recommend]
impl<T: Skippable, E> SkippableOutput for Result<T, E> {
    fn skipped() -> Self {
        Ok(T::skipped())
    }
}
