//! What annotated functions return when they are skipped.

/// What stands in the `Ok` of a function with `#[distributed_lock("…", skip)]`: a type that can say that the body did not run,
/// because somebody else had the lock.
///
/// `Option<T>` says it by `None`. `()` says nothing either way: right for a job of which it only matters that somebody
/// does it. Not implemented for types such as `bool` and numbers, in which a body that ran and one that did not would look
/// the same. Implement it for an enum of your own that has a place for it:
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
    /// The value that says so.
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
