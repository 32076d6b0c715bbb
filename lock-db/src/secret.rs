//! The token that proves ownership of one acquisition.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::Error;

const SIZE: usize = 16;

/// 128 random bits in hexadecimal, made by the client before the attempt and never used for a second acquisition.
///
/// Because it is there before the first statement is sent, an attempt whose answer was lost can be made again
/// without doubling the lock, or be undone without touching anybody else's.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<str>);

impl Secret {
    /// Draws a new secret from the operating system.
    pub(crate) fn generate() -> Result<Self, Error> {
        let mut bytes = [0_u8; SIZE];
        fill(&mut bytes)?;
        Ok(Self::of(bytes))
    }

    fn of(bytes: [u8; SIZE]) -> Self {
        Self(format!("{:032x}", u128::from_be_bytes(bytes)).into())
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

/// Secrets that were drawn in advance: asking the operating system for each one takes a twentieth of the time of a lock that goes
/// from hand to hand. One source belongs to one session, whose thread does not survive a fork: so no two processes have the
/// same bytes.
#[derive(Default)]
pub(crate) struct SecretSource(Mutex<Vec<[u8; SIZE]>>);

/// How many are drawn at a time.
const DRAWN: usize = 64;

impl SecretSource {
    pub(crate) fn draw(&self) -> Result<Secret, Error> {
        let mut drawn = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if drawn.is_empty() {
            let mut bytes = vec![[0_u8; SIZE]; DRAWN];
            fill(bytes.as_flattened_mut())?;
            *drawn = bytes;
        }
        match drawn.pop() {
            Some(bytes) => Ok(Secret::of(bytes)),
            None => Secret::generate(),
        }
    }
}

impl fmt::Debug for SecretSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("SecretSource(..)")
    }
}

fn fill(bytes: &mut [u8]) -> Result<(), Error> {
    getrandom::fill(bytes).map_err(|source| Error::Database {
        action: "draw a secret key from the operating system",
        name: None,
        within: None,
        source: sqlx::Error::Io(std::io::Error::other(source)),
    })
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
    fn what_is_drawn_in_advance_is_used_once() {
        let source = SecretSource::default();
        let mut drawn = std::collections::HashSet::new();
        for _ in 0..3 * DRAWN {
            assert!(drawn.insert(source.draw().unwrap().as_str().to_owned()));
        }
        assert_eq!(format!("{source:?}"), "SecretSource(..)");
    }

    #[test]
    fn secrets_are_32_digits_and_differ() {
        let (one, other) = (Secret::generate().unwrap(), Secret::generate().unwrap());
        assert_eq!(one.as_str().len(), 32);
        assert!(one.as_str().bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert_ne!(one, other);
        assert_eq!(format!("{one:?}"), "Secret(..)");
    }
}
