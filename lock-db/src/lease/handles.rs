//! What several leases of one holder do together, by their handles.

use std::future::{pending, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use tokio::select;

use crate::Error;
use crate::error::Loss;
use crate::session::LeaseHandle;

/// Resolves when one of the leases is lost.
pub(crate) async fn lost(handles: impl Iterator<Item = &LeaseHandle>) {
    let mut waiting: Vec<_> = handles.map(|handle| Box::pin(handle.lease.lost())).collect();
    poll_fn(|context| {
        let is_lost = waiting.iter_mut().any(|lost| lost.as_mut().poll(context).is_ready());
        if is_lost { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// See [`Leases::run_until_lost`](super::Leases::run_until_lost).
pub(crate) async fn run_until_lost<'a, I, F>(handles: impl Fn() -> I, work: F) -> Result<F::Output, Error>
where
    I: Iterator<Item = &'a LeaseHandle>,
    F: Future,
{
    let mut work = pin!(work);
    let output = select! {
        biased;
        output = &mut work => Some(output),
        () = lost_to_others(handles()) => None,
    };
    let lost = handles().find_map(|handle| Some(handle.lost_error(loss(handle)?)));
    match (output, lost) {
        (Some(output), None) => Ok(output),
        (_, Some(error)) => Err(error),
        (None, None) => Err(Error::Closed),
    }
}

/// Why a lease is lost. Its release by the work is no loss.
fn loss(handle: &LeaseHandle) -> Option<Loss> {
    handle.lease.loss().filter(|loss| *loss != Loss::Released)
}

/// Resolves when one of the leases is lost other than by a release.
async fn lost_to_others(handles: impl Iterator<Item = &LeaseHandle>) {
    let mut waiting: Vec<_> = handles
        .map(|handle| {
            Box::pin(async {
                if handle.lease.lost().await == Loss::Released {
                    pending::<()>().await;
                }
            })
        })
        .collect();
    poll_fn(|context| {
        let is_lost = waiting.iter_mut().any(|lost| lost.as_mut().poll(context).is_ready());
        if is_lost { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// Releases all of the leases, and returns the first error.
pub(crate) async fn release(handles: impl Iterator<Item = Arc<LeaseHandle>>) -> Result<(), Error> {
    // All releases are sent before the first one is awaited, so that they go to the database
    // together.
    let released: Vec<_> = handles.map(LeaseHandle::begin_to_give_up).collect();
    let mut result = Ok(());
    for released in released {
        let released = match released {
            Ok(under_way) => under_way.end().await,
            Err(error) => Err(error),
        };
        result = result.and(released);
    }
    result
}
