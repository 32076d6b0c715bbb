//! Gets a connection of the pool and begins the transaction of row locks on it.

use sqlx::pool::PoolConnection;
use tokio::select;

use super::locked_rows::Permits;
use super::own_transaction::{RowsSender, TransactionRequest};
use crate::Error;
use crate::clock::{sleep, timeout};
use crate::connecting::{PATIENCE, is_lent_out, refusal};
use crate::database::{Failure, Fault, LockDatabase};
use crate::error::Action;
use crate::keyed_queue::Known;
use crate::managed_tx::ManagedTransaction;
use crate::options::FIRST_ANSWER;
use crate::runtime::{self, Runtime};

/// The reason why there is no transaction.
pub(super) enum NotBegun {
    Failure(Failure),
    /// The connection was dead before anything was done on it.
    Dead(Failure),
    Error(Error),
}

/// Waits for a connection no longer than the caller does. `None`: the caller is gone.
pub(super) async fn connect<DB: LockDatabase>(
    request: &TransactionRequest<DB>,
    permits: &Permits,
    answer: &mut RowsSender<DB>,
) -> Result<Option<PoolConnection<DB>>, NotBegun> {
    let mut found_out = false;
    let connected = select! {
        biased;
        () = answer.closed() => return Ok(None),
        connected = timeout(request.step_limit(), request.context.pool().acquire()) => connected,
        error = find_out_why(request, permits, &mut found_out) => Ok(Err(error)),
    };
    match connected {
        Ok(Ok(connection)) => {
            if found_out {
                permits.iter().for_each(|permit| permit.learn(Known::Nothing));
            }
            Ok(Some(connection))
        }
        Err(_) | Ok(Err(sqlx::Error::PoolTimedOut)) => Err(NotBegun::Error(request.give_up().await)),
        Ok(Err(error)) => Err(NotBegun::Failure(Failure::new::<DB>(error))),
    }
}

/// Finds out why the pool provides no connection. A pool whose connections are all in use looks
/// like one that can't open any, so the session is asked whether the database answers. Resolves
/// when the database refuses.
async fn find_out_why<DB: LockDatabase>(
    request: &TransactionRequest<DB>,
    permits: &Permits,
    found_out: &mut bool,
) -> sqlx::Error {
    let pool = request.context.pool();
    let mut pause = PATIENCE;
    if is_lent_out(pool)
        && let Some(left) = request.left()
    {
        pause = pause.min(left / 2);
    }
    loop {
        sleep(pause).await;
        if !is_lent_out(pool) {
            return refusal(pool).await;
        }
        let read = request.current().read().await;
        *found_out = true;
        let failure = read.err().and_then(|error| Failure::of_error::<DB>(&error));
        let known = failure.map_or(Known::NoConnection, Known::Failure);
        permits.iter().for_each(|permit| permit.learn(known.clone()));
        pause = FIRST_ANSWER;
    }
}

pub(super) async fn begin<DB: LockDatabase>(
    request: &TransactionRequest<DB>,
    connection: PoolConnection<DB>,
    runtime: &Runtime,
) -> Result<ManagedTransaction<DB, Permits>, NotBegun> {
    let begun = runtime.spawn(ManagedTransaction::begin(connection, DB::BEGIN_WITH_ROW, runtime.clone()));
    let limit = request.step_limit();
    match timeout(limit, begun).await {
        Ok(Ok(Ok(transaction))) => Ok(transaction),
        Ok(Ok(Err(error))) => {
            let failure = Failure::new::<DB>(error);
            let is_dead = failure.fault == Fault::Disconnected && !failure.is_silence();
            Err(if is_dead { NotBegun::Dead(failure) } else { NotBegun::Failure(failure) })
        }
        Ok(Err(_runtime_shut_down)) => {
            Err(NotBegun::Error(runtime::ended(Action::BeginTransaction, request.current().name)))
        }
        Err(_elapsed) => Err(NotBegun::Failure(Failure::no_answer::<DB>(limit))),
    }
}
