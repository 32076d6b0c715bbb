//! Tables `distributed_lock` that can't keep locks, or only seem unable to: of another kind, with
//! hidden rows, without their index, with columns of other types, in another encoding, under
//! unusual settings, or with missing privileges. `check()` names what can't be used, nothing is
//! granted on such a table, and nothing is reported as held.

mod changed_in_use;
mod column_types;
mod encodings;
mod modes;
mod on_mysql;
mod on_postgres;
mod on_sqlite;
mod recreated;
mod requests;
mod rights;
mod rows_hidden;
mod sessions;
mod triggers;

lock_tests::cases! {
    in modules: changed_in_use, column_types, encodings, recreated, modes, on_mysql, on_postgres, on_sqlite, rights, rows_hidden, sessions, triggers
}
