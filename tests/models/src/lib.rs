//! The lease protocol of lock-db as a state machine that is small enough to be searched completely.
//!
//! The model has one name, one row and a few clients. A client can pause between any two steps for
//! any time, a message can take any time, and time passes in ticks without end: a state stores only
//! the time that is left, never the time that has passed. See [`Protocol`] for the bounds, and
//! [`Mutation`] for the protocol without one of its rules.

#![forbid(unsafe_code)]

mod actions;
mod database;
mod model;
mod state;

pub use actions::{Action, Lane, Step};
pub use model::{Mutation, Protocol, property};
pub use state::{
    Answer, Client, Phase, Request, Row, RowLock, Secret, Snapshot, State, Statement, Transaction,
    TransactionStage, Wrong,
};
