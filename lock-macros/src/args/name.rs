//! The name of the lock.

use syn::ext::IdentExt;
use syn::parse::Parser;
use syn::spanned::Spanned;
use syn::{Error, Expr, Ident, Lit, LitStr, Result};

/// The limit of lock-db at run time. Literal text is checked against it at compile time.
const MAX_BYTES: usize = 255;

pub(crate) enum Name {
    /// A text without captures, checked, with its escaped braces resolved.
    Fixed(LitStr),
    /// A text for `format!` that captures arguments of the function.
    Format {
        text: LitStr,
        /// Whether one of them is `self`.
        captures_self: bool,
    },
    /// Any expression that is `AsRef<str>` or `Display`.
    Computed(Box<Expr>),
}

impl Name {
    pub(super) fn new(expression: Expr) -> Result<Self> {
        match super::literal(&expression) {
            None => Ok(Self::Computed(Box::new(expression))),
            Some(Lit::Str(text)) => Self::from_text(text),
            Some(_) => {
                Err(Error::new(expression.span(), "the name of a lock is a text: `\"order:{order_id}\"`"))
            }
        }
    }

    fn from_text(text: &LitStr) -> Result<Self> {
        let Pieces { fixed, captures } =
            Pieces::read(&text.value()).map_err(|message| Error::new(text.span(), message))?;
        let objection = if fixed.is_empty() && captures.is_empty() {
            Some("the name of a lock can't be empty".to_owned())
        } else if fixed.contains('\0') {
            Some("the name of a lock can't contain NUL".to_owned())
        } else if fixed.len() > MAX_BYTES {
            let length = fixed.len();
            Some(format!("the name of a lock has at most {MAX_BYTES} bytes, this text has {length}"))
        } else {
            None
        };
        if let Some(message) = objection {
            return Err(Error::new(text.span(), message));
        }
        if captures.is_empty() {
            return Ok(Self::Fixed(LitStr::new(&fixed, text.span())));
        }
        let captures_self = captures.iter().any(|capture| capture == "self");
        Ok(Self::Format { text: text.clone(), captures_self })
    }
}

/// A text for `format!`, taken apart.
struct Pieces {
    /// All text outside of captures.
    fixed: String,
    captures: Vec<String>,
}

impl Pieces {
    fn read(text: &str) -> std::result::Result<Self, String> {
        let mut pieces = Self { fixed: String::new(), captures: Vec::new() };
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            let (before, braces) = rest.split_at(at);
            pieces.fixed.push_str(before);
            if let Some(after) = braces.strip_prefix("{{") {
                pieces.fixed.push('{');
                rest = after;
            } else if let Some(after) = braces.strip_prefix("}}") {
                pieces.fixed.push('}');
                rest = after;
            } else if let Some(inside) = braces.strip_prefix('{') {
                let Some((capture, after)) = inside.split_once('}') else {
                    return Err("`{` without `}`: for a brace in the name write `{{`".to_owned());
                };
                pieces.captures.push(captured(capture)?.to_owned());
                rest = after;
            } else {
                return Err("`}` without `{`: for a brace in the name write `}}`".to_owned());
            }
        }
        pieces.fixed.push_str(rest);
        Ok(pieces)
    }
}

/// The argument in `argument` or `argument:format`. Other forms are refused here, because the
/// message of `format!` would refer to arguments that the attribute can't take.
fn captured(capture: &str) -> std::result::Result<&str, String> {
    let argument = capture.split_once(':').map_or(capture, |(argument, _)| argument).trim();
    if Ident::parse_any.parse_str(argument).is_ok() {
        Ok(argument)
    } else if argument.is_empty() || argument.chars().all(|letter| letter.is_ascii_digit()) {
        Err(format!(
            "`{{{capture}}}` has no argument to show: write the argument's name into the braces, `{{order_id}}`"
        ))
    } else {
        Err(format!(
            "`{{{capture}}}` is more than the name of an argument: write an expression instead of the text, `format!(\"…{{}}\", {argument})`"
        ))
    }
}
