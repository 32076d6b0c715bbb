//! The columns of the table, and what each of them has to hold. The matching types of each database
//! are next to its SQL.

use std::collections::HashMap;

use super::wait_queue;

/// Length of a secret: 32 hexadecimal digits.
const SECRET: usize = 32;
/// Longest kind of a lock: `insert` or `row`.
const KIND: usize = 6;
/// Longest owner, in characters.
const OWNER: usize = 255;

/// What a column holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// The key that the database assigns, a signed 64-bit integer.
    Id,
    /// The name of a lock, compared byte by byte.
    Name,
    /// A signed 64-bit integer.
    Integer,
    /// At most this many ASCII characters.
    Ascii(usize),
    /// At most this many characters of text for people. Characters that can't be stored are
    /// replaced.
    Label(usize),
    /// A time of day in microseconds.
    Time,
}

/// The columns that all databases have.
pub(super) const COLUMNS: [(&str, Content); 12] = [
    ("id", Content::Id),
    ("lock_name", Content::Name),
    ("lock_kind", Content::Ascii(KIND)),
    ("secret_key", Content::Ascii(SECRET)),
    ("fencing_token", Content::Integer),
    ("previous_token", Content::Integer),
    ("owner", Content::Label(OWNER)),
    ("create_time", Content::Time),
    ("acquire_time", Content::Time),
    ("expire_time", Content::Time),
    ("ttl_micros", Content::Integer),
    ("waiters", Content::Ascii(wait_queue::LONGEST)),
];

/// A column as the database declares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Declared {
    pub(super) kind: String,
    pub(super) unless_named: UnlessNamed,
}

/// What a new row has in a column that its INSERT does not name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum UnlessNamed {
    /// A value: a default, the next number, a computed value.
    Value,
    Null,
    /// Nothing: the INSERT fails.
    Nothing,
}

impl UnlessNamed {
    /// Parses the form that the statements for finding columns return.
    pub(super) fn parse(text: &str) -> Self {
        match text {
            "value" => Self::Value,
            "null" => Self::Null,
            _ => Self::Nothing,
        }
    }
}

/// The columns that an INSERT names.
const NAMED: [&str; 2] = ["lock_name", "lock_kind"];

/// How the columns of a table compare with those that lock-db needs.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Compared {
    Fit,
    /// This column is missing.
    Missing(&'static str),
    /// A column can't hold what it should, or keeps rows from being created. The text says which,
    /// and follows the name of the table.
    Unfit(String),
}

/// Compares declared columns, by name, with what they have to hold. `needed` returns what a column
/// needs if its type does not fit.
pub(super) fn compare(
    columns: &[(&'static str, Content)],
    declared: &HashMap<String, Declared>,
    needed: impl Fn(Content, &str) -> Option<String>,
) -> Compared {
    for &(column, _) in columns {
        if !declared.contains_key(column) {
            return Compared::Missing(column);
        }
    }
    for &(column, content) in columns {
        let Some(Declared { kind, unless_named }) = declared.get(column) else { continue };
        if let Some(needed) = needed(content, kind) {
            return Compared::Unfit(format!(
                "has a column `{column}` of the type `{kind}`, where lock-db needs {needed}"
            ));
        }
        if *unless_named != UnlessNamed::Value && !NAMED.contains(&column) {
            return Compared::Unfit(format!(
                "has a column `{column}` that has lost its default, so that no row can be made: give it back the one of \
                 the migration"
            ));
        }
    }
    let is_ours = |name: &String| columns.iter().any(|(column, _)| column == name);
    let mut others = declared.iter().filter(|(name, _)| !is_ours(name));
    match others.find(|(_, column)| column.unless_named == UnlessNamed::Nothing) {
        Some((name, _)) => Compared::Unfit(format!(
            "has a column `{name}` of others that is NOT NULL without a default, so that no row can be made: give it one"
        )),
        None => Compared::Fit,
    }
}

/// The number after the name of a type: 255 of `varchar(255)`.
#[cfg(any(feature = "postgres", feature = "mysql"))]
pub(super) fn length_of(kind: &str, name: &str) -> Option<usize> {
    let (length, _) = kind.strip_prefix(name)?.strip_prefix('(')?.split_once(')')?;
    length.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_that_is_missing_counts_before_one_of_another_type() {
        let columns = [("a", Content::Integer), ("b", Content::Integer)];
        let needed = |_: Content, kind: &str| (kind != "int").then(|| "int".to_owned());
        let compare = |declared: &[(&str, &str, &str)]| {
            let declared = declared.iter().map(|(column, kind, unless_named)| {
                let unless_named = UnlessNamed::parse(unless_named);
                ((*column).into(), Declared { kind: (*kind).into(), unless_named })
            });
            super::compare(&columns, &declared.collect(), needed)
        };
        assert_eq!(compare(&[("a", "text", "value")]), Compared::Missing("b"));
        let fits = [("a", "int", "value"), ("b", "int", "value"), ("c", "text", "null")];
        assert_eq!(compare(&fits), Compared::Fit);
        for (other, says) in [
            (("b", "text", "value"), "a column `b` of the type `text`, where lock-db needs int"),
            (("b", "int", "null"), "a column `b` that has lost its default"),
            (("b", "int", "nothing"), "a column `b` that has lost its default"),
        ] {
            let Compared::Unfit(reason) = compare(&[("a", "int", "value"), other]) else {
                panic!("{other:?}")
            };
            assert!(reason.contains(says), "{reason}");
        }
        let Compared::Unfit(reason) = compare(&[fits[0], fits[1], ("c", "text", "nothing")]) else {
            panic!("`c` has no default")
        };
        assert!(reason.contains("`c`"), "{reason}");
    }

    #[test]
    #[cfg(any(feature = "postgres", feature = "mysql"))]
    fn lengths_are_read_behind_the_whole_name() {
        assert_eq!(length_of("varchar(255)", "varchar"), Some(255));
        assert_eq!(length_of("varchar(32) CHARACTER SET latin1", "varchar"), Some(32));
        assert_eq!(length_of("varchar", "varchar"), None);
        assert_eq!(length_of("char(8)", "varchar"), None);
        assert_eq!(length_of("character varying(8)", "character"), None);
    }
}
