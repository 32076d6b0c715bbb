//! Tables `distributed_lock` that can't keep locks, or only look as if they could not: of another kind, with rows that are
//! hidden, without their index, with columns of other types, in another encoding, under odd settings, with rights that are
//! missing. What can't be used is named by `check()`, nothing is granted on it, and nothing is called held.

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
