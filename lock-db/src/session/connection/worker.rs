//! The loop of a connection worker, which owns the connection.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::{Connection as _, Pool};
use tokio::select;
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, sleep_until, timeout};

use super::batch::Batch;
use super::connector::{Connector, WaitsForHook};
use super::earlier::Earlier;
use super::flush::Flusher;
use super::groups::Groups;
use super::life::{CLOSE_LIMIT, DEAF_FOR, Link, Private, SILENCE};
use super::{OnRow, Operation, Reply, STATEMENT_LIMIT};
use crate::database::{Failure, Fault, Location, LockDatabase};
use crate::session::vitals::{Vitals, Which};
use crate::session::wakeup::notify::Notifications;

/// How many requests are taken from the queue at once.
const ROUND: usize = 256;

pub(super) struct WorkerLoop<DB: LockDatabase> {
    pub(super) connector: Connector<DB>,
    pub(super) connection: Option<Private<DB>>,
    pub(super) location: Arc<Location>,
    pub(super) answered: Rc<Cell<Option<Instant>>>,
    pub(super) notifications: Rc<Notifications>,
    pub(super) may_listen: bool,
    pub(super) deaf_until: Option<Instant>,
    /// How long recent answers took.
    pub(super) pace: Duration,
    pub(super) earlier: Earlier,
    pub(super) lost: Rc<Notify>,
    pub(super) vitals: Arc<Vitals>,
    /// Only of the first connection. The second one listens.
    pub(super) flusher: Option<Flusher>,
}

impl<DB: LockDatabase> WorkerLoop<DB> {
    pub(super) fn new(
        application: Pool<DB>,
        location: &Arc<Location>,
        answered: &Rc<Cell<Option<Instant>>>,
        notifications: &Rc<Notifications>,
        (lost, vitals): (&Rc<Notify>, &Arc<Vitals>),
        waits_for_hook: &WaitsForHook,
        flusher: Option<Flusher>,
    ) -> Self {
        Self {
            connector: Connector::new(application, location, waits_for_hook),
            connection: None,
            location: Arc::clone(location),
            answered: Rc::clone(answered),
            notifications: Rc::clone(notifications),
            may_listen: flusher.is_none(),
            deaf_until: None,
            pace: Duration::ZERO,
            earlier: Earlier::default(),
            lost: Rc::clone(lost),
            vitals: Arc::clone(vitals),
            flusher,
        }
    }

    pub(super) async fn serve(mut self, mut queue: mpsc::UnboundedReceiver<Operation>) {
        let mut round = Vec::with_capacity(ROUND);
        let which = if self.flusher.is_some() { Which::First } else { Which::Second };
        loop {
            self.vitals.set_open(which, self.connection.is_some());
            let rest = self.earlier.pause();
            let retires = self.retires_at();
            if retires.is_some_and(|at| at <= Instant::now()) {
                self.retire();
                continue;
            }
            select! {
                biased;
                count = queue.recv_many(&mut round, ROUND) => if count == 0 { break },
                () = self.notified() => continue,
                () = at(retires), if retires.is_some() => continue,
                () = sleep(rest.unwrap_or_default()), if rest.is_some() => {
                    // What an earlier session was doing could still be carried out, and there may
                    // be no other request that ends it.
                    if self.on_bare_connection(STATEMENT_LIMIT, SILENCE, async |_| Ok(())).await.is_err() {
                        self.earlier.remain();
                    }
                    continue;
                }
            }
            self.carry_out_round(round.drain(..)).await;
        }
        self.vitals.set_open(which, false);
        if let Some(Private { link: Link::Plain(connection), .. }) = self.connection {
            let _in_time = timeout(CLOSE_LIMIT, connection.close()).await;
        }
    }

    /// Sends what belongs together in one statement each, and the rest one by one.
    async fn carry_out_round(&mut self, round: impl Iterator<Item = Operation>) {
        let (mut batch, mut groups) = (Batch::default(), Groups::default());
        let (mut flushes, mut reads, mut others) = (Vec::new(), Vec::new(), Vec::new());
        let (mut creations, mut ensured) = (Vec::new(), Vec::new());
        for operation in round.filter(|operation| !operation.is_forgotten()) {
            match batch.take(operation) {
                Some(Operation::Flush(flush)) => flushes.push(flush),
                Some(Operation::OnRow(name, OnRow::Read(reply))) => reads.push((name, reply)),
                Some(Operation::OnRow(name, OnRow::Create(kind, reply))) => {
                    creations.push((name, kind, reply));
                }
                Some(Operation::OnRow(name, OnRow::Ensure(kind, reply))) => {
                    ensured.push((name, kind, reply));
                }
                other => others.extend(other.and_then(|other| groups.take(other))),
            }
        }
        self.flush(flushes).await;
        self.send_batch(batch).await;
        self.read(reads).await;
        self.create(creations).await;
        self.ensure(ensured).await;
        self.send_groups(groups).await;
        for operation in others {
            if !operation.is_forgotten() {
                self.carry_out(operation).await;
            }
        }
    }

    /// Listens on the connection that renews leases. That connection is never given up in order to
    /// listen.
    async fn listen(&mut self) -> Result<(), Failure> {
        if self.notifications.listener() != 0 {
            return Ok(());
        }
        if self.connection.is_none() {
            self.connection = Some(self.connect().await?);
        }
        if let Some(Private { link: Link::Listening(listening), .. }) = &mut self.connection {
            if DB::listen(listening, self.notifications.number()).await.map_err(Failure::new::<DB>)? {
                self.notifications.begin();
            } else {
                self.notifications.mark_unable();
            }
        }
        Ok(())
    }

    pub(super) async fn listen_in_time(&mut self, reply: Reply<()>) {
        let answer = match timeout(STATEMENT_LIMIT, self.listen()).await {
            Ok(listening) => listening,
            Err(_elapsed) => {
                self.deaf_until = Some(Instant::now() + DEAF_FOR);
                Err(Failure::no_answer::<DB>(STATEMENT_LIMIT))
            }
        };
        if matches!(answer, Err(Failure { fault: Fault::Disconnected, .. })) {
            self.give_up_connection();
            self.earlier.mark_given_up();
        }
        let _ = reply.send(answer);
    }
}

async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}
