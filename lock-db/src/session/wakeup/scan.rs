//! Scans of the queues in which this process waits, which replace notifications for a process that
//! waits for many locks.
//!
//! Without a scan each waiting request reads its own row. The connection worker would be busy with
//! that, so the more requests there are, the less often each of them reads. A scan is one statement
//! for all of them. It returns only the rows whose lock is free for this process.
//!
//! A scan only shortens pauses, as a notification does: a lock is granted by its row alone.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::select;
use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};

use super::user_lock;
use crate::session::actor::Actor;

/// A process that waits for fewer locks does not scan. Each of its requests reads often enough.
const CROWD: usize = 64;
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// How long the connection for renewals may take to answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long the other connection scans after that one has failed.
const WITHOUT_SECOND: Duration = Duration::from_secs(30);
/// The pause is the time since a scan last found something, divided by this. Locks that are held
/// for long need not be taken quickly.
const SCANS: u32 = 16;

#[derive(Debug, Default)]
pub(in crate::session) struct Scan {
    is_running: Cell<bool>,
    /// The last scan was answered.
    is_answered: Cell<bool>,
}

/// Whether a request of this process that waits in a queue is told when the lock is free. It then
/// reads only to keep its queue entry alive.
pub(in crate::session) fn is_told(actor: &Actor) -> bool {
    actor.notifications.waiting() >= CROWD
        && (actor.notifications.listener() != 0 || actor.scan.is_answered.get())
}

/// Scans, in the background, as long as this process waits for many locks and gets no
/// notifications.
pub(in crate::session) fn begin(actor: &Rc<Actor>) {
    if !is_useful(actor) || actor.scan.is_running.replace(true) {
        return;
    }
    let actor = Rc::clone(actor);
    drop(spawn_local(async move {
        select! {
            () = actor.closed() => {}
            () = scan_while_useful(&actor) => {}
        }
        actor.scan.is_answered.set(false);
        actor.scan.is_running.set(false);
    }));
}

pub(super) fn is_useful(actor: &Actor) -> bool {
    actor.notifications.waiting() >= CROWD && actor.notifications.listener() == 0
}

/// The connection for renewals scans, because the other one is busy with the locks that change hands. One
/// connection is enough: if that one can't be used, or waits for a user lock, the other one scans.
async fn scan_while_useful(actor: &Actor) {
    let (mut last_hit, mut second_from) = (Instant::now(), Instant::now());
    while is_useful(actor) {
        let asked = Instant::now();
        let rows = actor.notifications.rows();
        let secret = actor.queues.queue_secret();
        let mut free = None;
        if second_from <= asked && !user_lock::is_awaited(actor) {
            match timeout(PATIENCE, actor.renewals.next_in_line(&rows, secret)).await {
                Ok(Ok(found)) => free = Some(found),
                Ok(Err(_)) | Err(_) => second_from = Instant::now() + WITHOUT_SECOND,
            }
        }
        let free = match free {
            Some(free) => free,
            None => match actor.worker.next_in_line(&rows, secret).await {
                Ok(free) => free,
                Err(failure) => {
                    tracing::debug!(error = %failure, "the queues could not be scanned: each request reads its row");
                    actor.scan.is_answered.set(false);
                    return sleep(LONGEST_PAUSE).await;
                }
            },
        };
        actor.scan.is_answered.set(true);
        if !free.is_empty() {
            last_hit = Instant::now();
            actor.notifications.notify_all(&free.into_iter().collect());
        }
        let pause = (last_hit.elapsed() / SCANS).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
        // At least as long as the scan took, so that there is time for other work.
        sleep(pause.max(asked.elapsed())).await;
    }
}
