//! The lease protocol of lock-db as a state machine that is small enough to be searched completely.
//!
//! One name, one row, a few clients. A client can stand still between any two steps for any time, a message can take any
//! time, and time passes in ticks without end: no state counts what has passed, only what is left. See
//! [`Protocol`] for what is bounded, [`Mutation`] for what the protocol would be without one of its rules.

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
