//! How the program ends.

use std::process::ExitCode;

/// How the program ends. Errors of the database end it with 1, wrong arguments with 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Done,
    /// There is no such lock, or its present grant has another number.
    NoSuchLock,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Done => Self::SUCCESS,
            Exit::NoSuchLock => Self::from(3),
        }
    }
}

/// Says why the program failed.
pub(crate) fn failed(error: &anyhow::Error) -> ExitCode {
    eprintln!("lock-db: {error:#}");
    ExitCode::FAILURE
}
