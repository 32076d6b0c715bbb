//! What kind of server a connection leads to, and how its table is named there.

#[cfg(any(feature = "postgres", feature = "mysql"))]
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sqlx::AssertSqlSafe;

/// What a connection found out about the server behind it, in one go before its first use.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "facts that have nothing to do with each other")]
pub struct Server {
    pub table: Arc<Table>,
    pub cluster: Cluster,
    /// Whether it is MariaDB, which has statements of its own.
    pub is_mariadb: bool,
    /// Whether an insert that commits by itself keeps the counter of its table until a binary log is on disk.
    pub keeps_counter: bool,
    /// How many bytes of a statement it takes in one message, with room for what else stands in it.
    pub longest_message: usize,
    /// Whether an owner outside of ASCII can't be stored, because of the encoding of the database or the
    /// character set of the column.
    pub is_ascii_only: bool,
    /// Whether the application's connections keep statements prepared. Where they don't, sqlx leaves each one on a PostgreSQL server
    /// that has a name.
    pub keeps_statements: bool,
}

#[cfg(any(feature = "postgres", feature = "mysql"))]
impl Server {
    /// An owner as it can be stored: what tells people who has a lock is not to keep anybody from having it.
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

/// How far a row lock reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cluster {
    /// To everybody who may write.
    SinglePrimary,
    /// To the clients of one node only: Galera, multi-primary group replication. What must exclude clients of other
    /// nodes has to be a write, which certification finds.
    MultiPrimary,
}

/// Where a `Locks` has its table, known to its session and to all who use it in transactions of their own.
#[derive(Debug, Default)]
pub(crate) struct Location {
    /// As the builder was told.
    schema: Option<String>,
    keeps_statements: bool,
    found: Mutex<Option<Server>>,
}

impl Location {
    pub(crate) fn new(schema: Option<String>, keeps_statements: bool) -> Self {
        Self { schema, keeps_statements, found: Mutex::default() }
    }

    /// As the builder was told, else where the table was found the first time.
    pub(crate) fn schema(&self) -> Option<String> {
        self.schema.clone().or_else(|| self.found().map(|server| server.table.schema.clone()))
    }

    pub(crate) fn found(&self) -> Option<Server> {
        self.lock().clone()
    }

    /// The same table as before stays the same, with the statements that are prepared already.
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

/// The table `distributed_lock` of one `Locks`. It is found once; from then on every statement names it in full, so that
/// no `search_path`, `USE` or temporary table makes it another one.
#[derive(Debug)]
pub struct Table {
    /// As SQL: `"public".distributed_lock`.
    name: String,
    /// The schema on PostgreSQL, the database on MySQL and MariaDB.
    pub schema: String,
    /// What tells it from a table of the same name in another database; empty where nothing does.
    pub identity: String,
    /// The statements that were used already, by the places of what they were made of.
    statements: Mutex<HashMap<(usize, usize, usize), Arc<str>>>,
    has_old_versions: AtomicBool,
}

/// In statements this stands for the name of the table.
const PLACEHOLDER: &str = "{table}";
/// In frames this stands for a statement.
const STATEMENT: &str = "{statement}";

impl Table {
    /// `quote` is what the database puts around a name.
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

    /// Whether old versions of its rows were kept, for a snapshot somewhere, when that was looked for the last time.
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

    /// As it stands in a statement.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A statement on this table. The text is made once, so that it is prepared once, too.
    pub fn sql(&self, statement: &'static str) -> AssertSqlSafe<Arc<str>> {
        self.sql_in(STATEMENT, statement)
    }

    /// The same in a frame of other statements, which has `{statement}` where it goes.
    pub fn sql_in(&self, frame: &'static str, statement: &'static str) -> AssertSqlSafe<Arc<str>> {
        let mut statements = self.statements.lock().unwrap_or_else(PoisonError::into_inner);
        let text = statements
            .entry((frame.as_ptr() as usize, statement.as_ptr() as usize, statement.len()))
            .or_insert_with(|| frame.replace(STATEMENT, statement).replace(PLACEHOLDER, &self.name).into());
        AssertSqlSafe(Arc::clone(text))
    }
}

/// What is wrong with a table that a newer version has migrated, to something that this one can't use.
#[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
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
