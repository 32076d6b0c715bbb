//! Support for the test suites: a separate database for each test on every kind of database, a
//! proxy that makes a network slow, silent or dead, and real processes that can be stopped and
//! killed.
//!
//! A suite is a file in `tests/suites`. Its cases are written once, for any [`TestDatabase`], and
//! [`for_each_database!`] turns each of them into a test on each kind of database.

#![allow(
    clippy::expect_used,
    clippy::missing_panics_doc,
    clippy::must_use_candidate,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs
)]

mod at_end;
mod cases;
mod database;
mod eventually;
mod logs;
mod network;
mod own_server;
mod pgbouncer;
mod port;
mod process;
mod proxy;
mod random;
mod servers;
mod sqlite;
mod wait_queue;

pub use at_end::AtEnd;
pub use cases::{CaseRuntime, long_run, rounds, run_case};
pub use database::{Activity, Backend, TestDatabase, TestServer, connection, is_taken, migrated, pool};
pub use eventually::eventually;
pub use logs::{Line, logged, record_logs, warned};
pub use network::Network;
pub use own_server::OwnServer;
pub use pgbouncer::{PgBouncer, PoolMode};
pub use port::free_port;
pub use process::{Parent, Process, RoleForAll, become_child, say_to_parent};
pub use proxy::{Direction, Proxy};
pub use random::{Random, seed};
pub use servers::{
    GaleraCluster, MariaDbKind, MariaDbServer, MySqlKind, MySqlServer, PostgresKind, PostgresServer, Server,
    ServerDialect, ServerKind,
};
pub use sqlite::SqliteFile;
pub use wait_queue::{LONGEST_QUEUE, MOST_QUEUED, Queued, foreign_entry, queue_of, set_queue};
