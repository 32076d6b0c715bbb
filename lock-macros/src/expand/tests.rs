#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;

fn written(args: &str, item: &str) -> String {
    expand(args.parse().unwrap(), &item.parse().unwrap()).to_string()
}

/// The generated item, which must be a function with an unchanged signature.
#[track_caller]
fn function(args: &str, item: &str) -> String {
    let code = written(args, item);
    assert!(!code.contains("compile_error"), "{code}");
    let before: ItemFn = syn::parse_str(item).unwrap();
    let after: ItemFn = syn::parse_str(&code).unwrap_or_else(|error| panic!("{error}: {code}"));
    assert_eq!(before.sig.to_token_stream().to_string(), after.sig.to_token_stream().to_string());
    code
}

/// Refused with these messages, and with the item unchanged.
#[track_caller]
fn refused(args: &str, item: &str, messages: &[&str]) {
    let code = written(args, item);
    for message in messages {
        assert!(code.contains(&format!("{message:?}")), "not `{message}`: {code}");
    }
    assert_eq!(code.matches("compile_error").count(), messages.len(), "{code}");
    assert!(code.ends_with(&item.parse::<TokenStream>().unwrap().to_string()), "{code}");
}

/// What the errors for an item point at.
fn points_at(item: &str) -> String {
    let args = syn::parse_str::<Args>(r#""a""#).unwrap();
    let error = function::parse(item.parse().unwrap()).and_then(|function| lock(args, function));
    error.err().unwrap().span().source_text().unwrap()
}

#[track_caller]
fn in_order(code: &str, parts: &[&str]) {
    let mut rest = code;
    for part in parts {
        let at = rest.find(part).unwrap_or_else(|| panic!("`{part}` is missing or out of order: {code}"));
        rest = &rest[at..];
    }
}

const FUNCTION: &str = "async fn f(id: i64) -> Result<i64, Error> { Ok(id) }";

const PRIVATE: &str = ":: lock_db :: __private ::";

#[test]
fn an_insert_lock() {
    let code = function(r#""a:{id}", ttl = "1500ms""#, FUNCTION);
    let order = [
        "let __locks = :: lock_db :: __private :: ambient () ;",
        r#"let mut __ask = :: lock_db :: __private :: ask (:: std :: format ! ("a:{id}")) ;"#,
        "__ask . ttl (:: core :: time :: Duration :: new (1u64 , 500000000u32)) ;",
        ":: lock_db :: __private :: insert (__locks , __ask)",
        ":: lock_db :: __private :: run (__lock , async move {",
        "< Result < i64 , Error > as :: lock_db :: __private :: LockedOutput > :: refused) . await",
        "__output",
    ];
    in_order(&code, &order);
    assert!(!code.contains("__bound"), "{code}");
    let code = function(r#""a", at_least = "1s", at_most = "2s", wait = WAIT"#, FUNCTION);
    in_order(&code, &["__ask . wait (", "__ask . at_least (", "__ask . at_most ("]);
}

#[test]
fn row_locks() {
    let code = function(r#""a", mode = row"#, FUNCTION);
    let order = [
        "__private :: row (__locks",
        "__private :: run_row (__lock , async move",
        ":: refused , <",
        ":: stands)",
    ];
    in_order(&code, &order);
    let code = function(r#""a", mode = row, tx = tx"#, FUNCTION);
    let order = [
        "__private :: transaction (& mut * (tx))",
        "__private :: row_in (__locks , __ask , __transaction . connection ()) . await",
        "__private :: run_in (__held , async move",
    ];
    in_order(&code, &order);
}

#[test]
fn guards_for_the_body() {
    let code = function(r#""a", lease = lease"#, FUNCTION);
    let order = [
        "let (__lock , __binding) = {",
        "insert_bound (__locks , __ask)",
        "async move { let __bound = __binding . bound () ; let lease = & * __bound ; let __output : Result < i64 , Error > = {",
    ];
    in_order(&code, &order);
    let code = function(r#""a", lease = guard, mode = row, locks = locks"#, FUNCTION);
    in_order(&code, &["row_bound (__locks", "let mut __bound", "let guard = & mut * __bound ;"]);
    refused(r#""a", lease = id"#, FUNCTION, &["the function has an argument `id` already"]);
}

#[test]
fn skipping_and_entering_again() {
    let code = function(r#""a", skip"#, FUNCTION);
    assert!(code.contains("__ask . or_skip () ;"), "{code}");
    let skipped = format!("< Result < i64 , Error > as {PRIVATE} SkippableOutput > :: skipped");
    in_order(&code, &["run_or_skip (__lock , async move", ":: refused ,", &skipped]);
    let code = function(r#""a", skip, mode = row"#, FUNCTION);
    in_order(&code, &["run_row_or_skip (__lock , async move", ":: refused ,", ":: stands ,", ":: skipped"]);
    let code = function(r#""a", reentrant = false, wait = self.wait, skip"#, FUNCTION);
    assert!(code.contains("__ask . not_reentrant () ; __ask . or_skip () ;"), "{code}");
    let code = function(r#""a", reentrant = true"#, FUNCTION);
    assert!(!code.contains("reentrant") && !code.contains("skip"), "{code}");
}

/// As the compiler does it: each attribute gets what the one above it has produced.
fn below(upper: &str, lower: &str, item: &str) -> String {
    let code = function(upper, item);
    function(lower, &code)
}

#[test]
fn several_locks_are_taken_from_the_top_down() {
    // Whatever the name of the lower one is.
    let item = "#[first] #[locked(\"b\", ttl = \"1s\")] async fn f() -> R { work() }";
    assert!(function(r#""a""#, item).starts_with(r#"# [first] # [locked ("b" , ttl = "1s")] async fn f"#));

    for (options, last) in
        [("", ""), (", lease = lease", ", lease = lease"), ("", ", mode = row, tx = tx"), (", skip", "")]
    {
        let item = "async fn f() -> R { const A: u8 = 1; work() }";
        let code = below(&format!("\"a\"{options}"), &format!("\"b\"{options}"), item);
        let code = function(&format!("\"c\"{last}"), &code);
        let order = ["ask (\"a\")", "ask (\"b\")", "ask (\"c\")", "const A", "None :: < R >", "work ()"];
        in_order(&code, &order);
        assert_eq!(code.matches("None :: < R >").count(), 3, "one for each body: {code}");
    }

    // The name of the lower lock uses the guard of the upper one.
    let code = below(r#""a", lease = upper"#, "upper.name()", "async fn f() -> R { work() }");
    in_order(&code, &["let upper =", "(upper . name ())", "work ()"]);
}

#[test]
fn several_locks_with_other_attributes_between() {
    let code = below("self.first()", "self.second()", ASYNC_TRAIT);
    in_order(&code, &["let (a , b)", "(__self . first ())", "(__self . second ())", "let __ret : R"]);

    // As `#[tracing::instrument]` wraps it: on the outside, `self` has its own name again.
    let code = function("self.first()", ASYNC_TRAIT);
    let (before, after) = code.split_once("async move {").unwrap();
    let (inside, behind) = after.rsplit_once("})").unwrap();
    let instrumented =
        format!("{before} async move {{ let span = span!(); async move {{ {inside} }}.await }}) {behind}");
    let code = function("self.second()", &instrumented);
    let order = ["let span", "let (a , b)", "(__self . first ())", "(__self . second ())", "let __ret : R"];
    in_order(&code, &order);

    // As `#[tokio::test]` generates it.
    let code = function("first()", "async fn f() -> Result<(), E> { work() }");
    let (_, body) = code.split_once('{').unwrap();
    let waited_for =
        format!("fn f() -> Result<(), E> {{ let body = async {{ {body}; return block_on(body); }}");
    let code = function("second()", &waited_for);
    in_order(&code, &["let body = async {", "(first ())", "(second ())", "work ()", "block_on"]);
}

/// Code that only looks like a lock.
#[test]
fn code_of_others_is_no_lock() {
    let item = "async fn f() -> R { async fn inner() -> R { lock_db::__private::run(a, async move { b() }, c).await } run(a, async move { d() }).await }";
    let code = function(r#""a""#, item);
    in_order(&code, &["ask (\"a\")", "async fn inner", "b ()", "d ()"]);
}

#[test]
fn an_expression_as_name() {
    let code = function("order.name()", FUNCTION);
    assert!(code.contains(&format!("{PRIVATE} name (& (order . name ())) . lock_name ()")), "{code}");
}

#[test]
fn another_path_to_the_crate() {
    let code = function(r#""a", crate = crate::outer::lock_db, locks = self.locks"#, FUNCTION);
    assert!(code.contains("crate :: outer :: lock_db :: __private :: insert"), "{code}");
    assert!(code.contains("crate :: outer :: lock_db :: __private :: explicit (& (self . locks))"), "{code}");
    assert!(!code.contains(":: lock_db :: __private :: ambient"), "{code}");
}

#[test]
fn attributes_and_items_keep_their_places() {
    let item = "/// Text.\n#[must_use] pub(crate) async fn f() -> R { #![allow(unused)] const A: u8 = 1; use b::C; \
                work(); Ok(()) }";
    let code = function(r#""a""#, item);
    assert!(code.starts_with("# [doc"), "{code}");
    let order = ["# ! [allow (unused)]", "__ask", "const A", "use b :: C", "if let", "work ()"];
    let places: Vec<_> = order.iter().map(|part| code.find(part).unwrap()).collect();
    assert!(places.is_sorted(), "{code}");
}

#[test]
fn impl_trait_is_not_named_in_the_body() {
    let code = function(r#""a""#, "async fn f() -> Result<Vec<impl Iterator<Item = u8>>, E> { Ok(vec![]) }");
    assert_eq!(code.matches("impl").count(), 1, "{code}");
    assert!(code.contains("None :: < Result < Vec < _ > , E > >"), "{code}");
    assert!(code.contains("< _ as :: lock_db :: __private :: LockedOutput > :: refused)"), "{code}");
}

/// As `#[async_trait]` generates it.
const ASYNC_TRAIT: &str = "
    fn f<'life0, 'life1, 'async_trait>(&'life0 mut self, text: &'life1 str, __arg2: (u8, u8))
        -> ::core::pin::Pin<Box<dyn ::core::future::Future<Output = R> + ::core::marker::Send + 'async_trait>>
    where 'life0: 'async_trait, 'life1: 'async_trait, Self: 'async_trait
    {
        Box::pin(async move {
            if let ::core::option::Option::Some(__ret) = ::core::option::Option::None::<R> {
                #[allow(unreachable_code)]
                return __ret;
            }
            let mut __self = self;
            let (a, b) = { let __arg2 = __arg2; __arg2 };
            let __ret: R = { let c = d; __self.work(c).await };
            #[allow(unreachable_code)]
            __ret
        })
    }";

#[test]
fn async_trait_functions() {
    let code = function("self.name(self::PREFIX, a), locks = { self.locks }", ASYNC_TRAIT);
    let order = [
        "let mut __self = self",
        "let (a , b)",
        "explicit (& ({ __self . locks }))",
        "__self . name (self :: PREFIX , a)",
        "insert",
        "None :: < R >",
        "let __ret : R",
    ];
    in_order(&code, &order);
    assert!(code.contains("Box :: pin (async move"), "{code}");

    let code = function(r#""a:{self}""#, ASYNC_TRAIT);
    assert!(code.contains(r#"format ! ("a:{self}" , self = __self)"#), "{code}");
}

#[test]
fn boxed_functions_that_another_attribute_has_wrapped() {
    let wrapped =
        ASYNC_TRAIT.replace("let mut __self = self;", "let span = span!(); let future = async move {};");
    let code = function("self.name()", &wrapped);
    assert!(code.contains("self . name ()") && !code.contains("__self . name ()"), "{code}");

    let by_hand = "fn f(&self) -> BoxFuture<'_, R> { Box::pin(async move { let a = b; Ok(a) }) }";
    let code = function("self.name()", by_hand);
    assert!(code.find("insert").unwrap() < code.find("let a = b").unwrap(), "{code}");
}

#[test]
fn functions_that_return_a_future() {
    let code = function(
        r#""a""#,
        "fn f(&self) -> impl Future<Output = Result<u8, E>> + Send { use b::C; async move { let a = b; Ok(a) } }",
    );
    let order = ["use b :: C", "async move", "insert", "None :: < Result < u8 , E > >", "let a = b"];
    let places: Vec<_> = order.iter().map(|part| code.find(part).unwrap()).collect();
    assert!(places.is_sorted(), "{code}");
}

#[test]
fn functions_that_another_attribute_has_made_to_wait() {
    // As `#[tokio::test]` generates it.
    let item = "fn f() -> Result<(), E> {
        let body = async { work().await; Ok(()) };
        tokio::pin!(body);
        let body: Pin<&mut dyn Future<Output = Result<(), E>>> = body;
        #[allow(clippy::expect_used)]
        { use tokio::runtime::Builder; return Builder::new_current_thread().build().block_on(body); }
    }";
    let code = function(r#""a""#, item);
    let order = ["let body = async {", "insert", "None :: < Result < () , E > >", "work ()", "block_on"];
    let places: Vec<_> = order.iter().map(|part| code.find(part).unwrap()).collect();
    assert!(places.is_sorted(), "{code}");
}

const NOT_ASYNC: &str = "only an `async fn` can wait for a lock, or a function that does nothing but return `async move { \
                         … }`, in a `Box::pin` or not; if another attribute has taken the `async` away, put \
                         `#[distributed_lock]` above it";
const NOTHING: &str = "a locked function must return `Result<_, E>` where `E: From<lock_db::Error>`: this one \
                       returns nothing, so it can't say that there was no lock";

#[test]
fn functions_that_can_not_wait() {
    refused(r#""a""#, "fn f() -> R { Ok(()) }", &[NOT_ASYNC]);
    assert_eq!(points_at("pub fn f() -> R { Ok(()) }"), "fn");
    refused(r#""a""#, "fn f() -> BoxFuture<R> { Rc::pin(async move { Ok(()) }) }", &[NOT_ASYNC]);
    let early =
        "this would run without the lock, when the future is made: move it into the `async move` block";
    for item in [
        "fn f() -> BoxFuture<R> { work(); Box::pin(async move { Ok(()) }) }",
        "fn f() -> impl Future<Output = R> { work(); async move { Ok(()) } }",
    ] {
        refused(r#""a""#, item, &[early]);
        assert_eq!(points_at(item), "work();");
    }
    let outlives = "write `async move`: the future outlives the function";
    refused(r#""a""#, "fn f() -> BoxFuture<R> { Box::pin(async { Ok(()) }) }", &[outlives]);
    refused(r#""a""#, "fn f() -> impl Future<Output = R> { async { Ok(()) } }", &[outlives]);
    refused(
        r#""a""#,
        "const fn f() -> R { }",
        &["a `const fn` can't wait for a lock: make it an `async fn`"],
    );
    assert_eq!(points_at("pub const fn f() -> R {}"), "const");
}

#[test]
fn functions_that_return_nothing() {
    for item in ["async fn f() {}", "async fn f() -> () {}", "async fn f() -> (()) {}"] {
        refused(r#""a""#, item, &[NOTHING]);
        assert_eq!(points_at(item), "f");
    }
    refused(r#""a""#, &ASYNC_TRAIT.replace("Output = R", "Output = ()"), &[NOTHING]);
}

#[test]
fn other_items() {
    let not_on = |word: &str| format!("`#[distributed_lock]` goes on an `async fn`, not on `{word}`");
    refused(r#""a""#, "/// Text.\n#[derive(Debug)] pub struct A { b: u8 }", &[&not_on("struct")]);
    assert_eq!(points_at("/// Text.\npub struct A { b: u8 }"), "struct");
    refused(r#""a""#, "const A: u8 = 1;", &[&not_on("const")]);
    for (item, word) in [("impl A {}", "impl"), ("pub trait A {}", "trait"), ("mod a {}", "mod")] {
        refused(r#""a""#, item, &[&format!("{}: put it on the functions inside", not_on(word))]);
    }
    let no_body = "a method without a body has nothing to lock: put `#[distributed_lock]` on the implementations \
                   of the trait";
    refused(r#""a""#, "async fn f(&self) -> R;", &[no_body]);
    assert_eq!(points_at("#[must_use] async unsafe fn f(&self) -> R;"), "f");
}

#[test]
fn mistakes_in_the_arguments_leave_the_function() {
    refused(r#""a", tll = "3s""#, FUNCTION, &["unknown option `tll`; did you mean `ttl`?"]);
    let needed = r#"a lock needs a name, before any option: `#[distributed_lock("order:{order_id}")]`"#;
    refused("", FUNCTION, &[needed]);
    let both =
        ["the name of a lock can't be empty", "`#[distributed_lock]` goes on an `async fn`, not on `enum`"];
    refused(r#""""#, "enum A {}", &both);
}
