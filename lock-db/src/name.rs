//! Lock names: their validation, their prefix in the table, and how they are shown.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

use crate::Error;
use crate::text::escaped;

/// The maximum length of a name in bytes of UTF-8, which a unique index accepts on every database.
pub(crate) const MAX_BYTES: usize = 255;

/// The name of a lock, cheap to clone. It derefs to the whole name, as in the table. It is shown
/// without the prefix of its `Locks`, and [`escaped`].
#[derive(Clone)]
pub struct Name {
    whole: Arc<str>,
    /// The length of the prefix.
    prefix: usize,
}

impl Name {
    /// A name that was found in the table, whose first bytes are the prefix.
    pub(crate) fn found(whole: String, prefix: usize) -> Self {
        Self { whole: whole.into(), prefix }
    }

    /// The name as the caller gave it, for the fields of errors. (Messages use `Display`, which
    /// escapes it.)
    pub(crate) fn given(&self) -> String {
        self.shown().to_owned()
    }

    /// The name as the caller gave it.
    pub(crate) fn shown(&self) -> &str {
        self.whole.get(self.prefix..).unwrap_or(&self.whole)
    }
}

/// Checks a name.
pub(crate) fn check(prefix: &str, name: &str) -> Result<Name, Error> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if prefix.len() + name.len() > MAX_BYTES {
        "it is longer than 255 bytes of UTF-8, with the prefix of its `Locks` if there is one"
    } else if name.contains('\0') || prefix.contains('\0') {
        "it contains a NUL byte, which PostgreSQL can't store"
    } else {
        let whole = if prefix.is_empty() { name.into() } else { format!("{prefix}{name}").into() };
        return Ok(Name { whole, prefix: prefix.len() });
    };
    Err(Error::InvalidName { name: shortened(name), reason })
}

impl Deref for Name {
    type Target = str;

    fn deref(&self) -> &str {
        &self.whole
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.whole
    }
}

impl fmt::Display for Name {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        escaped(self.shown()).fmt(formatter)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.shown().fmt(formatter)
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.whole == other.whole
    }
}

impl Eq for Name {}

impl PartialOrd for Name {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Name {
    fn cmp(&self, other: &Self) -> Ordering {
        self.whole.cmp(&other.whole)
    }
}

impl Hash for Name {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.whole.hash(state);
    }
}

#[cfg(test)]
impl From<&str> for Name {
    fn from(name: &str) -> Self {
        Self { whole: name.into(), prefix: 0 }
    }
}

/// The beginning of a name of any length, for a message that shows some characters as escapes.
fn shortened(name: &str) -> String {
    const SHOWN: usize = 60;
    let mut shown = 0;
    for (start, character) in name.char_indices() {
        shown += escaped(character.encode_utf8(&mut [0; 4])).to_string().chars().count();
        if shown > SHOWN {
            return format!("{}…", &name[..start]);
        }
    }
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_name_is_255_bytes() {
        assert!(check("", &"a".repeat(255)).is_ok());
        assert!(check("", &"é".repeat(127)).is_ok());
        assert!(matches!(check("", &"a".repeat(256)), Err(Error::InvalidName { .. })));
        assert!(matches!(check("", &"é".repeat(128)), Err(Error::InvalidName { .. })));
    }

    #[test]
    fn empty_and_nul_are_refused() {
        assert!(matches!(check("", ""), Err(Error::InvalidName { .. })));
        assert!(matches!(check("", "a\0b"), Err(Error::InvalidName { .. })));
        assert!(check("", " ").is_ok());
    }

    #[test]
    fn a_prefix_counts_and_is_not_shown() {
        let name = check("billing:", "job").unwrap();
        assert_eq!((&*name, name.shown(), name.to_string()), ("billing:job", "job", "job".to_owned()));
        assert!(check(&"p".repeat(100), &"n".repeat(155)).is_ok());
        assert!(check(&"p".repeat(100), &"n".repeat(156)).is_err());
    }
}
