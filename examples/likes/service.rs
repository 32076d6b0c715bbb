//! The service: its routes, and the same business with no lock, an insert lock and a row lock.

use std::fmt;
use std::sync::Arc;

use anyhow::Context;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use lock_db::{Locks, distributed_lock};
use serde_json::{Value, json};
use sqlx::{Pool, Transaction};
use tokio::net::TcpListener;

use crate::store::Store;

/// What keeps two likes of one comment apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Protection {
    /// Nothing.
    None,
    /// A lease, held without a connection.
    Insert,
    /// A locked row, held by the transaction of the business.
    Row,
}

impl fmt::Display for Protection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::None => "no lock",
            Self::Insert => "insert lock",
            Self::Row => "row lock",
        })
    }
}

struct Likes<DB: Store> {
    pool: Pool<DB>,
    locks: Locks<DB>,
    protection: Protection,
}

impl<DB: Store> Likes<DB> {
    /// No lock: right for one request at a time, wrong for two.
    async fn like(&self, comment_id: i64) -> Result<i64, LikeError> {
        let mut connection = self.pool.acquire().await?;
        DB::add_like(&mut connection, comment_id).await?.ok_or(LikeError::NoSuchComment(comment_id))
    }

    /// Insert lock: only the attribute is new. A request waits for the lock without a connection.
    #[distributed_lock("lock-db-example:comment:{comment_id}:like", locks = self.locks)]
    async fn like_with_lease(&self, comment_id: i64) -> Result<i64, LikeError> {
        self.like(comment_id).await
    }

    /// Row lock: the transaction of the business holds it.
    async fn like_in_transaction(&self, comment_id: i64) -> Result<i64, LikeError> {
        let mut tx = self.pool.begin().await?;
        let like_count = self.like_with_row_lock(&mut tx, comment_id).await?;
        tx.commit().await?;
        Ok(like_count)
    }

    /// Taking the lock is the first statement of the transaction, so everything that is read after
    /// it is current. The commit frees the lock.
    #[distributed_lock("lock-db-example:comment:{comment_id}:row", mode = row, tx = tx, locks = self.locks)]
    async fn like_with_row_lock(
        &self,
        tx: &mut Transaction<'_, DB>,
        comment_id: i64,
    ) -> Result<i64, LikeError> {
        DB::add_like(tx, comment_id).await?.ok_or(LikeError::NoSuchComment(comment_id))
    }
}

/// `POST /comments/{id}/like`
async fn like<DB: Store>(
    State(likes): State<Arc<Likes<DB>>>,
    Path(comment_id): Path<i64>,
) -> Result<Json<Value>, LikeError> {
    let like_count = match likes.protection {
        Protection::None => likes.like(comment_id).await,
        Protection::Insert => likes.like_with_lease(comment_id).await,
        Protection::Row => likes.like_in_transaction(comment_id).await,
    }?;
    Ok(Json(json!({ "id": comment_id, "like_count": like_count })))
}

/// `GET /comments/{id}`
async fn show<DB: Store>(
    State(likes): State<Arc<Likes<DB>>>,
    Path(comment_id): Path<i64>,
) -> Result<Json<Value>, LikeError> {
    let mut connection = likes.pool.acquire().await?;
    let comment =
        DB::comment(&mut connection, comment_id).await?.ok_or(LikeError::NoSuchComment(comment_id))?;
    Ok(Json(json!({
        "id": comment_id,
        "like_count": comment.like_count,
        "rows_in_like_table": comment.likes,
    })))
}

/// Serves until `stop` resolves. Then finishes the requests in progress and releases all locks.
pub(crate) async fn serve<DB: Store>(
    pool: Pool<DB>,
    locks: Locks<DB>,
    protection: Protection,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    let likes = Likes { pool: pool.clone(), locks: locks.clone(), protection };
    let routes = Router::new()
        .route("/comments/{id}/like", post(like::<DB>))
        .route("/comments/{id}", get(show::<DB>))
        .with_state(Arc::new(likes));
    axum::serve(listener, routes).with_graceful_shutdown(stop).await.context("serving HTTP")?;
    locks.close().await;
    pool.close().await;
    Ok(())
}

/// Why there is no new like. The attribute only requires `From<lock_db::Error>`.
#[derive(Debug, thiserror::Error)]
enum LikeError {
    #[error("there is no comment {0}")]
    NoSuchComment(i64),
    #[error(transparent)]
    Lock(#[from] lock_db::Error),
    #[error("database: {0}")]
    Database(#[from] sqlx::Error),
}

impl IntoResponse for LikeError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::NoSuchComment(_) => StatusCode::NOT_FOUND,
            Self::Lock(error) if error.is_retryable() => {
                let later = [(header::RETRY_AFTER, "1")];
                return (StatusCode::SERVICE_UNAVAILABLE, later, format!("{self}\n")).into_response();
            }
            Self::Lock(_) | Self::Database(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, format!("{self}\n")).into_response()
    }
}
