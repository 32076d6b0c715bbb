//! The state of the model at one moment.

/// Identifies a grant: a client and the number of its acquisition. Represents the 128 random bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Secret {
    /// The client that made it.
    pub client: u8,
    /// The number of the client's acquisition.
    pub acquisition: u8,
}

/// The lock's row, as every transaction sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Row {
    /// The secret of the last grant. It stays when the lease is released.
    pub secret: Option<Secret>,
    /// The fencing token of the last grant.
    pub token: u8,
    /// In ticks of the database's clock. Zero: free.
    pub expires_in: u8,
    /// Whether the deadline is 1970, from where no renewal brings the lease back.
    pub released: bool,
    /// Whether its holder was given notice since the last renewal.
    pub noticed: bool,
    /// Whether no transaction of the last holder can commit any more, and the row says so.
    pub settled: bool,
    /// The lock of a guarded transaction on the row.
    pub lock: Option<RowLock>,
    /// Whether a transaction without knowledge of leases has it locked.
    pub foreign_lock: bool,
}

impl Row {
    /// A row that is free and was never held.
    #[must_use]
    pub fn new() -> Self {
        Self {
            secret: None,
            token: 0,
            expires_in: 0,
            released: true,
            noticed: false,
            settled: true,
            lock: None,
            foreign_lock: false,
        }
    }

    /// Whether any client may take it.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.expires_in == 0 && (self.released || self.noticed)
    }

    /// Whether a transaction has it locked.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.lock.is_some() || self.foreign_lock
    }
}

impl Default for Row {
    fn default() -> Self {
        Self::new()
    }
}

/// What a transaction in REPEATABLE READ has seen, and will see.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Snapshot {
    /// The token in the row, if the row was settled.
    pub settled: Option<u8>,
    /// The token in the row, settled or not.
    pub token: Option<u8>,
    /// Whether a holder has committed anything since.
    pub is_old: bool,
}

/// A lock on the row, until the end of a transaction.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowLock {
    /// The client whose transaction it is.
    pub client: u8,
    /// A release that is not committed yet. Otherwise a guard, which does not block renewals.
    pub releases: bool,
}

/// What a statement on a private connection requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Request {
    /// The conditional update.
    Acquire,
    /// By secret. Never renews a released row.
    Renew,
    /// By secret.
    Release,
}

/// The answer of the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Answer {
    /// With the fencing token.
    Granted(u8),
    /// Another client has it.
    Refused,
    /// Renewed, or released.
    Ours,
    /// Locked by a transaction at the moment. Whether notice was given is unknown.
    Busy,
    /// The same, and the holder was given no notice.
    BusyUnchallenged,
    /// The row has another secret, or is released.
    NotOurs,
}

/// A statement whose answer a client waits for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Statement {
    /// What it requests.
    pub request: Request,
    /// The client's acquisition that it is for.
    pub acquisition: u8,
    /// Ticks of the client's clock since just before it was sent.
    pub age: u8,
    /// Whether the present doubt already existed when it was sent.
    pub after_doubt: bool,
    /// Set when the statement was executed. The answer is then on its way.
    pub answer: Option<Answer>,
    /// Whether what the statement has done would survive a crash of the server. A grant is heard
    /// only then.
    pub durable: bool,
}

/// What a client is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Nothing.
    Idle,
    /// It wants the lock.
    Acquiring,
    /// It was granted the lock, and has not released it. It may have lost it.
    Holding,
    /// It releases what it has, or may have.
    Releasing,
}

/// The progress of a guarded transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TransactionStage {
    /// Begun.
    Open,
    /// The guard has found that the lease is ours, and COMMIT comes next.
    Guarded,
    /// A statement that releases with the commit is on its way.
    ReleaseSent,
    /// That statement was executed, but not answered: `commit_and_release` continues with COMMIT.
    ReleaseDone,
    /// The statement was answered: with `release_in`, the caller decides on COMMIT or ROLLBACK.
    ReleaseAnswered,
    /// COMMIT was executed, and its answer is on its way.
    Released,
}

/// A guarded transaction.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Transaction {
    /// Its progress.
    pub stage: TransactionStage,
    /// The client's acquisition under which it runs.
    pub acquisition: u8,
    /// The fencing token of that acquisition, in the row.
    pub token: u8,
    /// The number of the holder that began it.
    pub hand: u8,
    /// The number among the client's transactions.
    pub number: u8,
}

/// A process.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Client {
    /// What it is doing.
    pub phase: Phase,
    /// How many acquisitions it has begun.
    pub acquisition: u8,
    /// Whether the outcome of an attempt is unknown.
    pub unsettled: bool,
    /// The token in the row of the lease that it holds.
    pub token: u8,
    /// How many times the lease was handed on. Each time the holder's own fencing token grows,
    /// within the token range of the grant.
    pub hand: u8,
    /// Whether a transaction of the lease may still commit, as far as the client knows.
    pub commit_is_open: bool,
    /// Ticks of its own clock until its deadline.
    pub left: u8,
    /// Whether its clock has missed a tick during this lease.
    pub late_clock: bool,
    /// Whether a transaction may have released the lease.
    pub doubt: bool,
    /// The statement on the connection for callers.
    pub lane: Option<Statement>,
    /// The statement on the watchdog's connection.
    pub renewal: Option<Statement>,
    /// A transaction on a connection of the application.
    pub transaction: Option<Transaction>,
    /// How many transactions it has begun.
    pub transactions: u8,
    /// The last of them that was committed.
    pub last_committed: u8,
}

impl Client {
    /// `Lease::is_held`.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.phase == Phase::Holding && self.left > 0 && !self.doubt
    }

    /// Whether nothing of it is in progress.
    #[must_use]
    pub fn is_at_rest(&self) -> bool {
        self.phase == Phase::Idle
            && self.lane.is_none()
            && self.renewal.is_none()
            && self.transaction.is_none()
    }
}

/// Everything that refers to a client: the row's secret, now and on disk, its lock, late requests and
/// late commits.
type References = ([Option<u8>; 2], bool, Vec<(u8, Request)>, Vec<Transaction>);

/// What must never have happened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Wrong {
    /// A grant while the previous lease was neither over nor released.
    pub two_leases: bool,
    /// A grant with a token that is not larger than all earlier ones.
    pub token_did_not_grow: bool,
    /// A commit after a newer grant.
    pub late_commit: bool,
    /// A commit after the commit of a later transaction of the same client.
    pub overtaken_commit: bool,
    /// A renewal or a release that changed another client's row.
    pub touched_another: bool,
    /// An attempt that the client's own earlier grant prevented.
    pub refused_by_itself: bool,
    /// A transaction that works under the lock, and may have read something before the last
    /// holder's commit.
    pub old_snapshot: bool,
}

/// The complete state at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct State {
    /// `None` before the first acquire, and after the row was deleted.
    pub row: Option<Row>,
    /// What a crash would leave of it, as long as one is possible.
    pub disk: Option<Row>,
    /// How many times the server has crashed.
    pub crashes: u8,
    /// The clients, which are all alike.
    pub clients: Vec<Client>,
    /// Requests whose sender has given up the connection. The server may execute them at any time.
    /// Sorted.
    pub late: Vec<(Secret, Request)>,
    /// The same for guards and commits. Sorted.
    pub late_commits: Vec<(Secret, Transaction)>,
    /// How many messages were lost.
    pub losses: u8,
    /// How many times the row was deleted.
    pub cleanings: u8,
    /// How many times a transaction without knowledge of leases has locked the row.
    pub foreign_locks: u8,
    /// The snapshot of a transaction that is to take the lock itself.
    pub snapshot: Option<Snapshot>,
    /// How many such transactions there were.
    pub snapshots: u8,
    /// Whether one of them got the lock.
    pub snapshot_was_good: bool,
    /// The largest token that was ever granted.
    pub greatest_token: u8,
    /// The same without the grants that a crash has undone.
    pub latest_token: u8,
    /// How many times the lease with that token was handed on.
    pub greatest_hand: u8,
    /// For properties only.
    pub wrong: Wrong,
}

impl State {
    pub(crate) fn new(clients: usize) -> Self {
        let client = Client {
            phase: Phase::Idle,
            acquisition: 0,
            unsettled: false,
            token: 0,
            hand: 0,
            commit_is_open: false,
            left: 0,
            late_clock: false,
            doubt: false,
            lane: None,
            renewal: None,
            transaction: None,
            transactions: 0,
            last_committed: 0,
        };
        Self {
            row: None,
            disk: None,
            crashes: 0,
            clients: vec![client; clients],
            late: Vec::new(),
            late_commits: Vec::new(),
            losses: 0,
            cleanings: 0,
            foreign_locks: 0,
            snapshot: None,
            snapshots: 0,
            snapshot_was_good: false,
            greatest_token: 0,
            latest_token: 0,
            greatest_hand: 0,
            wrong: Wrong::default(),
        }
    }

    /// The same state with the clients in canonical order, so that states that differ only in the
    /// order of clients become equal.
    #[must_use]
    pub fn with_clients_in_order(&self) -> Self {
        let mut order: Vec<usize> = (0..self.clients.len()).collect();
        // Includes what refers to a client. Otherwise equal clients could be distinguished.
        order.sort_by_cached_key(|&index| (self.clients[index].clone(), self.references(index)));
        let mut place = vec![0_u8; order.len()];
        for (new, &old) in (0_u8..).zip(&order) {
            place[old] = new;
        }
        let mut sorted = self.clone();
        sorted.clients = order.iter().map(|&old| self.clients[old].clone()).collect();
        let moved = |client: u8| place[usize::from(client)];
        for row in [&mut sorted.row, &mut sorted.disk].into_iter().flatten() {
            if let Some(secret) = &mut row.secret {
                secret.client = moved(secret.client);
            }
            if let Some(lock) = &mut row.lock {
                lock.client = moved(lock.client);
            }
        }
        for (secret, _) in &mut sorted.late {
            secret.client = moved(secret.client);
        }
        sorted.late.sort_unstable();
        for (secret, _) in &mut sorted.late_commits {
            secret.client = moved(secret.client);
        }
        sorted.late_commits.sort_unstable();
        sorted
    }

    /// The same state with the smallest possible tokens. Only their order matters, and the search
    /// must be finite.
    pub(crate) fn with_small_tokens(mut self) -> Self {
        let mut tokens = vec![0];
        self.each_token(|token| tokens.push(*token));
        tokens.sort_unstable();
        tokens.dedup();
        let rank =
            |token: u8| (0_u8..).zip(&tokens).find_map(|(rank, known)| (*known == token).then_some(rank));
        self.each_token(|token| *token = rank(*token).unwrap_or(*token));
        self
    }

    fn each_token(&mut self, mut with: impl FnMut(&mut u8)) {
        with(&mut self.greatest_token);
        with(&mut self.latest_token);
        for row in [&mut self.row, &mut self.disk].into_iter().flatten() {
            with(&mut row.token);
        }
        if let Some(snapshot) = &mut self.snapshot {
            snapshot.settled.iter_mut().chain(&mut snapshot.token).for_each(&mut with);
        }
        for client in &mut self.clients {
            with(&mut client.token);
            if let Some(Answer::Granted(token)) = client.lane.as_mut().and_then(|lane| lane.answer.as_mut()) {
                with(token);
            }
            if let Some(transaction) = &mut client.transaction {
                with(&mut transaction.token);
            }
        }
        for (_, transaction) in &mut self.late_commits {
            with(&mut transaction.token);
        }
    }

    fn references(&self, index: usize) -> References {
        let is_it = |client: u8| usize::from(client) == index;
        let row = self.row.as_ref();
        let secret = |row: Option<&Row>| {
            let secret = row.and_then(|row| row.secret).filter(|secret| is_it(secret.client));
            secret.map(|secret| secret.acquisition)
        };
        let locked = row.and_then(|row| row.lock.as_ref()).is_some_and(|lock| is_it(lock.client));
        let late = self.late.iter().filter(|(secret, _)| is_it(secret.client));
        (
            [secret(row), secret(self.disk.as_ref())],
            locked,
            late.map(|(secret, request)| (secret.acquisition, *request)).collect(),
            self.late_commits
                .iter()
                .filter(|(secret, _)| is_it(secret.client))
                .map(|(_, transaction)| transaction.clone())
                .collect(),
        )
    }
}
