//! The code that the attribute writes. It changes the body of the function in place and keeps the signature as it is.

mod function;
mod output;

use proc_macro2::{Delimiter, Group, Ident, Span, TokenStream, TokenTree};
use quote::{ToTokens, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{Attribute, Expr, ItemFn, Result, Stmt, Type};

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
    match parsed.and_then(|(args, function)| lock(args, function)) {
        Ok(function) => function.into_token_stream(),
        Err(error) => {
            let errors = error.into_compile_error();
            quote!(#errors #item)
        }
    }
}

fn lock(args: Args, mut function: ItemFn) -> Result<ItemFn> {
    let mut locks = vec![args];
    locks.extend(further_locks(&mut function));
    for Given { value: lease, .. } in locks.iter().filter_map(|args| args.options.lease.as_ref()) {
        function::check_binding(&function.sig, lease)?;
    }
    let bindings = function::async_trait_bindings(&function.sig);
    let (block, shape) = function::async_block(&function.sig, &mut function.block)?;
    let output = output::of(&function.sig, shape)?;
    let mut body = function::split(block, bindings);
    for args in locks.iter().rev() {
        body.statements = Code { args, output: output.as_ref() }.locked(&body);
    }
    block.stmts = body.bindings.into_iter().chain(body.statements).collect();
    Ok(function)
}

/// The locks of the same function that are written below. By itself each attribute would wrap what those above it have
/// made, and so take its lock before them; who reads the source expects it the other way round.
fn further_locks(function: &mut ItemFn) -> Vec<Args> {
    let read = |attribute: &Attribute| -> Option<Args> {
        let path = attribute.path();
        // What can't be read stays where it is, and says so by itself.
        path.segments
            .last()
            .filter(|last| last.ident == "distributed_lock")
            .and_then(|_| attribute.parse_args().ok())
    };
    let mut locks = Vec::new();
    function.attrs.retain(|attribute| match read(attribute) {
        Some(args) => {
            locks.push(args);
            false
        }
        None => true,
    });
    locks
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
        let taken = self.taken(body.receiver.as_ref());
        let run = self.run(body);
        let refused = self.on_output("LockedOutput", "refused", &quote_spanned!(ours()=> __error));
        let not_refused = if self.args.options.skip.is_some() {
            let skipped = self.on_output("SkippableOutput", "skipped", &TokenStream::new());
            quote_spanned! {ours()=>
                ::core::result::Result::Ok(::core::option::Option::Some(__held)) => #run,
                ::core::result::Result::Ok(::core::option::Option::None) => ::core::result::Result::Ok(#skipped),
            }
        } else {
            quote_spanned!(ours()=> ::core::result::Result::Ok(__held) => #run,)
        };
        // A lifetime that is too short is noticed here: it then points at the return type.
        let returned = quote_spanned! {self.at_output()=>
            match __outcome {
                ::core::result::Result::Ok(__output) => __output,
                ::core::result::Result::Err(__error) => #refused,
            }
        };
        let code = quote_spanned! {ours()=>
            let __taken = #taken;
            let __outcome = match __taken {
                #not_refused
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
        let ask = self.ask(receiver);
        let taken = match (options.mode(), &options.tx) {
            (Mode::Insert, _) => quote_spanned!(ours()=> #private::insert(__locks, #ask).await),
            (Mode::Row, None) if options.lease.is_some() => {
                quote_spanned!(ours()=> #private::row_guard(__locks, #ask).await)
            }
            (Mode::Row, None) => quote_spanned!(ours()=> #private::row(__locks, #ask).await),
            (Mode::Row, Some(Given { value: tx, .. })) => {
                let tokens = with_receiver(tx, receiver);
                let (span, private) = (ours_at(tx), self.private(ours_at(tx)));
                quote_spanned!(span=> #private::row_in(__locks, #ask, &mut *(#tokens)).await)
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

    /// What is asked for: the name, and the options that were given.
    fn ask(&self, receiver: Option<&Ident>) -> TokenStream {
        let private = self.private(ours());
        let options = &self.args.options;
        let mut ask = quote_spanned!(ours()=> #private::ask(&*__name));
        for (method, given) in
            [("ttl", &options.ttl), ("wait", &options.wait), ("at_least", &options.at_least)]
        {
            if let Some(given) = given {
                let (method, length) = (Ident::new(method, ours()), length(given, receiver));
                ask.extend(quote_spanned!(ours()=> .#method(#length)));
            }
        }
        if matches!(options.reentrant, Some(Given { value: false, .. })) {
            ask.extend(quote_spanned!(ours()=> .not_reentrant()));
        }
        if options.lease.is_some() {
            ask.extend(quote_spanned!(ours()=> .with_lease()));
        }
        if options.skip.is_some() {
            ask.extend(quote_spanned!(ours()=> .or_skip()));
        }
        ask
    }

    /// Calls a function of a trait that the return type has to have. Nothing else needs the type to be of a certain form:
    /// so a wrong one is reported once, there.
    fn on_output(&self, of_trait: &str, function: &str, arguments: &TokenStream) -> TokenStream {
        let span = self.at_output();
        let private = self.private(span);
        let output = self.output.filter(|output| !output::contains_impl_trait(output));
        let output = output.map_or_else(|| quote_spanned!(span=> _), ToTokens::to_token_stream);
        let (of_trait, function) = (Ident::new(of_trait, span), Ident::new(function, span));
        quote_spanned!(span=> <#output as #private::#of_trait>::#function(#arguments))
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
                let span = ours_at(expression.as_ref());
                let private = self.private(span);
                quote_spanned!(span=> #private::name(&(#tokens)).lock_name())
            }
        }
    }

    /// Runs the body and ends the lock.
    ///
    /// The body is boxed: it would otherwise be copied into each future on the way, and functions with a lock that call
    /// one another would more than triple in size with each call.
    fn run(&self, body: &AsyncBody) -> TokenStream {
        // Items in front of other statements stay there: a lint wants them so.
        let items = body.statements.iter().take_while(|statement| matches!(statement, Stmt::Item(_))).count();
        let (items, statements) = body.statements.split_at(items);
        let return_edge = self.return_edge();
        let mut block = Group::new(Delimiter::Brace, quote!(#(#items)* #return_edge #(#statements)*));
        block.set_span(body.end);
        let body = quote_spanned!(ours()=> ::std::boxed::Box::pin(async move #block));
        let options = &self.args.options;
        let lease = options.lease.as_ref().map(|given| &given.value);
        match (options.mode(), &options.tx) {
            (Mode::Insert, _) => {
                let binding = lease.map(|lease| quote_spanned!(ours()=> let #lease = __held.lease();));
                quote_spanned! {ours()=>
                    {
                        #binding
                        let __body = #body;
                        let __outcome = __held.run(__body).await;
                        __held.end(__outcome).await
                    }
                }
            }
            (Mode::Row, None) => {
                let parts =
                    lease.map(|lease| quote_spanned!(ours()=> let mut __held = __held; let (#lease, __inside) = __held.parts();));
                let inside = if lease.is_some() { "__inside" } else { "__held" };
                let inside = Ident::new(inside, ours());
                let stands = self.on_output("LockedOutput", "stands", &quote_spanned!(ours()=> &__output));
                quote_spanned! {ours()=>
                    {
                        #parts
                        let __body = #body;
                        let __output = #inside.run(__body).await;
                        let __stands = #stands;
                        __held.end(__output, __stands).await
                    }
                }
            }
            // The transaction is the caller's, and so is its end.
            (Mode::Row, Some(_)) => quote_spanned! {ours()=>
                {
                    let __body = #body;
                    ::core::result::Result::Ok(__held.run(__body).await)
                }
            },
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

/// A `Duration`.
fn length(Given { value, key }: &Given<Length>, receiver: Option<&Ident>) -> TokenStream {
    match value {
        Length::Fixed(length) => {
            let (seconds, nanoseconds) = (length.as_secs(), length.subsec_nanos());
            quote_spanned!(ours()=> ::core::time::Duration::new(#seconds, #nanoseconds))
        }
        Length::Computed(expression) => {
            let tokens = with_receiver(expression, receiver);
            let duration = quote_spanned!(ours_at(key)=> ::core::time::Duration);
            quote_spanned!(ours()=> { let __duration: #duration = #tokens; __duration })
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
