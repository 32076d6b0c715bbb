//! Why a step of a driver failed.

use std::borrow::Cow;
use std::time::Duration;

use super::SchemaDriver;
use crate::database::Fault;

/// Why a step of a driver failed.
#[derive(Debug)]
pub enum StepError {
    /// sqlx or the server reported it.
    Sqlx(sqlx::Error),
    /// The same, after a change that may stay in effect: a caller that sees only the error can't
    /// know whether the change was made.
    OutcomeUnknown(sqlx::Error),
    /// The server did not answer in this time.
    Silent(Duration),
    /// lock-db found it: what it means for a lock, and text for people.
    Found(Fault, Cow<'static, str>),
    /// lock-db found what an error of sqlx comes from.
    Explained(Fault, String, sqlx::Error),
}

/// The result of a step.
pub(crate) type Result<T, E = StepError> = std::result::Result<T, E>;

impl StepError {
    /// What the error means for a lock.
    pub(crate) fn fault<DB: SchemaDriver>(&self) -> Fault {
        match self {
            Self::Sqlx(error) => DB::classify(error),
            Self::OutcomeUnknown(_) | Self::Silent(_) => Fault::Disconnected,
            Self::Found(fault, _) | Self::Explained(fault, ..) => *fault,
        }
    }

    /// The error follows a change that may stay in effect.
    pub(crate) fn outcome_unknown(error: impl Into<Self>) -> Self {
        match error.into() {
            Self::Sqlx(error) | Self::OutcomeUnknown(error) => Self::OutcomeUnknown(error),
            Self::Silent(limit) => Self::Silent(limit),
            Self::Found(_, text) => Self::Found(Fault::Disconnected, text),
            Self::Explained(_, text, error) => Self::Explained(Fault::Disconnected, text, error),
        }
    }

    /// The server refuses until a person changes something.
    pub(crate) fn refused(text: impl Into<Cow<'static, str>>) -> Self {
        Self::Found(Fault::Refused, text.into())
    }

    /// The connection can't be used for what lock-db needs. Another one may be.
    pub(crate) fn disconnected(text: impl Into<Cow<'static, str>>) -> Self {
        Self::Found(Fault::Disconnected, text.into())
    }
}

impl From<sqlx::Error> for StepError {
    fn from(error: sqlx::Error) -> Self {
        Self::Sqlx(error)
    }
}

/// Error codes are read from errors of sqlx.
impl<'e> From<&'e StepError> for Option<&'e sqlx::Error> {
    fn from(error: &'e StepError) -> Self {
        match error {
            StepError::Sqlx(error) | StepError::OutcomeUnknown(error) | StepError::Explained(_, _, error) => {
                Some(error)
            }
            StepError::Silent(_) | StepError::Found(..) => None,
        }
    }
}
