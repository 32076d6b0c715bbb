//! Names of locks: what is refused before any SQL, what stands in front of them in the table, and how they are shown.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

use crate::Error;

/// The longest name, in bytes of UTF-8: what a unique index takes on every database.
pub(crate) const MAX_BYTES: usize = 255;

/// The name of a lock, cheap to share. It derefs to the whole name, as it stands in the table; it is shown without the prefix of its
/// `Locks`, as it was asked for, and [`escaped`].
#[derive(Clone)]
pub struct Name {
    whole: Arc<str>,
    /// How long the prefix is.
    prefix: usize,
}

impl Name {
    /// As it was asked for, for the fields of errors. (In a message it stands by `Display`, which escapes it.)
    pub(crate) fn given(&self) -> String {
        self.shown().to_owned()
    }

    /// As it was asked for.
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

/// A text that is not ours (a name, an owner, the words of a server) as a part of one line of a log or a message: what could begin
/// another line, hide or rearrange something is shown by its escape, as in the source of a program.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Escaped<'a> {
    text: &'a str,
    /// Whether a backslash is escaped as well, so that no two texts look the same.
    is_exact: bool,
}

/// For a name or an owner.
pub(crate) fn escaped(text: &str) -> Escaped<'_> {
    Escaped { text, is_exact: true }
}

/// For sentences.
pub(crate) fn in_one_line(text: &str) -> Escaped<'_> {
    Escaped { text, is_exact: false }
}

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_odd = |character: char| match character {
            '\\' => self.is_exact,
            // What has no width, separators of lines, and what changes the direction of text.
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}' => true,
            character => character.is_control(),
        };
        let mut rest = self.text;
        while let Some((before, odd)) = rest.char_indices().find(|(_, character)| is_odd(*character)) {
            formatter.write_str(&rest[..before])?;
            odd.escape_default().fmt(formatter)?;
            rest = &rest[before + odd.len_utf8()..];
        }
        formatter.write_str(rest)
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

/// The beginning of a name that may be of any length, for a message, where some characters are shown by their escapes.
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
    fn what_could_forge_a_line_is_escaped() {
        let shown = |text| escaped(text).to_string();
        assert_eq!(shown("order:7 'é' 🔒"), "order:7 'é' 🔒");
        assert_eq!(shown("a\nb\r\x1b[2Kc\u{85}d"), r"a\nb\r\u{1b}[2Kc\u{85}d");
        assert_eq!(shown("a\u{2028}b\u{202e}c\u{200b}"), r"a\u{2028}b\u{202e}c\u{200b}");
        // No two names look the same.
        assert_eq!(shown(r"a\nb"), r"a\\nb");
        assert_eq!(in_one_line("C:\\a\nb").to_string(), r"C:\a\nb");
        assert_eq!(Name::from("a\nb").to_string(), r"a\nb");
    }

    #[test]
    fn a_prefix_counts_and_is_not_shown() {
        let name = check("billing:", "job").unwrap();
        assert_eq!((&*name, name.shown(), name.to_string()), ("billing:job", "job", "job".to_owned()));
        assert!(check(&"p".repeat(100), &"n".repeat(155)).is_ok());
        assert!(check(&"p".repeat(100), &"n".repeat(156)).is_err());
    }
}
