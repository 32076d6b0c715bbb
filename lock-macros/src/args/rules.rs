//! The options, one rule for each, and the messages for unknown words.

use syn::parse::{Parse, ParseStream};
use syn::{Error, Expr, Ident, LitBool, Path, Result, Token};

use super::{Given, Length, Mode, Options};

/// One option, as the grammar knows it.
pub(super) struct Rule {
    pub(super) key: &'static str,
    pub(super) example: &'static str,
    /// Names of this option in other libraries.
    also_called: &'static [&'static str],
    pub(super) read: fn(&mut Options, Ident, ParseStream) -> Result<()>,
}

/// All options. A new option is a field of [`Options`], an entry here, and, if it excludes another
/// option, a check in [`Options::check`].
pub(super) const RULES: &[Rule] = &[
    Rule {
        key: "ttl",
        example: r#"ttl = "30s""#,
        also_called: &[
            "lease_time",
            "expire",
            "expires",
            "expiry",
            "expiration",
            "expire_time",
            "expire_after",
            "expires_in",
            "lease_duration",
            "lock_ttl",
            "lock_timeout",
            "lock_at_most_for",
        ],
        read: |options, key, input| read_length(&mut options.ttl, key, input, Length::parse_ttl),
    },
    Rule {
        key: "wait",
        example: r#"wait = "5s""#,
        also_called: &[
            "timeout",
            "acquire_timeout",
            "blocking_timeout",
            "wait_timeout",
            "wait_time",
            "wait_for",
            "max_wait",
        ],
        read: |options, key, input| read_length(&mut options.wait, key, input, Length::parse_wait),
    },
    Rule {
        key: "at_least",
        example: r#"at_least = "30s""#,
        also_called: &["lock_at_least_for", "atleast", "min", "minimum", "hold_for"],
        read: |options, key, input| read_length(&mut options.at_least, key, input, Length::parse_at_least),
    },
    Rule {
        key: "at_most",
        example: r#"at_most = "10m""#,
        also_called: &[
            "atmost",
            "max_hold",
            "max_hold_time",
            "max_duration",
            "max_run_time",
            "execution_timeout",
            "run_timeout",
        ],
        read: |options, key, input| read_length(&mut options.at_most, key, input, Length::parse_at_most),
    },
    Rule {
        key: "mode",
        example: "mode = row",
        also_called: &["kind", "type"],
        read: |options, key, input| read_value(&mut options.mode, key, input, Mode::parse),
    },
    Rule {
        key: "locks",
        example: "locks = self.locks",
        also_called: &["pool", "db", "with"],
        read: |options, key, input| read_value(&mut options.locks, key, input, Expr::parse),
    },
    Rule {
        key: "tx",
        example: "tx = tx",
        also_called: &["transaction", "conn", "connection"],
        read: |options, key, input| read_value(&mut options.tx, key, input, Expr::parse),
    },
    Rule {
        key: "lease",
        example: "lease = lease",
        also_called: &["guard", "bind", "let"],
        read: |options, key, input| read_value(&mut options.lease, key, input, variable),
    },
    Rule {
        key: "skip",
        example: "skip",
        also_called: &[
            "try",
            "try_lock",
            "skip_if_locked",
            "skip_locked",
            "nowait",
            "no_wait",
            "optional",
            "blocking",
            "disallow_concurrent_execution",
        ],
        read: |options, key, input| read_flag(&mut options.skip, key, input),
    },
    Rule {
        key: "reentrant",
        example: "reentrant = false",
        also_called: &["reenter", "reentrancy", "reentry", "recursive"],
        read: |options, key, input| read_value(&mut options.reentrant, key, input, yes_or_no),
    },
    Rule {
        key: "crate",
        example: "crate = my_crate::lock_db",
        also_called: &["krate"],
        read: |options, key, input| read_value(&mut options.lock_db, key, input, Path::parse_mod_style),
    },
];

/// Reads `= value` after a key.
fn read_value<T>(
    slot: &mut Option<Given<T>>,
    key: Ident,
    input: ParseStream,
    parse: impl FnOnce(ParseStream) -> Result<T>,
) -> Result<()> {
    if slot.is_some() {
        return Err(Error::new(key.span(), format!("`{key}` is given twice")));
    }
    let no_value = |key: &Ident| {
        let example = RULES.iter().find(|rule| key == rule.key).map_or("", |rule| rule.example);
        Error::new(key.span(), format!("`{key}` needs a value: `{example}`"))
    };
    if !input.peek(Token![=]) {
        return Err(no_value(&key));
    }
    input.parse::<Token![=]>()?;
    if input.is_empty() || input.peek(Token![,]) {
        return Err(no_value(&key));
    }
    *slot = Some(Given { value: parse(input)?, key });
    Ok(())
}

/// Reads nothing: a flag has no value.
fn read_flag(slot: &mut Option<Given<()>>, key: Ident, input: ParseStream) -> Result<()> {
    if slot.is_some() {
        return Err(Error::new(key.span(), format!("`{key}` is given twice")));
    }
    if !input.is_empty() && !input.peek(Token![,]) {
        return Err(Error::new(key.span(), format!("`{key}` has no value: write `{key}`, or leave it out")));
    }
    *slot = Some(Given { value: (), key });
    Ok(())
}

fn variable(input: ParseStream) -> Result<Ident> {
    input.parse().map_err(|error| {
        let message = "expected the name of a variable, which the body then has: `lease = lease`";
        Error::new(error.span(), message)
    })
}

fn yes_or_no(input: ParseStream) -> Result<bool> {
    let read = input.parse::<LitBool>();
    read.map(|literal| literal.value).map_err(|error| Error::new(error.span(), "expected `true` or `false`"))
}

fn read_length(
    slot: &mut Option<Given<Length>>,
    key: Ident,
    input: ParseStream,
    check: fn(Expr) -> Result<Length>,
) -> Result<()> {
    read_value(slot, key, input, |input| check(input.parse()?))
}

pub(super) fn examples() -> String {
    let examples: Vec<_> = RULES.iter().map(|rule| format!("`{}`", rule.example)).collect();
    examples.join(", ")
}

pub(super) fn unknown(word: &str, has_value: bool) -> String {
    if ["name", "key", "keys"].contains(&word) {
        return "the name comes first and without a key: `#[distributed_lock(\"order:{order_id}\")]`"
            .to_owned();
    }
    let as_here = snake_case(word);
    let known = RULES.iter().find(|rule| rule.key == as_here || rule.also_called.contains(&&*as_here));
    if let Some(rule) = known {
        return format!("unknown option `{word}`: it is `{}` here", rule.key);
    }
    if let Some(rule) = meant(&as_here) {
        return format!("unknown option `{word}`; did you mean `{}`?", rule.key);
    }
    if has_value {
        let keys: Vec<_> = RULES.iter().map(|rule| format!("`{}`", rule.key)).collect();
        return format!("unknown option `{word}`; there are {}", keys.join(", "));
    }
    format!(
        "expected an option: {}; an argument of the function goes into the name in braces: `\"…{{{word}}}\"`",
        examples()
    )
}

/// Converts `lockAtMostFor`, the style of annotations in other languages, to snake case.
fn snake_case(word: &str) -> String {
    let mut words = String::new();
    let mut was_lowercase = false;
    for letter in word.chars() {
        if letter.is_uppercase() && was_lowercase {
            words.push('_');
        }
        was_lowercase = letter.is_lowercase();
        words.extend(letter.to_lowercase());
    }
    words
}

/// The option that was most likely meant by a misspelled word.
fn meant(word: &str) -> Option<&'static Rule> {
    RULES
        .iter()
        .map(|rule| (edits(word, rule.key), rule))
        .filter(|(edits, rule)| edits * 2 <= rule.key.len().max(word.chars().count()))
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, rule)| rule)
}

/// The Levenshtein distance: how many letters have to be inserted, deleted or replaced to get from
/// one word to the other.
pub(super) fn edits(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut above: Vec<usize> = (0..=to.len()).collect();
    for (row, letter) in from.chars().enumerate() {
        let mut diagonal = above[0];
        above[0] = row + 1;
        for (column, other) in to.iter().enumerate() {
            let exchanged = diagonal + usize::from(letter != *other);
            diagonal = above[column + 1];
            above[column + 1] = exchanged.min(diagonal + 1).min(above[column] + 1);
        }
    }
    above[to.len()]
}
