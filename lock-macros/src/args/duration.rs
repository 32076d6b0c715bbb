//! The values of `ttl`, `wait`, `at_least` and `at_most`.

use std::time::Duration;

use syn::spanned::Spanned;
use syn::{Error, Expr, ExprUnary, Lit, Result, UnOp};

/// The limits of lock-db at run time. Literals are checked against them at compile time.
const SHORTEST_TTL: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_hours(365 * 24);

/// A length of time.
pub(crate) enum Length {
    /// A literal, parsed and checked.
    Fixed(Duration),
    /// An expression of type `Duration`.
    Computed(Box<Expr>),
}

impl Length {
    pub(super) fn parse_ttl(value: Expr) -> Result<Self> {
        Self::parse("ttl", value, |ttl| {
            if ttl.is_zero() {
                return Some(
                    "a `ttl` of zero is over at once: write \"30s\", or leave it out for the default",
                );
            }
            (ttl < SHORTEST_TTL).then_some("a `ttl` needs 50ms at least, to be renewed in time")
        })
    }

    pub(super) fn parse_wait(value: Expr) -> Result<Self> {
        Self::parse("wait", value, |_| None)
    }

    pub(super) fn parse_at_least(value: Expr) -> Result<Self> {
        Self::parse("at_least", value, |at_least| {
            at_least.is_zero().then_some("an `at_least` of zero has no effect: leave it out")
        })
    }

    pub(super) fn parse_at_most(value: Expr) -> Result<Self> {
        Self::parse("at_most", value, |at_most| {
            (at_most < SHORTEST_TTL).then_some("an `at_most` is 50ms at least, as a `ttl` is")
        })
    }

    fn parse(
        option: &str,
        value: Expr,
        objection: impl FnOnce(Duration) -> Option<&'static str>,
    ) -> Result<Self> {
        if is_negative(&value) {
            return Err(Error::new(value.span(), format!("`{option}` can't be negative")));
        }
        let length = match super::literal(&value) {
            Some(Lit::Str(text)) => {
                read(&text.value()).map_err(|message| Error::new(value.span(), message))?
            }
            Some(Lit::Int(number)) => {
                return Err(without_quotes(&value, number.base10_digits(), number.suffix()));
            }
            Some(Lit::Float(number)) => {
                return Err(without_quotes(&value, number.base10_digits(), number.suffix()));
            }
            Some(_) => return Err(Error::new(value.span(), format!("expected a duration: {FORMS}"))),
            None => return Ok(Self::Computed(Box::new(value))),
        };
        let too_long = (length > LONGEST).then_some("too long: 365 days at most");
        match objection(length).or(too_long) {
            Some(message) => Err(Error::new(value.span(), message)),
            None => Ok(Self::Fixed(length)),
        }
    }
}

/// `"-1s"`, `-1`.
fn is_negative(value: &Expr) -> bool {
    match value {
        Expr::Unary(ExprUnary { op: UnOp::Neg(_), expr, .. }) => super::literal(expr).is_some(),
        value => {
            matches!(super::literal(value), Some(Lit::Str(text)) if text.value().trim_start().starts_with('-'))
        }
    }
}

const FORMS: &str = r#"write it like "30s", "1m 30s" or "500ms", or as an expression of type `Duration`"#;

fn read(text: &str) -> std::result::Result<Duration, String> {
    let number = text.trim();
    // humantime accepts a bare zero.
    if !number.is_empty() && number.chars().all(|letter| letter.is_ascii_digit() || letter == '.') {
        return Err(needs_unit(number));
    }
    humantime::parse_duration(text).map_err(|error| format!("not a duration: {error}; {FORMS}"))
}

fn without_quotes(value: &Expr, digits: &str, unit: &str) -> Error {
    let message = if unit.is_empty() || unit.starts_with(['u', 'i', 'f']) {
        needs_unit(digits)
    } else {
        format!("a duration is written in quotes: \"{digits}{unit}\"")
    };
    Error::new(value.span(), message)
}

fn needs_unit(number: &str) -> String {
    format!("a duration needs a unit: \"{number}s\" or \"{number}ms\"")
}
