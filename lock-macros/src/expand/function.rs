//! Which functions the attribute can change, and where in them.

use std::mem;

use proc_macro2::{Ident, Span, TokenStream, TokenTree};
use quote::ToTokens;
use syn::parse::{ParseStream, Parser};
use syn::spanned::Spanned;
use syn::{
    Attribute, Block, Error, Expr, ExprAsync, ExprCall, FnArg, ItemFn, Local, Pat, Result, Signature, Stmt,
    Token, Type, Visibility,
};

/// The function, or an error about the item.
pub(super) fn parse(item: TokenStream) -> Result<ItemFn> {
    syn::parse2(item.clone()).map_err(|error| reason.parse2(item).unwrap_or(error))
}

/// Why the item is not a function with a body. Fails if syn's own message is better.
fn reason(input: ParseStream) -> Result<Error> {
    Attribute::parse_outer(input)?;
    input.parse::<Visibility>()?;
    if let Ok(signature) = input.fork().parse::<Signature>() {
        input.parse::<Signature>()?;
        input.parse::<Token![;]>()?;
        skip_rest(input)?;
        let message = "a method without a body has nothing to lock: put `#[distributed_lock]` on the \
                       implementations of the trait";
        return Ok(Error::new(signature.ident.span(), message));
    }
    let word = input.parse::<TokenTree>()?;
    skip_rest(input)?;
    let inside = match word.to_string().as_str() {
        "impl" | "trait" | "mod" => ": put it on the functions inside",
        _ => "",
    };
    let message = format!("`#[distributed_lock]` goes on an `async fn`, not on `{word}`{inside}");
    Ok(Error::new(word.span(), message))
}

fn skip_rest(input: ParseStream) -> Result<()> {
    input.parse::<TokenStream>().map(drop)
}

/// How a function is asynchronous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// Its output is the declared return type: an `async fn`, or a function that blocks on its
    /// `async` block.
    Awaited,
    /// It returns a future.
    Future,
}

/// The asynchronous body. This is the body of an `async fn`; the `async move { … }` that a function
/// returns, in a `Box::pin` or not, as `#[async_trait]` generates it; or the block that a runtime's
/// attribute generates.
pub(super) fn async_block<'a>(signature: &Signature, block: &'a mut Block) -> Result<(&'a mut Block, Shape)> {
    if signature.asyncness.is_some() {
        return Ok((block, Shape::Awaited));
    }
    if is_waited_for(block) {
        let waited_for = first_async(block).ok_or_else(|| not_async(signature))?;
        return Ok((waited_for, Shape::Awaited));
    }
    if let Some(constness) = &signature.constness {
        let message = "a `const fn` can't wait for a lock: make it an `async fn`";
        return Err(Error::new(constness.span, message));
    }
    let Some((Stmt::Expr(last, None), before)) = block.stmts.split_last_mut() else {
        return Err(not_async(signature));
    };
    let future = returned_future(last).ok_or_else(|| not_async(signature))?;
    if let Some(early) = before.iter().find(|statement| !matches!(statement, Stmt::Item(_))) {
        let message =
            "this would run without the lock, when the future is made: move it into the `async move` block";
        return Err(Error::new(early.span(), message));
    }
    match future.capture {
        Some(_) => Ok((&mut future.block, Shape::Future)),
        None => {
            Err(Error::new(future.async_token.span, "write `async move`: the future outlives the function"))
        }
    }
}

fn not_async(signature: &Signature) -> Error {
    let message = "only an `async fn` can wait for a lock, or a function that does nothing but return `async move { … }`, \
                   in a `Box::pin` or not; if another attribute has taken the `async` away, put `#[distributed_lock]` above it";
    Error::new(signature.fn_token.span, message)
}

/// `let body = async { … }; … block_on(body) …`, as `#[tokio::test]` and `#[tokio::main]` generate
/// it.
fn is_waited_for(block: &Block) -> bool {
    match (block.stmts.first(), block.stmts.last()) {
        (Some(Stmt::Local(Local { init: Some(init), .. })), Some(Stmt::Expr(last, _))) => {
            matches!(&*init.expr, Expr::Async(_)) && mentions(last.to_token_stream(), "block_on")
        }
        _ => false,
    }
}

fn first_async(block: &mut Block) -> Option<&mut Block> {
    let Some(Stmt::Local(Local { init: Some(init), .. })) = block.stmts.first_mut() else { return None };
    match &mut *init.expr {
        Expr::Async(future) => Some(&mut future.block),
        _ => None,
    }
}

fn mentions(tokens: TokenStream, word: &str) -> bool {
    tokens.into_iter().any(|token| match token {
        TokenTree::Ident(found) => found == word,
        TokenTree::Group(group) => mentions(group.stream(), word),
        _ => false,
    })
}

/// The block in `async { … }` or in `Box::pin(async { … })`.
fn returned_future(expression: &mut Expr) -> Option<&mut ExprAsync> {
    match expression {
        Expr::Async(future) => Some(future),
        Expr::Call(call) if is_box_pin(call) => match call.args.first_mut()? {
            Expr::Async(future) => Some(future),
            _ => None,
        },
        _ => None,
    }
}

/// Refuses a binding that would hide an argument of the same name.
pub(super) fn check_binding(signature: &Signature, lease: &Ident) -> Result<()> {
    let is_taken = signature.inputs.iter().any(|argument| match argument {
        FnArg::Typed(argument) => matches!(&*argument.pat, Pat::Ident(pattern) if pattern.ident == *lease),
        FnArg::Receiver(_) => false,
    });
    if is_taken {
        return Err(Error::new(lease.span(), format!("the function has an argument `{lease}` already")));
    }
    Ok(())
}

fn is_box_pin(call: &ExprCall) -> bool {
    let Expr::Path(function) = &*call.func else { return false };
    let mut segments = function.path.segments.iter().rev();
    call.args.len() == 1
        && segments.next().is_some_and(|segment| segment.ident == "pin")
        && segments.next().is_some_and(|segment| segment.ident == "Box")
}

/// An asynchronous body, in its parts.
pub(super) struct AsyncBody {
    /// The statements that `#[async_trait]` puts first, so that the arguments have their names from
    /// the source.
    pub(super) bindings: Vec<Stmt>,
    /// The name that `#[async_trait]` gives `self`.
    pub(super) receiver: Option<Ident>,
    pub(super) statements: Vec<Stmt>,
    /// The end of the body. Errors about a missing value point at it.
    pub(super) end: Span,
}

/// How many `let argument = argument;` an `#[async_trait]` generates for this function: one for
/// `self` and one for each argument that is not a reference. `None`: the function is not from
/// `#[async_trait]`.
pub(super) fn async_trait_bindings(signature: &Signature) -> Option<usize> {
    let is_async_trait =
        signature.generics.lifetimes().any(|parameter| parameter.lifetime.ident == "async_trait");
    let is_bound = |argument: &&FnArg| match argument {
        FnArg::Receiver(_) => true,
        FnArg::Typed(argument) => !matches!(*argument.ty, Type::Reference(_)),
    };
    is_async_trait.then(|| signature.inputs.iter().filter(is_bound).count())
}

/// Separates the statements of `#[async_trait]` from the body. If they are not as expected, another
/// attribute has already wrapped the body, and the arguments still have their own names.
pub(super) fn split(block: &mut Block, bindings: Option<usize>) -> AsyncBody {
    let end = end_of(block);
    let mut statements = mem::take(&mut block.stmts);
    let edge = usize::from(matches!(statements.first(), Some(Stmt::Expr(Expr::If(_), _))));
    let bound = bindings.map_or(0, |count| edge + count);
    if bound > statements.len() || !statements.iter().take(bound).skip(edge).all(is_binding) {
        return AsyncBody { bindings: Vec::new(), receiver: None, statements, end };
    }
    let behind = statements.split_off(bound);
    let receiver = statements.iter().find_map(|statement| match statement {
        Stmt::Local(local) => receiver(local).cloned(),
        _ => None,
    });
    AsyncBody { bindings: statements, receiver, statements: behind, end }
}

pub(super) fn end_of(block: &Block) -> Span {
    Span::mixed_site().located_at(block.brace_token.span.close())
}

/// `let x = x;` or `let (a, b) = { let __arg = __arg; __arg };`
fn is_binding(statement: &Stmt) -> bool {
    let Stmt::Local(Local { init: Some(init), .. }) = statement else { return false };
    match &*init.expr {
        Expr::Path(_) => true,
        Expr::Block(block) => matches!(
            &*block.block.stmts,
            [inner @ Stmt::Local(_), Stmt::Expr(Expr::Path(_), None)] if is_binding(inner)
        ),
        _ => false,
    }
}

/// The name in `let __self = self;`.
pub(super) fn receiver(local: &Local) -> Option<&Ident> {
    let (Pat::Ident(pattern), Some(init)) = (&local.pat, &local.init) else { return None };
    match &*init.expr {
        Expr::Path(path) if path.path.is_ident("self") => Some(&pattern.ident),
        _ => None,
    }
}
