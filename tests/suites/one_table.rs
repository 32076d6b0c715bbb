//! All statements of a `Locks` use the same table, whatever `search_path`, current database or
//! temporary tables the connections have. This also holds in the schema that the builder names, and
//! with a prefix before all names.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

/// In the folder of this name.
mod one_table {
    mod callers;
    mod other_databases;
    mod other_tables;
    mod place;
    mod pools;
    mod prefixes;
    mod schemas;
    mod temporary;
}
