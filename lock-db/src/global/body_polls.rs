//! The bodies that the calling thread is polling at the moment.
//!
//! A call that was last polled within the body of its holder may not be polled any more when that
//! body has ended. A call in another task, or in another branch of the same task, goes on by
//! itself.

use std::cell::RefCell;
use std::marker::PhantomData;

thread_local! {
    /// The numbers of the holders, innermost last. There are few: the row locks that the running
    /// code is inside of.
    static POLLED: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// A poll of a body, until this is dropped. Not `Send`: a poll ends on the thread on which it
/// began.
pub(super) struct BodyPoll(PhantomData<*const ()>);

impl BodyPoll {
    /// `holder`: a number that no other holder has at the same time.
    pub(super) fn begin(holder: usize) -> Self {
        POLLED.with_borrow_mut(|polled| polled.push(holder));
        Self(PhantomData)
    }
}

impl Drop for BodyPoll {
    fn drop(&mut self) {
        POLLED.with_borrow_mut(Vec::pop);
    }
}

/// Whether the calling code runs within the body of this holder.
pub(super) fn is_polled(holder: usize) -> bool {
    POLLED.with_borrow(|polled| polled.contains(&holder))
}
