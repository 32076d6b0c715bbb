//! The server behind a connection, and the full name of its table.

#[cfg(any(feature = "postgres", feature = "mysql"))]
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sqlx::AssertSqlSafe;

/// What a connection found out about its server, once before its first use.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "facts that have nothing to do with each other")]
pub struct Server {
    pub table: Arc<Table>,
    pub cluster: Cluster,
    /// Whether it is MariaDB, which has its own statements.
    pub is_mariadb: bool,
    /// Whether an insert in autocommit locks the counter of its table until a binary log is on
    /// disk.
    pub keeps_counter: bool,
    /// How many bytes of data fit into one message, with room for the statement itself.
    pub longest_message: usize,
    /// Whether an owner outside of ASCII can't be stored, because of the encoding of the database
    /// or the character set of the column.
    pub is_ascii_only: bool,
    /// Whether the application's connections keep statements prepared. If not, sqlx leaves every
    /// named statement open on a PostgreSQL server.
    pub keeps_statements: bool,
}

#[cfg(any(feature = "postgres", feature = "mysql"))]
impl Server {
    /// The owner in a form that can be stored. The owner is only information for people, so it must
    /// not keep a lock from being taken.
    pub fn storable<'a>(&self, owner: &'a str) -> Cow<'a, str> {
        if self.is_ascii_only && !owner.is_ascii() {
            owner.chars().map(|character| if character.is_ascii() { character } else { '?' }).collect()
        } else {
            owner.into()
        }
    }
}

#[cfg(test)]
impl Server {
    pub fn for_tests() -> Self {
        let table = Arc::new(Table::new("main", '"', String::new()));
        Self {
            table,
            cluster: Cluster::SinglePrimary,
            is_mariadb: false,
            keeps_counter: false,
            longest_message: usize::MAX,
            is_ascii_only: false,
            keeps_statements: true,
        }
    }
}

/// Which clients a row lock excludes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cluster {
    /// All clients that may write.
    SinglePrimary,
    /// Only the clients of one node: Galera, multi-primary group replication. To exclude clients of
    /// other nodes, a statement has to write, because certification detects conflicting writes.
    MultiPrimary,
}

/// Where a `Locks` has its table. Shared by its session and by all callers that use the table in
/// transactions of their own.
#[derive(Debug, Default)]
pub(crate) struct Location {
    /// The schema given to the builder.
    schema: Option<String>,
    keeps_statements: bool,
    found: Mutex<Option<Server>>,
}

impl Location {
    pub(crate) fn new(schema: Option<String>, keeps_statements: bool) -> Self {
        Self { schema, keeps_statements, found: Mutex::default() }
    }

    /// The schema given to the builder, or the schema where the table was first found.
    pub(crate) fn schema(&self) -> Option<String> {
        self.schema.clone().or_else(|| self.found().map(|server| server.table.schema.clone()))
    }

    pub(crate) fn found(&self) -> Option<Server> {
        self.lock().clone()
    }

    /// Stores the server that was found. If its table is the same as before, the old `Table` is
    /// kept, with its statement texts, which are already prepared.
    pub(crate) fn set(&self, mut server: Server) -> Server {
        server.keeps_statements = self.keeps_statements;
        let mut found = self.lock();
        if let Some(before) = &*found
            && before.table.is_same(&server.table)
        {
            server.table = Arc::clone(&before.table);
        }
        *found = Some(server.clone());
        server
    }

    fn lock(&self) -> MutexGuard<'_, Option<Server>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The table `distributed_lock` of one `Locks`. It is found once. From then on every statement
/// names it in full, so that no `search_path`, `USE` or temporary table selects another one.
#[derive(Debug)]
pub struct Table {
    /// The name as SQL: `"public".distributed_lock`.
    name: String,
    /// The schema on PostgreSQL, the database on MySQL and MariaDB.
    pub schema: String,
    /// Distinguishes the table from one of the same name in another database. Empty where nothing
    /// does.
    pub identity: String,
    /// The texts of statements used so far, keyed by the addresses of their templates.
    statements: Mutex<HashMap<(usize, usize, usize), Arc<str>>>,
    has_old_versions: AtomicBool,
}

/// Placeholder for the name of the table in statements.
const PLACEHOLDER: &str = "{table}";
/// Placeholder for the inner statement in frames.
const STATEMENT: &str = "{statement}";

impl Table {
    /// `quote` is the character that the database puts around a name.
    pub fn new(schema: &str, quote: char, identity: String) -> Self {
        let doubled = schema.replace(quote, &format!("{quote}{quote}"));
        Self {
            name: format!("{quote}{doubled}{quote}.distributed_lock"),
            schema: schema.to_owned(),
            identity,
            statements: Mutex::default(),
            has_old_versions: AtomicBool::new(false),
        }
    }

    /// Whether a snapshot kept old versions of the table's rows, when that was last checked.
    #[cfg(feature = "postgres")]
    pub(super) fn has_old_versions(&self) -> bool {
        self.has_old_versions.load(Ordering::Relaxed)
    }

    pub(crate) fn set_old_versions(&self, are_kept: bool) {
        self.has_old_versions.store(are_kept, Ordering::Relaxed);
    }

    fn is_same(&self, other: &Self) -> bool {
        self.name == other.name && self.identity == other.identity
    }

    /// The full name, as SQL.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A statement on this table. Its text is created once, so that it is prepared only once.
    pub fn sql(&self, statement: &'static str) -> AssertSqlSafe<Arc<str>> {
        self.sql_in(STATEMENT, statement)
    }

    /// The same inside a frame of other statements, which has `{statement}` in its place.
    pub fn sql_in(&self, frame: &'static str, statement: &'static str) -> AssertSqlSafe<Arc<str>> {
        let mut statements = self.statements.lock().unwrap_or_else(PoisonError::into_inner);
        let text = statements
            .entry((frame.as_ptr() as usize, statement.as_ptr() as usize, statement.len()))
            .or_insert_with(|| frame.replace(STATEMENT, statement).replace(PLACEHOLDER, &self.name).into());
        AssertSqlSafe(Arc::clone(text))
    }
}

/// The error for a table that a newer version has migrated to something that this version can't
/// use.
#[cfg(any(feature = "postgres", feature = "mysql", feature = "_sqlite"))]
pub(super) fn by_newer(table: &str, column: &str, version: i64) -> String {
    format!(
        "`{table}` lacks the column `{column}`: a newer version of lock-db has migrated it (migration {version}), and this one \
         can't use what that made of it; deploy the newer one again"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_named_in_full_and_its_schema_needs_no_trust() {
        let table = Table::new(r#"a"b"#, '"', String::new());
        assert_eq!(table.name(), r#""a""b".distributed_lock"#);
        let statement = "SELECT 1 FROM {table}";
        assert_eq!(&*table.sql(statement).0, r#"SELECT 1 FROM "a""b".distributed_lock"#);
        assert_eq!(
            &*table.sql_in("BEGIN; {statement}; END", statement).0,
            r#"BEGIN; SELECT 1 FROM "a""b".distributed_lock; END"#
        );
    }
}
