//! The return types of annotated functions that may be skipped.

/// The type in the `Ok` of a function with `#[distributed_lock("…", skip)]`. It has a value which
/// says that the body did not run because the lock was held elsewhere.
///
/// For `Option<T>` the value is `None`. For `()` it is `()`, which does not tell the two cases
/// apart: use it for jobs that one process does for all. The trait is not implemented for types
/// such as `bool` and numbers, in which a skipped call would look like one that ran. Implement it
/// for an enum that has a variant for it:
///
/// ```
/// use lock_db::Skippable;
///
/// enum Cleanup {
///     Done { rows: u64 },
///     HeldElsewhere,
/// }
///
/// impl Skippable for Cleanup {
///     fn skipped() -> Self {
///         Self::HeldElsewhere
///     }
/// }
/// # let _ = Cleanup::Done { rows: 1 };
/// ```
pub trait Skippable {
    /// The value for a call that was skipped.
    fn skipped() -> Self;
}

impl Skippable for () {
    fn skipped() {}
}

impl<T> Skippable for Option<T> {
    fn skipped() -> Self {
        None
    }
}
