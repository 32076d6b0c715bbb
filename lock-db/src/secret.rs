//! The token that proves ownership of one acquisition.

use std::fmt;
use std::sync::Arc;

use crate::Error;

/// 128 random bits in hexadecimal, made by the client before the attempt and never used for a second acquisition.
///
/// Because it is there before the first statement is sent, an attempt whose answer was lost can be made again
/// without doubling the lock, or be undone without touching anybody else's.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<str>);

impl Secret {
    /// Draws a new secret from the operating system.
    pub(crate) fn generate() -> Result<Self, Error> {
        let mut bytes = [0_u8; 16];
        getrandom::fill(&mut bytes).map_err(|source| Error::Database {
            action: "draw a secret key from the operating system",
            name: None,
            within: None,
            source: sqlx::Error::Io(std::io::Error::other(source)),
        })?;
        Ok(Self(format!("{:032x}", u128::from_be_bytes(bytes)).into()))
    }

    /// For a lock that ends with its transaction, where the secret is a receipt and frees nothing.
    #[cfg(feature = "mysql")]
    pub(crate) fn drawn_by_server(digits: &str) -> Self {
        Self(digits.into())
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whoever reads a log must not be able to release the lock.
impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_32_digits_and_differ() {
        let (one, other) = (Secret::generate().unwrap(), Secret::generate().unwrap());
        assert_eq!(one.as_str().len(), 32);
        assert!(one.as_str().bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert_ne!(one, other);
        assert_eq!(format!("{one:?}"), "Secret(..)");
    }
}
