//! The grammar of what stands in the parentheses: `NAME [, key = value]* [,]`.

mod duration;
mod name;

use proc_macro2::Span;
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream};
use syn::{Error, Expr, ExprLit, Ident, Lit, LitStr, Path, Result, Token};

pub(crate) use self::duration::Length;
pub(crate) use self::name::Name;

/// What stands in the parentheses of the attribute.
pub(crate) struct Args {
    pub(crate) name: Name,
    pub(crate) options: Options,
}

/// The options behind the name.
#[derive(Default)]
pub(crate) struct Options {
    pub(crate) ttl: Option<Given<Length>>,
    pub(crate) wait: Option<Given<Length>>,
    pub(crate) mode: Option<Given<Mode>>,
    pub(crate) locks: Option<Given<Expr>>,
    pub(crate) tx: Option<Given<Expr>>,
    pub(crate) lock_db: Option<Given<Path>>,
}

/// An option with its key, which messages about the option point at.
pub(crate) struct Given<T> {
    pub(crate) key: Ident,
    pub(crate) value: T,
}

/// Which kind of lock the function runs under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Insert,
    Row,
}

/// One option: all that the grammar knows about it.
struct Rule {
    key: &'static str,
    example: &'static str,
    /// What people coming from elsewhere would call it.
    also_called: &'static [&'static str],
    read: fn(&mut Options, Ident, ParseStream) -> Result<()>,
}

/// All options. A new one is a field of [`Options`], a line here, and, where it excludes another, one in
/// [`Options::check`].
const RULES: &[Rule] = &[
    Rule {
        key: "ttl",
        example: r#"ttl = "30s""#,
        also_called: &["lease_time", "expire", "expires", "expiry"],
        read: |options, key, input| read_length(&mut options.ttl, key, input, Length::parse_ttl),
    },
    Rule {
        key: "wait",
        example: r#"wait = "5s""#,
        also_called: &["timeout", "wait_time", "wait_for", "max_wait"],
        read: |options, key, input| read_length(&mut options.wait, key, input, Length::parse_wait),
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
        key: "crate",
        example: "crate = my_crate::lock_db",
        also_called: &["krate"],
        read: |options, key, input| read_value(&mut options.lock_db, key, input, Path::parse_mod_style),
    },
];

impl Parse for Args {
    fn parse(input: ParseStream) -> Result<Self> {
        let name = parse_name(input)?;
        let mut options = Options::default();
        while !input.is_empty() {
            input.parse::<Token![,]>()?;
            if input.is_empty() {
                break;
            }
            options.parse_one(input)?;
        }
        options.check()?;
        Ok(Self { name, options })
    }
}

fn parse_name(input: ParseStream) -> Result<Name> {
    const NEEDED: &str =
        r#"a lock needs a name, before any option: `#[distributed_lock("order:{order_id}")]`"#;
    if input.is_empty() {
        return Err(Error::new(Span::call_site(), NEEDED));
    }
    // An expression, too, could begin with `key = value`: that would be an assignment, and never a name.
    if input.peek(Ident::peek_any) && input.peek2(Token![=]) && !input.peek2(Token![==]) {
        let key = input.call(Ident::parse_any)?;
        let message = if key == "name" {
            r#"the name is written without a key: `#[distributed_lock("order:{order_id}")]`"#
        } else {
            NEEDED
        };
        return Err(Error::new(key.span(), message));
    }
    if input.peek(Token![,]) {
        return Err(input.error(NEEDED));
    }
    Name::new(input.parse()?)
}

impl Options {
    fn parse_one(&mut self, input: ParseStream) -> Result<()> {
        if !input.peek(Ident::peek_any) {
            return Err(input.error(format!("expected an option: {}", examples())));
        }
        let key = input.call(Ident::parse_any)?;
        let word = key.to_string();
        match RULES.iter().find(|rule| rule.key == word) {
            Some(rule) => (rule.read)(self, key, input),
            None => Err(Error::new(key.span(), unknown(&word, input.peek(Token![=])))),
        }
    }

    /// What no option can say by itself.
    fn check(&self) -> Result<()> {
        if self.mode() == Mode::Row {
            if let Some(ttl) = &self.ttl {
                return Err(Error::new(
                    ttl.key.span(),
                    "a row lock has no `ttl`: it ends with its transaction",
                ));
            }
        } else if let Some(tx) = &self.tx {
            return Err(Error::new(
                tx.key.span(),
                "only a row lock is held by a transaction: write `mode = row` as well, or leave `tx` out",
            ));
        }
        Ok(())
    }

    pub(crate) fn mode(&self) -> Mode {
        self.mode.as_ref().map_or(Mode::Insert, |mode| mode.value)
    }
}

impl Mode {
    fn parse(input: ParseStream) -> Result<Self> {
        if let Some(text) = input.parse::<Option<LitStr>>()? {
            return Err(Error::new(text.span(), "a mode is written without quotes: `mode = row`"));
        }
        if !input.peek(Ident::peek_any) {
            return Err(input.error("expected `insert` or `row`"));
        }
        let word = input.call(Ident::parse_any)?;
        match word.to_string().as_str() {
            "insert" => Ok(Self::Insert),
            "row" => Ok(Self::Row),
            other => {
                let message = format!(
                    "unknown mode `{other}`: write `insert` (a lease, the default) or `row` (held by a transaction)"
                );
                Err(Error::new(word.span(), message))
            }
        }
    }
}

/// Reads `= value` behind a key.
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

fn read_length(
    slot: &mut Option<Given<Length>>,
    key: Ident,
    input: ParseStream,
    check: fn(Expr) -> Result<Length>,
) -> Result<()> {
    read_value(slot, key, input, |input| check(input.parse()?))
}

/// The literal that an expression is, also when a `macro_rules!` handed it on.
fn literal(expression: &Expr) -> Option<&Lit> {
    match expression {
        Expr::Lit(ExprLit { lit, .. }) => Some(lit),
        Expr::Group(group) => literal(&group.expr),
        _ => None,
    }
}

fn examples() -> String {
    let examples: Vec<_> = RULES.iter().map(|rule| format!("`{}`", rule.example)).collect();
    examples.join(", ")
}

fn unknown(word: &str, has_value: bool) -> String {
    if let Some(rule) = meant(word) {
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

/// The option that somebody who wrote `word` most likely had in mind.
fn meant(word: &str) -> Option<&'static Rule> {
    let synonym = RULES.iter().find(|rule| rule.also_called.contains(&word));
    synonym.or_else(|| {
        RULES
            .iter()
            .map(|rule| (edits(word, rule.key), rule))
            .filter(|(edits, rule)| edits * 2 <= rule.key.len().max(word.chars().count()))
            .min_by_key(|(edits, _)| *edits)
            .map(|(_, rule)| rule)
    })
}

/// How many letters have to be put in, left out or exchanged to get from one word to the other (Levenshtein).
fn edits(from: &str, to: &str) -> usize {
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

#[cfg(test)]
mod tests;
