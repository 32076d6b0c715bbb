//! A model of the session, on a database that is a map.

use super::*;

/// Each method is one step.
#[derive(Default)]
pub(super) struct Database {
    pub(super) rows: std::sync::Mutex<BTreeMap<Name, Row>>,
    pub(super) freed: Notify,
}

#[derive(Default)]
pub(super) struct Row {
    pub(super) holder: Option<Holder>,
    pub(super) fencing_token: i64,
}

pub(super) enum Holder {
    Lease(Secret),
    /// Granted to a caller that had already gone. It is released soon. Until then the next caller
    /// has to wait.
    Nobody(Secret),
    AnotherProcess,
}

impl Database {
    /// Returns the last fencing token of each grant, and how many tokens belong to it.
    pub(super) fn take(&self, claims: &[Claim]) -> Option<Vec<(i64, i64)>> {
        let mut rows = self.rows.lock().unwrap();
        for claim in claims {
            let row = rows.entry(claim.name.clone()).or_default();
            match &row.holder {
                None => {}
                Some(Holder::Lease(_)) => panic!("a permit was passed before the row was free"),
                Some(Holder::Nobody(_) | Holder::AnotherProcess) => return None,
            }
        }
        let grants = claims.iter().map(|claim| {
            let row = rows.get_mut(&claim.name).unwrap();
            let before = row.fencing_token;
            row.fencing_token += if before == 0 { 100 } else { 1 + i64::try_from(draw(6)).unwrap() };
            row.holder = Some(Holder::Lease(claim.secret.clone()));
            (row.fencing_token, row.fencing_token - before)
        });
        Some(grants.collect())
    }

    /// `false`: the row had another holder.
    pub(super) fn free(&self, name: &Name, secret: &Secret) -> bool {
        let mut rows = self.rows.lock().unwrap();
        let Some(row) = rows.get_mut(name) else { return false };
        let is_ours = match &row.holder {
            Some(Holder::Lease(holder) | Holder::Nobody(holder)) => holder == secret,
            Some(Holder::AnotherProcess) | None => false,
        };
        if is_ours {
            row.holder = None;
            self.freed.notify_waiters();
        }
        is_ours
    }

    /// The caller does not learn of the grant.
    pub(super) fn abandon(&self, name: &Name, secret: &Secret) {
        let mut rows = self.rows.lock().unwrap();
        if let Some(Row { holder: Some(holder), .. }) = rows.get_mut(name)
            && matches!(holder, Holder::Lease(it) if it == secret)
        {
            *holder = Holder::Nobody(secret.clone());
        }
    }

    pub(super) fn is_taken_over(&self, name: &Name) {
        let mut rows = self.rows.lock().unwrap();
        let row = rows.get_mut(name).unwrap();
        row.holder = Some(Holder::AnotherProcess);
        row.fencing_token += 1;
    }

    pub(super) fn is_free_again(&self, name: &Name) {
        self.rows.lock().unwrap().get_mut(name).unwrap().holder = None;
        self.freed.notify_waiters();
    }
}

// Session

/// See `actor::Actor`.
pub(super) struct Actor {
    pub(super) database: Arc<Database>,
    pub(super) holders: Arc<Holders>,
    pub(super) queues: Arc<LocalQueues>,
    pub(super) requests: mpsc::WeakUnboundedSender<Request>,
    pub(super) leases: RefCell<BTreeMap<u64, Held>>,
    pub(super) last_number: Cell<u64>,
    pub(super) closing: watch::Sender<bool>,
    /// Leases whose holders have reported that they are done.
    pub(super) released_now: RefCell<BTreeSet<u64>>,
    /// Tasks to be started.
    pub(super) spawned: RefCell<Vec<LocalBoxFuture<'static, ()>>>,
    pub(super) plan: &'static Plan,
}

pub(super) struct Held {
    pub(super) state: Arc<LeaseState>,
    pub(super) lost: watch::Sender<Option<Loss>>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.state.pass_permit();
    }
}

impl Actor {
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.spawned.borrow_mut().push(task.boxed_local());
    }

    pub(super) async fn closed(&self) {
        let mut closing = self.closing.subscribe();
        let _ = closing.wait_for(|closing| *closing).await;
    }

    pub(super) fn register(
        &self,
        claim: &Claim,
        (fencing_token, tokens): (i64, i64),
        permit: Permit,
    ) -> Option<LeaseHandle> {
        let requests = self.requests.upgrade()?;
        let hand_off = self.queues.hand_off();
        let may_hand_on = tokens != fencing_token && self.queues.has_waiters(&claim.name);
        let most = if may_hand_on { hand_off.most_holders() } else { 1 };
        let tokens = u32::try_from(tokens).unwrap().clamp(1, most);
        let holders = if self.plan.others_wait { tokens.min(hand_off.holders) } else { tokens };
        let number = self.last_number.get() + 1;
        self.last_number.set(number);
        let key = LeaseKey {
            row: RowKey { name: claim.name.clone(), id: 1 },
            secret: claim.secret.clone(),
            fencing_token,
            mark: 0,
            ttl: claim.ttl,
            server: Server::for_tests(),
        };
        let (state, lost) = LeaseState::new(
            number,
            key,
            (tokens, holders),
            claim.ttl,
            None,
            Instant::now() + claim.ttl,
            Some(permit),
        );
        self.holders.may_have(&state, tokens, holders);
        self.leases.borrow_mut().insert(number, Held { state: Arc::clone(&state), lost });
        self.queues.set_lease(&state);
        Some(LeaseHandle::new(state, requests, Arc::clone(&self.queues)))
    }

    pub(super) fn is_given_back(&self, lease: &LeaseState) {
        assert!(self.released_now.borrow_mut().insert(lease.number), "a lease was given back twice");
    }

    pub(super) fn lose(&self, number: u64, loss: Loss) {
        let lost = self.leases.borrow_mut().remove(&number);
        if let Some(held) = lost {
            if loss == Loss::Released {
                held.state.pass_permit();
            }
            held.lost.send_replace(Some(loss));
        }
    }

    /// Another process takes a lease over, and releases it soon after.
    pub(super) async fn takes_over(self: Rc<Self>) {
        for _ in 0..draw(30) {
            shuttle::future::yield_now().await;
        }
        let nth = draw(self.leases.borrow().len().max(1));
        let lease = self.leases.borrow().values().nth(nth).map(|held| Arc::clone(&held.state));
        if let Some(lease) = lease {
            let name = &lease.key.row.name;
            self.database.is_taken_over(name);
            self.lose(lease.number, Loss::TakenOver);
            pause().await;
            self.database.is_free_again(name);
        }
    }
}

/// See `thread::serve`.
pub(super) async fn serve(actor: Rc<Actor>, mut requests: mpsc::UnboundedReceiver<Request>) {
    while let Some(request) = requests.recv().await {
        let on = Rc::clone(&actor);
        match request {
            Request::Acquire(request) => actor.spawn(acquire(on, request)),
            Request::Release { lease, answer } => {
                actor.is_given_back(&lease);
                actor.spawn(async move {
                    let released = release(&on, &lease).await;
                    let _caller_has_gone = answer.map(|answer| answer.send(released));
                });
            }
            Request::Released { lease, .. } => {
                actor.is_given_back(&lease);
                actor.lose(lease.number, Loss::Released);
            }
            Request::Close { done } => {
                actor.closing.send_replace(true);
                actor.queues.close();
                let held: Vec<_> =
                    actor.leases.borrow().values().map(|held| Arc::clone(&held.state)).collect();
                for lease in held {
                    actor.lose(lease.number, Loss::Closed);
                    actor.database.free(&lease.key.row.name, &lease.key.secret);
                }
                pause().await;
                drop(done);
                break;
            }
            _ => {}
        }
    }
    actor.closing.send_replace(true);
}

/// Does one thing at a time, until no sender is left and no task is running.
pub(super) async fn run_session(actor: Rc<Actor>, requests: mpsc::UnboundedReceiver<Request>) {
    actor.spawn(serve(Rc::clone(&actor), requests));
    for _ in 0..actor.plan.losses {
        actor.spawn(Rc::clone(&actor).takes_over());
    }
    let mut watching = pin!(actor.queues.watch_waits());
    let mut tasks = FuturesUnordered::new();
    std::future::poll_fn(|context| {
        loop {
            tasks.extend(actor.spawned.take());
            let _never_ready = watching.as_mut().poll(context);
            match tasks.poll_next_unpin(context) {
                Poll::Pending if actor.spawned.borrow().is_empty() => return Poll::Pending,
                Poll::Ready(None) if actor.spawned.borrow().is_empty() => return Poll::Ready(()),
                _ => {}
            }
        }
    })
    .await;
    assert!(actor.leases.borrow().is_empty(), "a lease is left over");
}

/// See `acquire::acquire`.
pub(super) async fn acquire(actor: Rc<Actor>, mut request: Acquire) {
    let result = {
        let claims = std::mem::take(&mut request.claims);
        let permits = std::mem::take(&mut request.permits);
        let mut attempt = Attempt { actor: Rc::clone(&actor), claims, permits, unsettled: Cell::new(false) };
        select! {
            biased;
            () = request.answer.closed() => return,
            () = actor.closed() => Err(Error::Closed),
            result = attempt.run(request.wait) => result,
        }
    };
    let _ = request.answer.send(result);
}

pub(super) struct Attempt {
    pub(super) actor: Rc<Actor>,
    pub(super) claims: Vec<Claim>,
    pub(super) permits: Vec<Permit>,
    pub(super) unsettled: Cell<bool>,
}

impl Attempt {
    pub(super) async fn run(&mut self, wait: Wait) -> Result<Option<Vec<LeaseHandle>>, Error> {
        assert_eq!(self.claims.len(), self.permits.len());
        loop {
            let actor = Rc::clone(&self.actor);
            let mut freed = pin!(actor.database.freed.notified());
            freed.as_mut().enable();
            self.unsettled.set(true);
            pause().await;
            let grants = self.actor.database.take(&self.claims);
            pause().await;
            if let Some(grants) = grants {
                let permits = std::mem::take(&mut self.permits);
                let granted = self.claims.iter().zip(grants).zip(permits);
                let handles: Option<Vec<LeaseHandle>> = granted
                    .map(|((claim, grant), permit)| self.actor.register(claim, grant, permit))
                    .collect();
                self.unsettled.set(handles.is_none());
                return handles.map(Some).ok_or(Error::Closed);
            }
            self.unsettled.set(false);
            for claim in &self.claims {
                actor.queues.learn(&claim.name, Front::IsHeldElsewhere(None));
            }
            match wait {
                Wait::Try => return Ok(None),
                Wait::Within(OVER) => return Err(timed_out()),
                Wait::Within(_) => freed.await,
            }
        }
    }
}

/// The failure for callers that wait behind others when the database does not answer.
pub(super) fn no_answer(_waited: Duration) -> Failure {
    Failure::for_tests()
}

pub(super) fn timed_out() -> Error {
    let (name, waited) = (String::new(), OVER);
    Error::Timeout { name, waited, waiting_for: WaitingFor::Lock, held_by: None }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if self.unsettled.get() {
            for Claim { name, secret, .. } in self.claims.clone() {
                let actor = Rc::clone(&self.actor);
                actor.database.abandon(&name, &secret);
                let on = Rc::clone(&actor);
                actor.spawn(async move {
                    pause().await;
                    on.database.free(&name, &secret);
                });
            }
        }
    }
}

/// See `release::release`.
pub(super) async fn release(actor: &Rc<Actor>, lease: &LeaseState) -> Result<(), Error> {
    let loss = lease.loss();
    let held = actor.leases.borrow_mut().remove(&lease.number);
    pause().await;
    let was_ours = actor.database.free(&lease.key.row.name, &lease.key.secret);
    pause().await;
    drop(held);
    match loss {
        None => assert!(was_ours, "a lease was released twice"),
        Some(Loss::Released) => {}
        Some(reason) => return Err(Error::lost(lease.name().given(), reason)),
    }
    Ok(())
}
