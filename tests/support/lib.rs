//! Support for the test suites: a separate database for each test on every kind of database, a
//! proxy that makes a network slow, silent or dead, and real processes that can be stopped and
//! killed.
//!
//! A suite is a module of a test binary in `tests/suites`. Its cases are written once, for any
//! [`TestDatabase`], and [`cases!`] registers them on each kind of database. The main function of the
//! test binary is [`run`].

#![allow(
    clippy::expect_used,
    clippy::missing_panics_doc,
    clippy::must_use_candidate,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs
)]

mod account;
mod at_end;
mod cases;
mod database;
mod eventually;
mod logs;
mod network;
mod output;
mod own_server;
mod pgbouncer;
mod port;
mod process;
mod proxy;
mod random;
mod runner;
mod servers;
mod sqlite;
mod wait_queue;

pub use account::account;
pub use at_end::AtEnd;
pub use cases::{Case, CaseRuntime, ignore, long_run, rounds, run_case, run_future};
pub use database::{Activity, Backend, TestDatabase, TestServer, connection, is_taken, migrated, pool};
pub use eventually::eventually;
pub use logs::{Line, logged, record_logs, warned};
pub use network::Network;
pub use output::note;
pub use own_server::OwnServer;
pub use pgbouncer::{PgBouncer, PoolMode};
pub use port::free_port;
pub use process::{Parent, Process, Role, say_to_parent};
pub use proxy::{Direction, Proxy};
pub use random::{Random, seed};
pub use runner::run;
pub use servers::{
    GaleraCluster, MariaDbKind, MariaDbServer, MySqlKind, MySqlServer, PostgresKind, PostgresServer, Server,
    ServerDialect, ServerKind,
};
pub use sqlite::SqliteFile;
pub use wait_queue::{LONGEST_QUEUE, MOST_QUEUED, Queued, foreign_entry, queue_of, set_queue};
