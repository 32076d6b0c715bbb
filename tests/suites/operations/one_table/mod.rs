//! All statements of a `Locks` use the same table, whatever `search_path`, current database or
//! temporary tables the connections have. This also holds in the schema that the builder names, and
//! with a prefix before all names.

mod callers;
mod elsewhere;
mod other_databases;
mod other_tables;
mod pools;
mod prefixes;
mod schemas;
mod temporary;

lock_tests::cases! {
    in modules: callers, other_databases, other_tables, pools, prefixes, schemas, temporary
}
