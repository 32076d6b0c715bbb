//! The code that the attribute writes. It changes the body of the function in place and keeps the signature as it is.

mod function;
mod output;

use proc_macro2::{Delimiter, Group, Ident, Span, TokenStream, TokenTree};
use quote::{ToTokens, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{Expr, ItemFn, Result, Stmt, Type};

use self::function::AsyncBody;
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
    let bindings = function::async_trait_bindings(&function.sig);
    let block = function::async_block(&function.sig, &mut function.block)?;
    let output = output::of(&function.sig)?;
    let code = Code { args, output: output.as_ref() };
    block.stmts = code.locked(&function::split(block, bindings));
    Ok(function)
}

/// What the written code depends on.
struct Code<'a> {
    args: &'a Args,
    output: Option<&'a Type>,
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

impl Code<'_> {
    /// `lock_db::__private`; mistakes in how it is used are shown at the span.
    fn private(&self, span: Span) -> TokenStream {
        let given = self.args.options.lock_db.as_ref().map(|given| given.value.to_token_stream());
        let lock_db = given.unwrap_or_else(|| quote_spanned!(span=> ::lock_db));
        quote_spanned!(span=> #lock_db::__private)
    }

    /// The body: take the lock, run the statements under it, and return what came of it.
    fn locked(&self, body: &AsyncBody) -> Vec<Stmt> {
        let bindings = body.bindings;
        let taken = self.taken(body.receiver);
        let run = self.run(body);
        let refused = self.refused();
        // A lifetime that is too short is noticed here: it then points at the return type.
        let returned = quote_spanned! {self.at_output()=>
            match __outcome {
                ::core::result::Result::Ok(__output) => __output,
                ::core::result::Result::Err(__error) => #refused,
            }
        };
        let code = quote_spanned! {ours()=>
            #(#bindings)*
            let __taken = #taken;
            let __outcome = match __taken {
                ::core::result::Result::Ok(__held) => #run,
                ::core::result::Result::Err(__error) => ::core::result::Result::Err(__error),
            };
            #returned
        };
        vec![Stmt::Expr(Expr::Verbatim(code), None)]
    }

    /// Takes the lock. All that it evaluates is gone behind it, so that the body may move the arguments.
    fn taken(&self, receiver: Option<&Ident>) -> TokenStream {
        let private = self.private(ours());
        let options = &self.args.options;
        let locks = self.source(receiver);
        let name = self.name(receiver);
        let ttl = length(options.ttl.as_ref(), receiver);
        let wait = length(options.wait.as_ref(), receiver);
        let taken = match (options.mode(), &options.tx) {
            (Mode::Insert, _) => {
                quote_spanned!(ours()=> #private::insert(__locks, &*__name, #ttl, #wait).await)
            }
            (Mode::Row, None) => quote_spanned!(ours()=> #private::row(__locks, &*__name, #wait).await),
            (Mode::Row, Some(Given { value: tx, .. })) => {
                let tokens = with_receiver(tx, receiver);
                let (span, private) = (ours_at(tx), self.private(ours_at(tx)));
                quote_spanned!(span=> #private::row_in(__locks, &*__name, #wait, &mut *(#tokens)).await)
            }
        };
        quote_spanned! {ours()=>
            {
                let __locks = #locks;
                let __name = #name;
                #taken
            }
        }
    }

    /// Makes an output of an error. Nothing else needs the return type to have room for one: so a wrong type is reported
    /// once, there.
    fn refused(&self) -> TokenStream {
        let span = self.at_output();
        let private = self.private(span);
        let output = self.output.filter(|output| !output::contains_impl_trait(output));
        let output = output.map_or_else(|| quote_spanned!(span=> _), ToTokens::to_token_stream);
        quote_spanned!(span=> <#output as #private::LockedOutput>::refused(__error))
    }

    fn at_output(&self) -> Span {
        self.output.map_or_else(ours, ours_at)
    }

    fn source(&self, receiver: Option<&Ident>) -> TokenStream {
        let given = self.args.options.locks.as_ref().map(|given| &given.value);
        let span = given.map_or_else(ours, ours_at);
        let private = self.private(span);
        match given.map(|locks| with_receiver(locks, receiver)) {
            None => quote_spanned!(span=> #private::ambient()),
            Some(locks) => quote_spanned!(span=> #private::explicit(&(#locks))),
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
                let text = quote_spanned!(ours_at(expression.as_ref())=> ::core::convert::AsRef::<str>::as_ref(&(#tokens)));
                quote_spanned!(ours()=> ::std::string::String::from(#text))
            }
        }
    }

    /// Runs the body and ends the lock; in the caller's transaction there is nothing to end.
    ///
    /// The body is boxed: it would otherwise be copied into each future on the way, and functions with a lock that call
    /// one another would more than triple in size with each call.
    fn run(&self, body: &AsyncBody) -> TokenStream {
        let private = self.private(ours());
        // Items in front of other statements stay there: a lint wants them so.
        let items = body.statements.iter().take_while(|statement| matches!(statement, Stmt::Item(_))).count();
        let (items, statements) = body.statements.split_at(items);
        let return_edge = self.return_edge();
        let mut block = Group::new(Delimiter::Brace, quote!(#(#items)* #return_edge #(#statements)*));
        block.set_span(body.end);
        let run = if self.args.options.tx.is_some() {
            quote_spanned!(ours()=> ::core::result::Result::Ok(#private::run_in(__held, __body).await))
        } else {
            let outcome = quote_spanned!(ours()=> ::core::result::Result::Ok(__body.await));
            quote_spanned!(ours()=> #private::hold(__held, async move { #outcome }).await)
        };
        quote_spanned! {ours()=>
            {
                let __body = ::std::boxed::Box::pin(async move #block);
                #run
            }
        }
    }

    /// Never runs. It tells the compiler what the block returns before it looks at the statements: they may then rely on
    /// coercions as in a function.
    fn return_edge(&self) -> Option<TokenStream> {
        let output = output::erase_impl_trait(self.output?);
        Some(quote_spanned! {ours_at(&output)=>
            if let ::core::option::Option::Some(__output) = ::core::option::Option::None::<#output> {
                return __output;
            }
        })
    }
}

/// `Option<Duration>`.
fn length(given: Option<&Given<Length>>, receiver: Option<&Ident>) -> TokenStream {
    match given {
        None => quote_spanned!(ours()=> ::core::option::Option::None),
        Some(Given { value: Length::Fixed(length), .. }) => {
            let (seconds, nanoseconds) = (length.as_secs(), length.subsec_nanos());
            quote_spanned! {ours()=>
                ::core::option::Option::Some(::core::time::Duration::new(#seconds, #nanoseconds))
            }
        }
        Some(Given { value: Length::Computed(expression), key }) => {
            let tokens = with_receiver(expression, receiver);
            let duration = quote_spanned!(ours_at(key)=> ::core::time::Duration);
            quote_spanned! {ours()=>
                ::core::option::Option::Some({
                    let __duration: #duration = #tokens;
                    __duration
                })
            }
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
                    TokenTree::Ident(Ident::new(
                        &receiver.to_string(),
                        receiver.span().located_at(word.span()),
                    ))
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
