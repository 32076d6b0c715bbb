//! What operators and administrators do: the table, accounts, settings, poolers, and the
//! specifics of each database.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod dirty_reads;
mod failed_notifications;
mod mysql_user_lock;
mod one_table;
mod online_ddl;
mod operate;
mod pgbouncer;
mod postgres_notify;
mod private_connections;
mod pruning;
mod schema;
mod server_settings;
mod sqlite;
mod unusual_tables;

use std::process::ExitCode;

fn main() -> ExitCode {
    lock_tests::run(
        [
            dirty_reads::cases(),
            failed_notifications::cases(),
            mysql_user_lock::cases(),
            one_table::cases(),
            online_ddl::cases(),
            operate::cases(),
            pgbouncer::cases(),
            postgres_notify::cases(),
            private_connections::cases(),
            pruning::cases(),
            schema::cases(),
            server_settings::cases(),
            sqlite::cases(),
            unusual_tables::cases(),
        ],
        [pgbouncer::roles(), sqlite::roles()],
    )
}
