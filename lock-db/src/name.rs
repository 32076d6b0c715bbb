//! Names of locks: what is refused before any SQL.

use std::sync::Arc;

use crate::Error;

/// The longest name, in bytes of UTF-8: what a unique index takes on every database.
pub(crate) const MAX_BYTES: usize = 255;

/// Checks a name and makes it cheap to share.
pub(crate) fn check(name: &str) -> Result<Arc<str>, Error> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.len() > MAX_BYTES {
        "it is longer than 255 bytes of UTF-8"
    } else if name.contains('\0') {
        "it contains a NUL byte, which PostgreSQL can't store"
    } else {
        return Ok(name.into());
    };
    Err(Error::InvalidName { name: shortened(name), reason })
}

/// The beginning of a name that may be of any length, for a message.
fn shortened(name: &str) -> String {
    const SHOWN: usize = 60;
    match name.char_indices().nth(SHOWN) {
        None => name.to_owned(),
        Some((end, _)) => format!("{}…", &name[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_name_is_255_bytes() {
        assert!(check(&"a".repeat(255)).is_ok());
        assert!(check(&"é".repeat(127)).is_ok());
        assert!(matches!(check(&"a".repeat(256)), Err(Error::InvalidName { .. })));
        assert!(matches!(check(&"é".repeat(128)), Err(Error::InvalidName { .. })));
    }

    #[test]
    fn empty_and_nul_are_refused() {
        assert!(matches!(check(""), Err(Error::InvalidName { .. })));
        assert!(matches!(check("a\0b"), Err(Error::InvalidName { .. })));
        assert!(check(" ").is_ok());
    }
}
