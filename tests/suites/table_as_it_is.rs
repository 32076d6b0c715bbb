//! Tables `distributed_lock` that can't keep locks, or only seem unable to: of another kind, with
//! hidden rows, without their index, with columns of other types, in another encoding, under
//! unusual settings, or with missing privileges. `check()` names what can't be used, nothing is
//! granted on such a table, and nothing is reported as held.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

/// In the folder of this name.
mod table_as_it_is {
    mod asking;
    mod changed_in_use;
    mod column_types;
    mod encodings;
    mod made_anew;
    mod modes;
    mod on_mysql;
    mod on_postgres;
    mod on_sqlite;
    mod rights;
    mod rows_hidden;
    mod sessions;
    mod triggers;
}
