//! Requests of a round that take the same step on a row each. Every step is one statement for all of
//! them.

use std::collections::{HashMap, HashSet};

use super::worker::WorkerLoop;
use super::{OnRow, OnRows, Operation, Reply, STATEMENT_LIMIT, TOGETHER};
use crate::database::{Failure, LockDatabase, Notification, QueueChange, QueueEntry, Server, StepError};
use crate::name::Name;
use crate::secret::Secret;

/// The requests of a round, by the step that they take.
#[derive(Default)]
pub(super) struct Groups {
    enqueued: Vec<(Name, Reply<bool>)>,
    /// The same for all names of a process. The latest one tells which listener it has now.
    entry: Option<QueueEntry>,
    changes: Vec<(QueueChange, Reply<bool>)>,
    dequeued: Vec<(Name, Reply<()>)>,
    /// The same for all names of a process.
    secret: Option<Secret>,
    /// The names whose queues are written.
    written: HashSet<Name>,
    settled: Vec<(Name, Reply<()>)>,
    noticed: Vec<(Vec<Name>, Reply<u64>)>,
    notifications: Vec<Notification>,
}

impl Groups {
    /// Adds an operation to its group, or returns it if it does not belong to any. The second
    /// operation on the queue of a name is returned, so that it comes after the first.
    pub(super) fn take(&mut self, operation: Operation) -> Option<Operation> {
        match operation {
            Operation::OnRow(
                name,
                on_row @ (OnRow::Enqueue(..) | OnRow::SetWaiters(..) | OnRow::RemoveWaiter(..)),
            ) => {
                if !self.written.insert(name.clone()) {
                    return Some(Operation::OnRow(name, on_row));
                }
                match on_row {
                    OnRow::Enqueue(entry, reply) => {
                        self.entry = Some(entry);
                        self.enqueued.push((name, reply));
                    }
                    OnRow::SetWaiters(before, after, reply) => {
                        self.changes.push((QueueChange { name, before, after }, reply));
                    }
                    OnRow::RemoveWaiter(secret, reply) => {
                        self.secret = Some(secret);
                        self.dequeued.push((name, reply));
                    }
                    _ => {}
                }
            }
            Operation::OnRow(name, OnRow::Settle(reply)) => self.settled.push((name, reply)),
            Operation::OnRows(names, OnRows::GiveNotice(reply)) => self.noticed.push((names, reply)),
            Operation::Notification(notification) => self.notifications.push(notification),
            other => return Some(other),
        }
        None
    }
}

impl<DB: LockDatabase> WorkerLoop<DB> {
    pub(super) async fn send_groups(&mut self, groups: Groups) {
        let Groups { enqueued, entry, changes, dequeued, secret, settled, noticed, notifications, .. } =
            groups;
        self.notify(&notifications).await;
        if let Some(entry) = entry {
            let enqueue = async |c: &mut DB::Connection, server: &Server, names: &[Name]| {
                DB::enqueue(c, server, names, &entry).await
            };
            self.send_group(enqueued, enqueue).await;
        }
        self.send_group(changes, async |c: &mut DB::Connection, server: &Server, changes: &[QueueChange]| {
            DB::set_waiters(c, server, changes).await
        })
        .await;
        if let Some(secret) = secret {
            let dequeue = async |c: &mut DB::Connection, server: &Server, names: &[Name]| {
                DB::dequeue(c, server, names, &secret).await?;
                Ok(vec![(); names.len()])
            };
            self.send_group(dequeued, dequeue).await;
        }
        self.send_group(settled, async |c: &mut DB::Connection, server: &Server, names: &[Name]| {
            DB::settle(c, server, names).await?;
            Ok(vec![(); names.len()])
        })
        .await;
        let mut together = Vec::new();
        for (names, reply) in noticed {
            let sum: usize = together.iter().map(|(names, _): &(Vec<Name>, _)| names.len()).sum();
            if sum + names.len() > TOGETHER {
                self.give_notice(std::mem::take(&mut together)).await;
            }
            together.push((names, reply));
        }
        self.give_notice(together).await;
    }

    /// Gives notice for several callers. Some of them may ask for the same names.
    pub(super) async fn give_notice(&mut self, asked: Vec<(Vec<Name>, Reply<u64>)>) {
        let mut names: Vec<Name> = asked.iter().flat_map(|(names, _)| names).cloned().collect();
        if names.is_empty() {
            return;
        }
        names.sort_unstable();
        names.dedup();
        let given = self
            .on_connection(STATEMENT_LIMIT, async |c, server| DB::give_notice(c, server, &names).await)
            .await;
        match given {
            Err(failure) if asked.len() > 1 && !failure.is_the_same_for_all() => {
                tracing::debug!(error = %failure, "one by one instead");
                for one in asked {
                    Box::pin(self.give_notice(vec![one])).await;
                }
            }
            given => {
                let given = given.map(|given| names.iter().zip(given).collect::<HashMap<_, _>>());
                for (names, reply) in asked {
                    let count = |given: &HashMap<_, _>| {
                        names.iter().map(|name| u64::from(given.get(name).copied().unwrap_or(false))).sum()
                    };
                    let _ = reply.send(given.as_ref().map(count).map_err(Failure::clone));
                }
            }
        }
    }

    /// Takes one step for all of a group. If the database refuses it, the step is taken for each of
    /// them alone, so that only the faulty ones fail.
    async fn send_group<A, T: Clone>(
        &mut self,
        group: Vec<(A, Reply<T>)>,
        step: impl AsyncFn(&mut DB::Connection, &Server, &[A]) -> Result<Vec<T>, StepError>,
    ) {
        let (asked, replies): (Vec<A>, Vec<Reply<T>>) = group.into_iter().unzip();
        if asked.is_empty() {
            return;
        }
        let answer =
            self.on_connection(STATEMENT_LIMIT, async |c, server| step(c, server, &asked).await).await;
        match answer {
            Ok(results) => {
                for (reply, result) in replies.into_iter().zip(results) {
                    let _ = reply.send(Ok(result));
                }
            }
            Err(failure) if replies.len() == 1 || failure.is_the_same_for_all() => {
                for reply in replies {
                    let _ = reply.send(Err(failure.clone()));
                }
            }
            Err(refused) => {
                tracing::debug!(error = %refused, "one by one instead");
                for (one, reply) in asked.iter().zip(replies) {
                    let one = std::slice::from_ref(one);
                    let answer = self
                        .on_connection(STATEMENT_LIMIT, async |c, server| step(c, server, one).await)
                        .await;
                    if let Some(answer) = answer.map(|results| results.into_iter().next()).transpose() {
                        let _ = reply.send(answer);
                    }
                }
            }
        }
    }
}
