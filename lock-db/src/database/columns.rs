//! The columns of the table, and what each has to hold. What a database calls the types that do is said beside its SQL.

use std::collections::HashMap;

/// A secret: 32 hexadecimal digits.
const SECRET: usize = 32;
/// The kind of a lock: `insert` or `row`.
const KIND: usize = 6;
/// The longest owner, in characters.
const OWNER: usize = 255;
/// The longest queue, in ASCII characters.
const WAITERS: usize = 3584;

/// What a column holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// The key that the database gives out, 64 bits with a sign.
    Id,
    /// The name of a lock, compared byte by byte.
    Name,
    /// 64 bits with a sign.
    Integer,
    /// Up to so many ASCII characters.
    Ascii(usize),
    /// Up to so many characters for people to read. What can't be stored of them is replaced.
    Label(usize),
    /// A time of day in microseconds.
    Time,
}

/// All databases have these.
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
    ("waiters", Content::Ascii(WAITERS)),
];

/// How the columns of a table compare with those that lock-db needs.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Compared {
    Fit,
    /// A column is missing.
    Missing,
    /// A column has a type that can't hold what belongs there. Says which, as what follows the name of the table.
    Unfit(String),
}

/// Compares declared types, by the names of their columns, with what the columns have to hold.
/// `needed` says what a column needs instead of a type that does not do.
pub(super) fn compare(
    columns: impl Iterator<Item = (&'static str, Content)> + Clone,
    declared: &HashMap<String, String>,
    needed: impl Fn(Content, &str) -> Option<String>,
) -> Compared {
    if !columns.clone().all(|(column, _)| declared.contains_key(column)) {
        return Compared::Missing;
    }
    for (column, content) in columns {
        if let Some(kind) = declared.get(column)
            && let Some(needed) = needed(content, kind)
        {
            return Compared::Unfit(format!(
                "has a column `{column}` of the type `{kind}`, where lock-db needs {needed}"
            ));
        }
    }
    Compared::Fit
}

/// The number behind the name of a type: 255 of `varchar(255)`.
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
        let compare = |declared: &[(&str, &str)]| {
            let declared = declared.iter().map(|(column, kind)| ((*column).into(), (*kind).into()));
            super::compare(columns.into_iter(), &declared.collect(), needed)
        };
        assert_eq!(compare(&[("a", "text")]), Compared::Missing);
        assert_eq!(compare(&[("a", "int"), ("b", "int"), ("c", "text")]), Compared::Fit);
        let reason = "has a column `b` of the type `text`, where lock-db needs int";
        assert_eq!(compare(&[("a", "int"), ("b", "text")]), Compared::Unfit(reason.into()));
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
