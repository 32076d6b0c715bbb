//! The service: its route, and the same business with and without locks.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use lock_db::{Error, Locks, distributed_lock};
use serde_json::{Value, json};
use sqlx::{Pool, Transaction};
use tokio::net::TcpListener;
use tokio::time::sleep;

use crate::store::Store;

/// How often a transaction is run again after a deadlock, or because its snapshot was too old.
const LONGEST_STREAK: u32 = 5;

/// What keeps two orders apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protection {
    /// Nothing.
    None,
    /// A lock for each user and one for each segment of the stock.
    Locks { segments: u32 },
}

impl fmt::Display for Protection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => formatter.write_str("no lock"),
            Self::Locks { segments: 1 } => formatter.write_str("one lock"),
            Self::Locks { segments } => write!(formatter, "{segments} segments"),
        }
    }
}

struct Sale<DB: Store> {
    pool: Pool<DB>,
    locks: Locks<DB>,
    protection: Protection,
    work: Duration,
}

impl<DB: Store> Sale<DB> {
    /// Sells a voucher to the user, from any segment that has one left. Returns the segment.
    async fn order(&self, user_id: i64) -> Result<i64, SaleError> {
        let mut streak = 0;
        loop {
            let segment = self.promising_segment(user_id).await?;
            let ordered = match self.protection {
                Protection::None => self.order_without_locks(user_id, segment).await,
                Protection::Locks { .. } => self.order_in_transaction(user_id, segment).await,
            };
            match ordered {
                // Another request took the last voucher. The segment had one left before and is
                // never refilled, so this ends.
                Err(SaleError::SegmentIsEmpty) => {}
                Err(SaleError::Lock(Error::Deadlock { .. } | Error::Serialization { .. }))
                    if streak < LONGEST_STREAK =>
                {
                    streak += 1;
                }
                ordered => return ordered.map(|()| segment),
            }
        }
    }

    /// Reads without any lock. If a user has an order or a segment is empty, that stays true, so
    /// most requests without a chance end here. Everything else may change before the lock is
    /// acquired, and is read again under the lock.
    ///
    /// Users are spread over the segments that are not empty.
    async fn promising_segment(&self, user_id: i64) -> Result<i64, SaleError> {
        let mut connection = self.pool.acquire().await?;
        if DB::has_order(&mut connection, user_id).await? {
            return Err(SaleError::OrderedAlready);
        }
        let segments = DB::segments_with_stock(&mut connection).await?;
        let chosen = usize::try_from(user_id).ok().and_then(|user_id| user_id.checked_rem(segments.len()));
        chosen.and_then(|chosen| segments.get(chosen).copied()).ok_or(SaleError::SoldOut)
    }

    /// Right for one request at a time, wrong for two: both find that an order is allowed. A
    /// transaction around it would not change that.
    async fn order_without_locks(&self, user_id: i64, segment: i64) -> Result<(), SaleError> {
        let mut connection = self.pool.acquire().await?;
        if DB::has_order(&mut connection, user_id).await? {
            return Err(SaleError::OrderedAlready);
        }
        self.take_one(&mut connection, user_id, segment).await
    }

    /// One transaction on one connection holds both locks, the stock and the order. The commit
    /// frees the locks. An early return rolls the transaction back.
    async fn order_in_transaction(&self, user_id: i64, segment: i64) -> Result<(), SaleError> {
        let mut tx = self.pool.begin().await?;
        self.order_as_user(&mut tx, user_id, segment).await?;
        tx.commit().await?;
        Ok(())
    }

    /// One order per user: two clicks of the same user wait for each other.
    #[distributed_lock("lock-db-example:sale:user:{user_id}", mode = row, tx = tx, locks = self.locks)]
    async fn order_as_user(
        &self,
        tx: &mut Transaction<'_, DB>,
        user_id: i64,
        segment: i64,
    ) -> Result<(), SaleError> {
        if DB::has_order(tx, user_id).await? {
            return Err(SaleError::OrderedAlready);
        }
        self.order_from_segment(tx, user_id, segment).await
    }

    /// Never below zero: only one request at a time takes from a segment. This is always the second
    /// lock, so requests never wait for each other in a cycle.
    #[distributed_lock("lock-db-example:sale:stock:{segment}", mode = row, tx = tx, locks = self.locks)]
    async fn order_from_segment(
        &self,
        tx: &mut Transaction<'_, DB>,
        user_id: i64,
        segment: i64,
    ) -> Result<(), SaleError> {
        self.take_one(tx, user_id, segment).await
    }

    /// The business itself: reads whether a voucher is left, does the work of an order, and inserts
    /// the order. Wrong by itself: two of these at the same time see the same last voucher.
    async fn take_one(
        &self,
        connection: &mut DB::Connection,
        user_id: i64,
        segment: i64,
    ) -> Result<(), SaleError> {
        if DB::left_over(connection, segment).await? <= 0 {
            return Err(SaleError::SegmentIsEmpty);
        }
        if !self.work.is_zero() {
            sleep(self.work).await;
        }
        Ok(DB::take_one(connection, user_id, segment).await?)
    }
}

/// `POST /users/{id}/order`
async fn order<DB: Store>(
    State(sale): State<Arc<Sale<DB>>>,
    Path(user_id): Path<i64>,
) -> Result<(StatusCode, Json<Value>), SaleError> {
    let segment = sale.order(user_id).await?;
    Ok((StatusCode::CREATED, Json(json!({ "user": user_id, "segment": segment }))))
}

/// Serves until `stop` resolves. Then finishes the requests in progress and releases all locks.
pub(crate) async fn serve<DB: Store>(
    pool: Pool<DB>,
    protection: Protection,
    work: Duration,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    let locks = Locks::builder(pool.clone()).label("flash sale example").build();
    locks.check().await?;
    let sale = Sale { pool: pool.clone(), locks: locks.clone(), protection, work };
    let routes = Router::new().route("/users/{id}/order", post(order::<DB>)).with_state(Arc::new(sale));
    axum::serve(listener, routes).with_graceful_shutdown(stop).await.context("serving HTTP")?;
    locks.close().await;
    pool.close().await;
    Ok(())
}

/// Why there is no new order. The attribute only requires `From<lock_db::Error>`.
#[derive(Debug, thiserror::Error)]
enum SaleError {
    #[error("one order a user, and you have yours")]
    OrderedAlready,
    #[error("sold out")]
    SoldOut,
    #[error("this segment is empty")]
    SegmentIsEmpty,
    #[error(transparent)]
    Lock(#[from] Error),
    #[error("database: {0}")]
    Database(#[from] sqlx::Error),
}

impl IntoResponse for SaleError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::OrderedAlready => StatusCode::CONFLICT,
            Self::SoldOut | Self::SegmentIsEmpty => StatusCode::GONE,
            Self::Lock(error) if error.is_retryable() => {
                let later = [(header::RETRY_AFTER, "1")];
                return (StatusCode::SERVICE_UNAVAILABLE, later, format!("{self}\n")).into_response();
            }
            Self::Lock(_) | Self::Database(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, format!("{self}\n")).into_response()
    }
}
