//! The thread of a session, and the dispatch of requests.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use sqlx::Pool;
use tokio::runtime::Builder;
use tokio::sync::{mpsc, watch};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::timeout;

use super::actor::Actor;
use super::hold_watch::{self, HoldWatch};
use super::local_queue::{LocalQueues, Reports};
use super::prune::{self, Pruning};
use super::request::{AnswerSender, Request};
use super::vitals::Vitals;
use super::{SessionChannel, acquire, release, renewal, snapshot_watch};
use crate::Error;
use crate::database::{Failure, Location, LockDatabase};
use crate::error::{Action, Loss};
use crate::options::HandOffLimits;
use crate::secret::Secret;

/// How long an idle thread waits for the next connection to make.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// How long running requests may take after all senders are gone.
const FINISH_LIMIT: Duration = Duration::from_secs(10);

/// Starts the thread. It ends after `Close`, or when the sender and all its clones are gone.
pub(super) fn start<DB: LockDatabase>(
    application: &Pool<DB>,
    location: &Arc<Location>,
    hand_off: HandOffLimits,
    owner: &Arc<str>,
    watched: &HoldWatch,
    pruning: Option<&Pruning>,
    vitals: &Arc<Vitals>,
) -> Result<SessionChannel, Error> {
    DB::check_options(&application.connect_options(), location.schema().as_deref())?;
    let application = application.clone();
    let (sender, requests) = mpsc::unbounded_channel();
    let weak = sender.downgrade();
    let reports = Reports { owner: Arc::clone(owner), no_answer: Failure::no_answer::<DB> };
    let queues = LocalQueues::new(weak.clone(), hand_off, Secret::generate()?, reports);
    let (location, watched) = (Arc::clone(location), watched.clone());
    let (pruning, vitals) = (pruning.cloned(), Arc::clone(vitals));
    let channel = SessionChannel { requests: sender, queues: Arc::clone(&queues) };
    let runtime = Builder::new_current_thread()
        .enable_all()
        // Connections are made on these threads.
        .thread_name("lock-db")
        .thread_keep_alive(KEEP_ALIVE)
        .build()
        .map_err(no_thread)?;
    std::thread::Builder::new()
        .name("lock-db".into())
        .spawn(move || {
            let local = LocalSet::new();
            runtime.block_on(async {
                local
                    .run_until(async move {
                        let actor = Actor::new(application, &location, weak, queues, vitals);
                        serve(&actor, requests, watched, pruning).await;
                    })
                    .await;
                let _in_time = timeout(FINISH_LIMIT, local).await;
            });
            // A hook of the application may block a thread forever.
            runtime.shutdown_background();
        })
        .map_err(no_thread)?;
    Ok(channel)
}

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn no_thread(error: std::io::Error) -> Error {
    Error::other(Action::StartSession, None, false, error.to_string())
}

/// Serves requests until all senders are gone or the session is closed.
async fn serve(
    actor: &Rc<Actor>,
    mut requests: mpsc::UnboundedReceiver<Request>,
    watched: HoldWatch,
    pruning: Option<Pruning>,
) {
    spawn_local(renewal::renew(Rc::clone(actor)));
    spawn_local(renewal::watch_deadlines(Rc::clone(actor)));
    spawn_local(snapshot_watch::watch(Rc::clone(actor)));
    spawn_local(renewal::watch_connections(Rc::clone(actor)));
    spawn_local(hold_watch::watch(Rc::clone(actor), watched));
    spawn_local(prune::watch(Rc::clone(actor), pruning));
    let queues = Arc::clone(&actor.queues);
    let watching = spawn_local(async move { queues.watch_waits().await });
    while let Some(request) = requests.recv().await {
        if let Some(done) = dispatch(Rc::clone(actor), request) {
            close(actor).await;
            drop(done);
            break;
        }
    }
    actor.closing.send_replace(true);
    watching.abort();
}

/// Starts the work for a request. What takes time is done in a task of its own. For `Close` it
/// returns the sender that is dropped when everything is released.
fn dispatch(actor: Rc<Actor>, request: Request) -> Option<watch::Sender<()>> {
    match request {
        Request::Acquire(request) => {
            let busy = actor.tasks.enter();
            drop(spawn_local(async move {
                acquire::acquire(actor, request).await;
                drop(busy);
            }));
        }
        Request::Release { lease, answer } => release::release_in_task(actor, lease, answer),
        Request::ReleasedIn { lease } => actor.read_after(lease.number),
        Request::Released { lease, notification } => {
            actor.lose(lease.number, Loss::Released);
            if let Some(notification) = notification {
                actor.worker.notify(notification);
            }
        }
        Request::Lost { lease } => actor.report_takeover(&lease),
        Request::HandedOn { until } => actor.over.no_later_than(until),
        Request::Locate { anew, answer } => {
            answer_in_task(answer, async move { actor.locate(anew).await });
        }
        Request::Settle { name, answer } => {
            answer_in_task(answer, async move { actor.settle(&name).await });
        }
        Request::Mark { lease, answer } => answer_in_task(answer, async move { actor.mark(lease).await }),
        Request::EnsureRow { name, kind, instead_of, answer } => {
            answer_in_task(answer, async move { actor.ensure_row(&name, kind, instead_of).await });
        }
        Request::Read { name, answer } => {
            answer_in_task(answer, async move { actor.read_row(&name).await });
        }
        Request::Info { name, answer } => {
            answer_in_task(answer, async move { actor.info(&name).await });
        }
        Request::List { page, prefix, answer } => {
            answer_in_task(answer, async move { actor.list(&page, prefix).await });
        }
        Request::ForceRelease { name, fencing_token, answer } => {
            answer_in_task(answer, async move { actor.force_release(&name, fencing_token).await });
        }
        Request::IsWanted { name, answer } => {
            answer_in_task(answer, async move { actor.is_wanted(&name).await });
        }
        Request::Migrate { answer } => answer_in_task(answer, async move { actor.migrate().await }),
        Request::Check { prunes, answer } => {
            answer_in_task(answer, async move { actor.check(prunes).await });
        }
        Request::Prune { scope, walk, answer } => {
            answer_in_task(answer, async move { actor.prune(&scope, walk).await });
        }
        Request::Ping(answer) => {
            let _caller_may_be_gone = answer.send(());
        }
        Request::Close { done } => return Some(done),
    }
    None
}

fn answer_in_task<T: 'static>(
    answer: AnswerSender<T>,
    work: impl Future<Output = Result<T, Error>> + 'static,
) {
    drop(spawn_local(async move {
        let _caller_may_be_gone = answer.send(work.await);
    }));
}

/// Ends all leases, and waits until they are released.
async fn close(actor: &Rc<Actor>) {
    actor.closing.send_replace(true);
    actor.queues.close();
    release::release_all(actor);
    // This includes guards that were dropped before, and leases that attempts may have got while
    // they were ending.
    let _in_time = timeout(FINISH_LIMIT, actor.tasks.wait_for_all()).await;
}
