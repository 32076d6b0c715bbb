//! The requests of a round that are sent together.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::task::spawn_local;

use super::flush::Flusher;
use super::worker::WorkerLoop;
use super::{Acquired, OnRow, Operation, Reply, STATEMENT_LIMIT};
use crate::Kind;
use crate::database::{Claim, Failure, LeaseStatus, LockDatabase, LockRow, ReleaseClaim, Server, StepError};
use crate::name::Name;

/// A claim, whether it was sent, and the channel for its answer.
type Asked = (Claim, Rc<Cell<bool>>, Reply<Acquired>);

/// A request about the row of a name and its kind.
pub(super) type OnKind<T> = (Name, Kind, Reply<T>);

/// The requests of a round that go into one statement. Each name occurs once.
#[derive(Default)]
pub(super) struct Batch {
    releases: Vec<(ReleaseClaim, Reply<LeaseStatus>)>,
    claims: Vec<Asked>,
    names: HashSet<Name>,
}

impl Batch {
    /// Adds an operation to the batch, or returns it if it does not belong there.
    pub(super) fn take(&mut self, operation: Operation) -> Option<Operation> {
        match operation {
            Operation::Release(one, at_least, reply) => {
                // The name is also marked if the release is sent separately. Later requests for the
                // name then come after it.
                let is_first = self.names.insert(one.name.clone());
                if !is_first || !at_least.is_zero() {
                    return Some(Operation::Release(one, at_least, reply));
                }
                self.releases.push((one, reply));
                None
            }
            Operation::Acquire(mut claims, begun, reply)
                if claims.len() == 1 && self.names.insert(claims[0].name.clone()) =>
            {
                self.claims.extend(claims.pop().map(|claim| (claim, begun, reply)));
                None
            }
            other => Some(other),
        }
    }
}

impl<DB: LockDatabase> WorkerLoop<DB> {
    /// Sends the batch in one statement. If the database refuses it, the requests are sent one by
    /// one, so that only the faulty ones fail.
    pub(super) async fn send_batch(&mut self, batch: Batch) {
        let Batch { releases, claims, .. } = batch;
        if releases.len() + claims.len() > 1 {
            let flusher = self.flusher.as_ref().filter(|_| DB::FLUSHES && self.connection.is_some());
            let flusher =
                flusher.filter(|flusher| flusher.is_ready(claims.len(), self.earlier.current())).cloned();
            let released_now: Vec<ReleaseClaim> = releases.iter().map(|(one, _)| one.clone()).collect();
            let answer = self
                .on_connection(STATEMENT_LIMIT, async |connection, server| {
                    // Callers that left while the connection was made know that nothing was sent,
                    // and release nothing.
                    let stays = |(_, (_, _, reply)): &(usize, &Asked)| !reply.is_closed();
                    let (mut asked, mut claimed) = (Vec::new(), Vec::new());
                    for (number, (claim, begun, _)) in claims.iter().enumerate().filter(stays) {
                        begun.set(true);
                        asked.push(number);
                        claimed.push(claim.clone());
                    }
                    let sent = Instant::now();
                    let outcome =
                        DB::batch(connection, server, &released_now, &claimed, flusher.is_some()).await?;
                    Ok((outcome, asked, server.clone(), sent))
                })
                .await;
            match answer {
                Ok((outcome, asked, server, sent)) => {
                    for ((_, reply), status) in releases.into_iter().zip(outcome.releases) {
                        let _ = reply.send(Ok(status));
                    }
                    let mut granted = asked.into_iter().zip(outcome.grants).peekable();
                    let mut deferred = Vec::new();
                    for (number, (_, _, reply)) in claims.into_iter().enumerate() {
                        let grant =
                            granted.next_if(|(asked, _)| *asked == number).and_then(|(_, grant)| grant);
                        let answer = (grant.map(|grant| vec![grant]), server.clone(), sent);
                        if flusher.is_some() && grant.is_some() {
                            deferred.push((answer, reply));
                        } else {
                            let _ = reply.send(Ok(answer));
                        }
                    }
                    if let Some(flusher) = flusher.filter(|_| !deferred.is_empty()) {
                        // The session that has carried out the batch.
                        answer_when_durable::<DB>(flusher, self.earlier.current(), deferred);
                    }
                    self.notify(&outcome.notifications).await;
                    return;
                }
                // Sent one by one, all of them would fail the same way.
                Err(failure) if failure.is_the_same_for_all() => {
                    for (_, reply) in releases {
                        let _ = reply.send(Err(failure.clone()));
                    }
                    for (_, _, reply) in claims {
                        let _ = reply.send(Err(failure.clone()));
                    }
                    return;
                }
                Err(refused) => tracing::debug!(error = %refused, "one by one instead"),
            }
        }
        let releases =
            releases.into_iter().map(|(one, reply)| Operation::Release(one, Duration::ZERO, reply));
        let claims =
            claims.into_iter().map(|(claim, begun, reply)| Operation::Acquire(vec![claim], begun, reply));
        for operation in releases.chain(claims) {
            self.carry_out(operation).await;
        }
    }

    /// Creates all rows in one statement.
    pub(super) async fn create(&mut self, creations: Vec<OnKind<bool>>) {
        self.by_kind(creations, async |c, server, names, kind| match names {
            [name] => Ok(vec![DB::create(c, server, name, kind).await?]),
            names if DB::create_all(c, server, names, kind).await? => Ok(vec![true; names.len()]),
            // An open transaction has created one of the rows.
            _ => Ok(Vec::new()),
        })
        .await;
    }

    /// Reads all rows in one message, and creates those that are missing.
    pub(super) async fn ensure(&mut self, ensured: Vec<OnKind<Option<LockRow>>>) {
        self.by_kind(ensured, async |c, server, names, kind| DB::ensure_all(c, server, names, kind).await)
            .await;
    }

    /// Runs one statement for the names of each kind. If it fails because of one name, or has no
    /// answers, that name is found by bisection.
    async fn by_kind<T: Clone>(
        &mut self,
        mut requests: Vec<OnKind<T>>,
        mut statement: impl AsyncFnMut(&mut DB::Connection, &Server, &[Name], Kind) -> Result<Vec<T>, StepError>,
    ) {
        requests.sort_by(|(one, one_kind, _), (other, other_kind, _)| {
            (one_kind.as_str(), one).cmp(&(other_kind.as_str(), other))
        });
        let mut parts = Vec::new();
        while let Some((_, kind, _)) = requests.last() {
            let first = requests.partition_point(|(_, other, _)| other.as_str() < kind.as_str());
            parts.push(requests.split_off(first));
        }
        while let Some(mut part) = parts.pop() {
            let Some((_, kind, _)) = part.first() else { continue };
            let kind = *kind;
            let mut names: Vec<Name> = part.iter().map(|(name, ..)| name.clone()).collect();
            names.dedup();
            let answers = self
                .on_connection(STATEMENT_LIMIT, async |c, server| statement(c, server, &names, kind).await)
                .await;
            match answers {
                Ok(answers) if answers.len() == names.len() => {
                    let answers: HashMap<_, _> = names.into_iter().zip(answers).collect();
                    for (name, _, reply) in part {
                        if let Some(answer) = answers.get(&name) {
                            let _ = reply.send(Ok(answer.clone()));
                        }
                    }
                }
                Err(failure) if failure.is_the_same_for_all() || names.len() < 2 => {
                    for (.., reply) in part {
                        let _ = reply.send(Err(failure.clone()));
                    }
                }
                Ok(_) | Err(_) => {
                    let middle = names.get(names.len() / 2);
                    let second = part.split_off(part.partition_point(|(name, ..)| Some(name) < middle));
                    parts.extend([second, part]);
                }
            }
        }
    }

    /// Reads all rows in one statement. A process that waits for many names reads often.
    pub(super) async fn read(&mut self, mut reads: Vec<(Name, Reply<Option<LockRow>>)>) {
        if reads.len() < 2 {
            for (name, reply) in reads {
                self.on_row(&name, OnRow::Read(reply)).await;
            }
            return;
        }
        reads.sort_by(|(one, _), (other, _)| one.cmp(other));
        let mut names: Vec<Name> = reads.iter().map(|(name, _)| name.clone()).collect();
        names.dedup();
        let rows = self
            .on_connection(STATEMENT_LIMIT, async |c, server| DB::read_all(c, server, &names).await)
            .await;
        let rows = rows.map(|rows| names.iter().zip(rows).collect::<HashMap<_, _>>());
        for (name, reply) in reads {
            let row = match &rows {
                Ok(rows) => Ok(rows.get(&name).cloned().flatten()),
                Err(failure) => Err(failure.clone()),
            };
            let _ = reply.send(row);
        }
    }
}

/// Answers grants when they are durable. If they can't be made so, the callers ask again, and get
/// the same leases by their secrets.
fn answer_when_durable<DB: LockDatabase>(
    flusher: Flusher,
    session: Option<i64>,
    grants: Vec<(Acquired, Reply<Acquired>)>,
) {
    drop(spawn_local(async move {
        let flushed = match session {
            Some(session) => flusher.flush(session).await,
            None => Err(StepError::disconnected("the session of the grants is not known")),
        };
        let flushed = flushed.map_err(Failure::new::<DB>);
        for (answer, reply) in grants {
            let _ = reply.send(flushed.clone().map(|()| answer));
        }
    }));
}
