//! The grammar of the attribute's arguments: `NAME [, key = value | , flag]* [,]`.

mod duration;
mod name;
mod rules;

use proc_macro2::Span;
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream};
use syn::{Error, Expr, ExprLit, Ident, Lit, LitStr, Path, Result, Token};

pub(crate) use self::duration::Length;
pub(crate) use self::name::Name;
use self::rules::{RULES, examples, unknown};

/// The arguments of the attribute.
pub(crate) struct Args {
    pub(crate) name: Name,
    pub(crate) options: Options,
}

/// The options after the name.
#[derive(Default)]
pub(crate) struct Options {
    pub(crate) ttl: Option<Given<Length>>,
    pub(crate) wait: Option<Given<Length>>,
    pub(crate) at_least: Option<Given<Length>>,
    pub(crate) at_most: Option<Given<Length>>,
    pub(crate) mode: Option<Given<Mode>>,
    pub(crate) locks: Option<Given<Expr>>,
    pub(crate) tx: Option<Given<Expr>>,
    pub(crate) lease: Option<Given<Ident>>,
    /// A flag: given or not.
    pub(crate) skip: Option<Given<()>>,
    pub(crate) reentrant: Option<Given<bool>>,
    pub(crate) lock_db: Option<Given<Path>>,
}

/// An option with its key. Messages about the option point at the key.
pub(crate) struct Given<T> {
    pub(crate) key: Ident,
    pub(crate) value: T,
}

/// The kind of lock that the function runs under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Insert,
    Row,
}

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
    // `key = value` is also the start of an assignment expression, but an assignment is never a
    // name.
    if input.peek(Ident::peek_any) && input.peek2(Token![=]) && !input.peek2(Token![==]) {
        let key = input.call(Ident::parse_any)?;
        let message = if ["name", "key", "keys"].contains(&key.to_string().as_str()) {
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

    /// Checks that concern more than one option.
    fn check(&self) -> Result<()> {
        match (self.mode(), &self.tx) {
            (Mode::Insert, Some(tx)) => {
                let objection =
                    "only a row lock is held by a transaction: write `mode = row` as well, or leave `tx` out";
                return Err(Error::new(tx.key.span(), objection));
            }
            (Mode::Insert, None) => self.check_lengths()?,
            (Mode::Row, _) => self.check_row()?,
        }
        if self.tx.is_some() { self.check_transaction() } else { Ok(()) }
    }

    /// Compares lengths that are known at compile time.
    fn check_lengths(&self) -> Result<()> {
        let fixed = |given: &Option<Given<Length>>| match given {
            Some(Given { value: Length::Fixed(length), .. }) => Some(*length),
            _ => None,
        };
        match (&self.at_most, fixed(&self.at_least), fixed(&self.at_most)) {
            (Some(Given { key, .. }), Some(at_least), Some(at_most)) if at_most < at_least => {
                Err(Error::new(key.span(), "`at_most` is shorter than `at_least`"))
            }
            _ => Ok(()),
        }
    }

    fn check_row(&self) -> Result<()> {
        for (given, objection) in [
            (&self.ttl, "a row lock has no `ttl`: it ends with its transaction"),
            (&self.at_least, "a row lock can't be kept `at_least` so long: it ends with its transaction"),
            (&self.at_most, "a row lock can't be taken back after `at_most`: it ends with its transaction"),
        ] {
            if let Some(given) = given {
                return Err(Error::new(given.key.span(), objection));
            }
        }
        match &self.lease {
            Some(lease) if self.locks.is_none() && self.tx.is_none() => Err(Error::new(
                lease.key.span(),
                "the guard of a row lock is the connection to one kind of database, which the ambient `Locks` does \
                 not tell: name them, `locks = …`",
            )),
            _ => Ok(()),
        }
    }

    fn check_transaction(&self) -> Result<()> {
        if let Some(lease) = &self.lease {
            let objection = "there is no guard to bind: your own transaction holds the lock";
            return Err(Error::new(lease.key.span(), objection));
        }
        match &self.reentrant {
            Some(Given { key, value: false }) => {
                let objection = "a transaction always takes its own locks again: they last until it ends, not until \
                                 the function does";
                Err(Error::new(key.span(), objection))
            }
            _ => Ok(()),
        }
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

/// The literal of an expression, also when a `macro_rules!` macro passed it on.
fn literal(expression: &Expr) -> Option<&Lit> {
    match expression {
        Expr::Lit(ExprLit { lit, .. }) => Some(lit),
        Expr::Group(group) => literal(&group.expr),
        _ => None,
    }
}

#[cfg(test)]
mod any_input_tests;
#[cfg(test)]
mod tests;
