//! The code that the attribute writes. It changes the body of the function in place and keeps the signature as it is.

mod function;
mod output;

use proc_macro2::{Group, Ident, Span, TokenStream, TokenTree};
use quote::{ToTokens, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{Expr, ItemFn, Result, Stmt, Type};

use self::function::{AsyncBody, Kind};
use crate::args::{Args, Given, Length, Mode, Name};

/// The function with its lock; or the errors, and the item as it was, so that its callers do not fail as well.
pub(crate) fn expand(args: TokenStream, item: &TokenStream) -> TokenStream {
    let parsed = match (syn::parse2::<Args>(args), function::parse(item.clone())) {
        (Ok(args), Ok(function)) => Ok((args, function)),
        (Err(error), Ok(_)) | (Ok(_), Err(error)) => Err(error),
        (Err(mut error), Err(other)) => {
            error.combine(other);
            Err(error)
        }
    };
    match parsed.and_then(|(args, function)| lock(&args, function)) {
        Ok(function) => function.into_token_stream(),
        Err(error) => {
            let errors = error.into_compile_error();
            quote!(#errors #item)
        }
    }
}

fn lock(args: &Args, mut function: ItemFn) -> Result<ItemFn> {
    let kind = function::kind(&function)?;
    let output = output::of(&function.sig, &kind)?;
    let code = Code::new(args, output.as_ref());
    match kind {
        Kind::Async => {
            let body = AsyncBody { bindings: &[], receiver: None, statements: &function.block.stmts };
            function.block.stmts = code.locked(&body);
        }
        Kind::Boxed => {
            let bindings = function::async_trait_bindings(&function);
            if let Some(block) = function::boxed_block(&mut function.block) {
                let body = function::split(&block.stmts, bindings);
                block.stmts = code.locked(&body);
            }
        }
    }
    Ok(function)
}

/// What the written code depends on.
struct Code<'a> {
    args: &'a Args,
    output: Option<&'a Type>,
    /// `lock_db::__private`.
    private: TokenStream,
}

/// The span of everything that is not the caller's: names of ours and of the caller can't meet, and lints know that
/// nobody wrote this.
fn ours() -> Span {
    Span::mixed_site()
}

/// As [`ours`], while messages of the compiler point at the caller's code.
fn ours_at(code: &impl ToTokens) -> Span {
    ours().located_at(code.span())
}

impl<'a> Code<'a> {
    fn new(args: &'a Args, output: Option<&'a Type>) -> Self {
        let lock_db = args.options.lock_db.as_ref().map(|given| given.value.to_token_stream());
        let lock_db = lock_db.unwrap_or_else(|| quote_spanned!(ours()=> ::lock_db));
        let private = quote_spanned!(ours()=> #lock_db::__private);
        Self { args, output, private }
    }

    /// The body: take the lock or return its error, then run the statements under it.
    fn locked(&self, body: &AsyncBody) -> Vec<Stmt> {
        let assertion = self.assertion();
        let bindings = body.bindings;
        let acquire = self.acquire(body.receiver);
        let run = self.run(body.statements);
        vec![Stmt::Expr(Expr::Verbatim(quote!(#assertion #(#bindings)* #acquire #run)), None)]
    }

    /// Says once, at the return type, that it has no room for the error of the lock.
    fn assertion(&self) -> Option<TokenStream> {
        let output = self.output.filter(|output| !output::contains_impl_trait(output))?;
        let private = &self.private;
        Some(quote_spanned!(ours_at(output)=> #private::assert_locked_output::<#output>();))
    }

    /// `let __held = …`. All that it evaluates is gone behind it, so that the body may move the arguments.
    fn acquire(&self, receiver: Option<&Ident>) -> TokenStream {
        let private = &self.private;
        let options = &self.args.options;
        let locks = self.source(receiver);
        let name = self.name(receiver);
        let wait = length(options.wait.as_ref(), receiver);
        let take = match (options.mode(), &options.tx) {
            (Mode::Insert, _) => {
                let ttl = length(options.ttl.as_ref(), receiver);
                quote_spanned!(ours()=> #private::insert(__locks, &*__name, #ttl, #wait))
            }
            (Mode::Row, None) => quote_spanned!(ours()=> #private::row(__locks, &*__name, #wait)),
            (Mode::Row, Some(Given { value: tx, .. })) => {
                let tx_tokens = with_receiver(tx, receiver);
                let tx = quote_spanned!(ours_at(tx)=> &mut *(#tx_tokens));
                quote_spanned!(ours()=> #private::row_in(__locks, &*__name, #wait, #tx))
            }
        };
        quote_spanned! {ours()=>
            let __held = {
                let __locks = #locks;
                let __name = #name;
                match #take.await {
                    ::core::result::Result::Ok(__held) => __held,
                    ::core::result::Result::Err(__error) => {
                        return #private::LockedOutput::refused(__error);
                    }
                }
            };
        }
    }

    fn source(&self, receiver: Option<&Ident>) -> TokenStream {
        let private = &self.private;
        match &self.args.options.locks {
            None => quote_spanned!(ours()=> #private::ambient()),
            Some(Given { value: locks, .. }) => {
                let tokens = with_receiver(locks, receiver);
                quote_spanned!(ours_at(locks)=> #private::explicit(&(#tokens)))
            }
        }
    }

    /// A `String` or a `&'static str`: nothing that is borrowed from the arguments, or can't be sent, is kept while the
    /// function waits for its lock.
    fn name(&self, receiver: Option<&Ident>) -> TokenStream {
        match &self.args.name {
            Name::Fixed(text) => text.to_token_stream(),
            Name::Format { text, captures_self: true } if receiver.is_some() => {
                let this = Ident::new("self", ours());
                quote_spanned!(ours()=> ::std::format!(#text, #this = #receiver))
            }
            Name::Format { text, .. } => quote_spanned!(ours()=> ::std::format!(#text)),
            Name::Computed(expression) => {
                let tokens = with_receiver(expression, receiver);
                let text = quote_spanned!(ours_at(expression)=> ::core::convert::AsRef::<str>::as_ref(&(#tokens)));
                quote_spanned!(ours()=> ::std::string::String::from(#text))
            }
        }
    }

    /// Runs the body and ends the lock; in the caller's transaction there is nothing to end.
    fn run(&self, statements: &[Stmt]) -> TokenStream {
        let private = &self.private;
        // Items in front of other statements stay there: a lint wants them so.
        let items = statements.iter().take_while(|statement| matches!(statement, Stmt::Item(_))).count();
        let (items, statements) = statements.split_at(items);
        let return_edge = self.return_edge();
        let body = quote_spanned!(ours()=> async move { #(#items)* #return_edge #(#statements)* });
        if self.args.options.tx.is_some() {
            quote_spanned!(ours()=> #body.await)
        } else {
            quote_spanned!(ours()=> #private::hold(__held, #body).await)
        }
    }

    /// Never runs. It tells the compiler what the block returns before it looks at the statements: they may then rely on
    /// coercions as in a function.
    fn return_edge(&self) -> Option<TokenStream> {
        let output = output::erase_impl_trait(self.output?);
        Some(quote_spanned! {ours()=>
            if let ::core::option::Option::Some(__output) = ::core::option::Option::None::<#output> {
                return __output;
            }
        })
    }
}

/// `Option<Duration>`.
fn length(given: Option<&Given<Length>>, receiver: Option<&Ident>) -> TokenStream {
    match given.map(|given| &given.value) {
        None => quote_spanned!(ours()=> ::core::option::Option::None),
        Some(Length::Fixed(length)) => {
            let (seconds, nanoseconds) = (length.as_secs(), length.subsec_nanos());
            quote_spanned! {ours()=>
                ::core::option::Option::Some(::core::time::Duration::new(#seconds, #nanoseconds))
            }
        }
        Some(Length::Computed(expression)) => {
            let tokens = with_receiver(expression, receiver);
            quote_spanned!(ours()=> ::core::option::Option::Some(#tokens))
        }
    }
}

/// The expression; where `#[async_trait]` has renamed `self`, with the new name.
fn with_receiver(expression: &Expr, receiver: Option<&Ident>) -> TokenStream {
    match receiver {
        None => expression.to_token_stream(),
        Some(receiver) => rename_self(expression.to_token_stream(), receiver),
    }
}

fn rename_self(tokens: TokenStream, receiver: &Ident) -> TokenStream {
    let mut renamed = Vec::new();
    let mut tokens = tokens.into_iter().peekable();
    while let Some(token) = tokens.next() {
        renamed.push(match token {
            TokenTree::Ident(word) => {
                // `self::function` is a path.
                let is_path = matches!(tokens.peek(), Some(TokenTree::Punct(next)) if next.as_char() == ':');
                if word == "self" && !is_path {
                    TokenTree::Ident(Ident::new(&receiver.to_string(), receiver.span().located_at(word.span())))
                } else {
                    TokenTree::Ident(word)
                }
            }
            TokenTree::Group(group) => {
                let mut inside = Group::new(group.delimiter(), rename_self(group.stream(), receiver));
                inside.set_span(group.span());
                TokenTree::Group(inside)
            }
            other => other,
        });
    }
    renamed.into_iter().collect()
}

#[cfg(test)]
mod tests;
