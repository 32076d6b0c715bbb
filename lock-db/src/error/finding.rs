//! What lock-db found itself, in the place of an error of sqlx.

use std::io;
use std::sync::Arc;

/// What lock-db found itself. The variants of [`Error`](super::Error) have a field for an error of
/// sqlx, and in these cases there is none. The message of the error has the same text, so
/// `Error::source` leaves it out.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Finding(String);

impl Finding {
    pub(crate) fn error(text: String) -> Arc<sqlx::Error> {
        Arc::new(sqlx::Error::Io(io::Error::other(Self(text))))
    }

    /// The error, unless it has been made by [`Finding::error`].
    pub(crate) fn unless_ours(source: &sqlx::Error) -> Option<&sqlx::Error> {
        if let sqlx::Error::Io(error) = source
            && let Some(inner) = error.get_ref()
            && inner.is::<Self>()
        {
            return None;
        }
        Some(source)
    }
}
