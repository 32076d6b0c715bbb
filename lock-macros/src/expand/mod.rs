//! The code that the attribute generates. It changes the body of the function in place and keeps
//! the signature.

mod function;
mod further;
mod output;

use proc_macro2::{Delimiter, Group, Ident, Span, TokenStream, TokenTree};
use quote::{ToTokens, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{Expr, ItemFn, Result, Stmt, Type};

use self::function::AsyncBody;
use crate::args::{Args, Given, Length, Mode, Name};

/// Returns the function with its lock. After an error it returns the errors and the unchanged item,
/// so that callers of the function still compile.
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
    if let Some(Given { value: lease, .. }) = &args.options.lease {
        function::check_binding(&function.sig, lease)?;
    }
    let bindings = function::async_trait_bindings(&function.sig);
    let (block, shape) = function::async_block(&function.sig, &mut function.block)?;
    let output = output::of(&function.sig, shape)?;
    let code = Code { args, output };
    if !further::lock_inside(block, &code) {
        let body = function::split(block, bindings);
        let locked = code.locked(&body);
        block.stmts = body.bindings.into_iter().chain(locked).collect();
    }
    Ok(function)
}

/// What the generated code depends on.
struct Code {
    args: Args,
    output: Option<Type>,
}

/// The span of all code that is not the caller's. Our names and the caller's can't collide, and
/// lints see that the code is generated.
fn ours() -> Span {
    Span::mixed_site()
}

/// [`ours`], but compiler messages point at the caller's code.
fn ours_at(code: &impl ToTokens) -> Span {
    ours().located_at(code.span())
}

impl Code {
    /// The path `lock_db::__private`. Errors in its use are reported at the span.
    fn private(&self, span: Span) -> TokenStream {
        let given = self.args.options.lock_db.as_ref().map(|given| given.value.to_token_stream());
        let lock_db = given.unwrap_or_else(|| quote_spanned!(span=> ::lock_db));
        quote_spanned!(span=> #lock_db::__private)
    }

    /// The body: takes the lock, runs the statements under it, and returns their output.
    fn locked(&self, body: &AsyncBody) -> Vec<Stmt> {
        let options = &self.args.options;
        let code = match (options.mode(), &options.tx) {
            (Mode::Row, Some(Given { value: tx, .. })) => self.in_transaction(tx, body),
            (mode, _) => self.by_itself(mode, body),
        };
        // An error about a lifetime that is too short is reported here, so it points at the return
        // type.
        let returned = quote_spanned!(self.at_output()=> __output);
        vec![Stmt::Expr(Expr::Verbatim(quote_spanned!(ours()=> #code #returned)), None)]
    }

    /// A lock that the function takes and ends. All temporaries of this are dropped before the
    /// body, which may move the arguments.
    fn by_itself(&self, mode: Mode, body: &AsyncBody) -> TokenStream {
        let private = self.private(ours());
        let options = &self.args.options;
        let binds = options.lease.is_some();
        let take = match mode {
            Mode::Insert if binds => "insert_bound",
            Mode::Insert => "insert",
            Mode::Row if binds => "row_bound",
            Mode::Row => "row",
        };
        let run = match (mode, options.skip.is_some()) {
            (Mode::Insert, false) => "run",
            (Mode::Insert, true) => "run_or_skip",
            (Mode::Row, false) => "run_row",
            (Mode::Row, true) => "run_row_or_skip",
        };
        let (take, run) = (Ident::new(take, ours()), Ident::new(run, ours()));
        let ask = self.ask(body.receiver.as_ref());
        let bound = if binds {
            quote_spanned!(ours()=> (__lock, __binding))
        } else {
            quote_spanned!(ours()=> __lock)
        };
        let mut answers = self.on_output("LockedOutput", "refused");
        if mode == Mode::Row {
            let stands = self.on_output("LockedOutput", "stands");
            answers.extend(quote_spanned!(ours()=> , #stands));
        }
        if options.skip.is_some() {
            let skipped = self.on_output("SkippableOutput", "skipped");
            answers.extend(quote_spanned!(ours()=> , #skipped));
        }
        let body = self.body(body);
        quote_spanned! {ours()=>
            let #bound = { #ask #private::#take(__locks, __ask) };
            let __output = #private::#run(__lock, #body, #answers).await;
        }
    }

    /// A lock in the caller's transaction. It ends with that transaction.
    fn in_transaction(&self, tx: &Expr, body: &AsyncBody) -> TokenStream {
        let private = self.private(ours());
        let ask = self.ask(body.receiver.as_ref());
        let tokens = with_receiver(tx, body.receiver.as_ref());
        let at_tx = self.private(ours_at(tx));
        let span = ours_at(tx);
        let transaction = quote_spanned!(span=> #at_tx::transaction(&mut *(#tokens)));
        let connection = quote_spanned!(span=> __transaction.connection());
        let refused = self.on_output("LockedOutput", "refused");
        // Without `skip` the result is a lock or an error.
        let skipped = if self.args.options.skip.is_some() {
            let skipped = self.on_output("SkippableOutput", "skipped");
            quote_spanned!(ours()=> #skipped())
        } else {
            quote_spanned!(ours()=> #refused(#private::closed()))
        };
        let body = self.body(body);
        quote_spanned! {ours()=>
            let __held = {
                #ask
                let mut __transaction = #transaction;
                #private::row_in(__locks, __ask, #connection).await
            };
            let __output = match __held {
                ::core::result::Result::Ok(::core::option::Option::Some(__held)) => {
                    #private::run_in(__held, #body).await
                }
                ::core::result::Result::Ok(::core::option::Option::None) => #skipped,
                ::core::result::Result::Err(__error) => #refused(__error),
            };
        }
    }

    /// The request, as `__locks` and `__ask`: the name, and the options that were given.
    fn ask(&self, receiver: Option<&Ident>) -> TokenStream {
        let private = self.private(ours());
        let options = &self.args.options;
        let locks = self.source(receiver);
        let name = self.name(receiver);
        let mut calls = TokenStream::new();
        for (method, given) in [
            ("ttl", &options.ttl),
            ("wait", &options.wait),
            ("at_least", &options.at_least),
            ("at_most", &options.at_most),
        ] {
            if let Some(given) = given {
                let (method, length) = (Ident::new(method, ours()), length(given, receiver));
                calls.extend(quote_spanned!(ours()=> __ask.#method(#length);));
            }
        }
        if matches!(options.reentrant, Some(Given { value: false, .. })) {
            calls.extend(quote_spanned!(ours()=> __ask.not_reentrant();));
        }
        if options.skip.is_some() {
            calls.extend(quote_spanned!(ours()=> __ask.or_skip();));
        }
        let mutable = (!calls.is_empty()).then(|| quote_spanned!(ours()=> mut));
        quote_spanned! {ours()=>
            let __locks = #locks;
            let #mutable __ask = #private::ask(#name);
            #calls
        }
    }

    /// A function of a trait that the return type must implement. Nothing else requires the type to
    /// have a certain form, so a wrong type is reported once, there.
    fn on_output(&self, of_trait: &str, function: &str) -> TokenStream {
        let span = self.at_output();
        let private = self.private(span);
        let output = self.output.as_ref().filter(|output| !output::contains_impl_trait(output));
        let output = output.map_or_else(|| quote_spanned!(span=> _), ToTokens::to_token_stream);
        let (of_trait, function) = (Ident::new(of_trait, span), Ident::new(function, span));
        quote_spanned!(span=> <#output as #private::#of_trait>::#function)
    }

    fn at_output(&self) -> Span {
        self.output.as_ref().map_or_else(ours, ours_at)
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

    /// A `String` or a `&'static str`. While the function waits for its lock, it keeps nothing that
    /// borrows from the arguments or is not `Send`.
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

    /// The body, as a future. The call that takes it as an argument boxes it. Otherwise it would be
    /// copied into each future in between, and functions with a lock that call one another would
    /// more than triple in size with each call.
    ///
    /// `further.rs` knows the forms of the code that is written here.
    fn body(&self, body: &AsyncBody) -> TokenStream {
        // Items before other statements stay there, because of a lint.
        let items = body.statements.iter().take_while(|statement| matches!(statement, Stmt::Item(_))).count();
        let (items, statements) = body.statements.split_at(items);
        let return_edge = self.return_edge();
        let mut block = Group::new(Delimiter::Brace, quote!(#(#items)* #return_edge #(#statements)*));
        block.set_span(body.end);
        let Some(Given { value: lease, .. }) = &self.args.options.lease else {
            return quote_spanned!(ours()=> async move #block);
        };
        let (bound, reference) = match self.args.options.mode() {
            Mode::Insert => (quote_spanned!(ours()=> __bound), quote_spanned!(ours()=> &*__bound)),
            Mode::Row => (quote_spanned!(ours()=> mut __bound), quote_spanned!(ours()=> &mut *__bound)),
        };
        // The type allows the same coercions as for the value that a function returns.
        let of_type = self.output.as_ref().map(|output| {
            let output = output::erase_impl_trait(output);
            quote_spanned!(ours()=> : #output)
        });
        // The last expression of the body may borrow from the guard. Its temporaries are dropped
        // with this statement, and so before the guard, in older editions as well.
        quote_spanned! {ours()=>
            async move {
                let #bound = __binding.bound();
                let #lease = #reference;
                let __output #of_type = #block;
                #[allow(unreachable_code)]
                __output
            }
        }
    }

    /// Never runs. It tells the compiler the type of the block before the statements are checked,
    /// so they may rely on the same coercions as in a function.
    fn return_edge(&self) -> Option<TokenStream> {
        let output = output::erase_impl_trait(self.output.as_ref()?);
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

/// The expression, with the new name of `self` where `#[async_trait]` has renamed it.
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
