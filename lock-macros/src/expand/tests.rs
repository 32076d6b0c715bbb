#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;

fn written(args: &str, item: &str) -> String {
    expand(args.parse().unwrap(), &item.parse().unwrap()).to_string()
}

/// The written function, which must be one, with the signature as it was.
#[track_caller]
fn function(args: &str, item: &str) -> String {
    let code = written(args, item);
    assert!(!code.contains("compile_error"), "{code}");
    let before: ItemFn = syn::parse_str(item).unwrap();
    let after: ItemFn = syn::parse_str(&code).unwrap_or_else(|error| panic!("{error}: {code}"));
    assert_eq!(before.sig.to_token_stream().to_string(), after.sig.to_token_stream().to_string());
    code
}

/// Refused with these messages, and with the item as it was.
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

const FUNCTION: &str = "async fn f(id: i64) -> Result<i64, Error> { Ok(id) }";

const PRIVATE: &str = ":: lock_db :: __private ::";

#[test]
fn an_insert_lock() {
    let code = function(r#""a:{id}", ttl = "1500ms""#, FUNCTION);
    let taken = format!(
        "{PRIVATE} insert (__locks , {PRIVATE} ask (& * __name) . ttl (:: core :: time :: Duration :: new (1u64 , \
         500000000u32))) . await"
    );
    assert!(code.contains(&taken), "{code}");
    assert!(code.contains(":: lock_db :: __private :: ambient ()"), "{code}");
    assert!(code.contains(r#":: std :: format ! ("a:{id}")"#), "{code}");
    assert!(code.contains("__held . run (__body) . await"), "{code}");
    assert!(!code.contains("__held . lease"), "{code}");
}

#[test]
fn row_locks() {
    let code = function(r#""a", mode = row"#, FUNCTION);
    assert!(code.contains("__private :: row (__locks"), "{code}");
    assert!(code.contains("__held . end (__output , __stands)"), "{code}");
    let code = function(r#""a", mode = row, tx = tx"#, FUNCTION);
    assert!(code.contains("__private :: row_in (__locks") && code.contains("& mut * (tx)"), "{code}");
    assert!(code.contains("Ok (__held . run (__body) . await)"), "{code}");
    assert!(!code.contains("__held . end"), "{code}");
}

#[test]
fn guards_for_the_body() {
    let code = function(r#""a", lease = lease"#, FUNCTION);
    assert!(code.contains("ask (& * __name) . with_lease ()"), "{code}");
    assert!(code.contains("let lease = __held . lease () ; let __body ="), "{code}");
    let code = function(r#""a", lease = guard, mode = row, locks = locks"#, FUNCTION);
    assert!(code.contains("__private :: row_guard (__locks"), "{code}");
    assert!(code.contains("let (guard , __inside) = __held . parts () ; let __body ="), "{code}");
    refused(r#""a", lease = id"#, FUNCTION, &["the function has an argument `id` already"]);
}

#[test]
fn skipping_and_entering_again() {
    let code = function(r#""a", skip"#, FUNCTION);
    assert!(code.contains("ask (& * __name) . or_skip ()"), "{code}");
    let skipped = format!("< Result < i64 , Error > as {PRIVATE} SkippableOutput > :: skipped ()");
    assert!(code.contains(&skipped), "{code}");
    let code = function(r#""a", reentrant = false, wait = self.wait, skip"#, FUNCTION);
    assert!(code.contains(". not_reentrant () . or_skip ()"), "{code}");
    let code = function(r#""a", reentrant = true"#, FUNCTION);
    assert!(!code.contains("reentrant") && !code.contains("skip"), "{code}");
}

#[test]
fn several_locks_are_taken_from_the_top_down() {
    let item = "#[first] #[lock_db::distributed_lock(\"b\", ttl = \"1s\")] #[second] #[distributed_lock(\"c\", skip)] \
                async fn f() -> R { work() }";
    let code = function(r#""a""#, item);
    let order = ["# [first] # [second]", "__name = \"a\"", "__name = \"b\"", "__name = \"c\"", "work ()"];
    let places: Vec<_> = order.iter().map(|part| code.find(part).unwrap()).collect();
    assert!(places.is_sorted() && !code.contains("distributed_lock"), "{code}");

    // One that is wrong says so itself, once.
    let code =
        function(r#""a""#, "#[distributed_lock(tll)] #[distributed_lock] async fn f() -> R { work() }");
    assert!(code.starts_with("# [distributed_lock] async"), "{code}");
    let code = function(r#""a""#, "#[distributed_lock(1)] async fn f() -> R { work() }");
    assert!(code.starts_with("# [distributed_lock (1)] async"), "{code}");

    let code = function(
        "self.name()",
        &format!("#[distributed_lock(\"b:{{self}}\", locks = self.locks)] {}", ASYNC_TRAIT.trim()),
    );
    let order = [
        "let (a , b)",
        "__self . name ()",
        "self = __self",
        "explicit (& (__self . locks))",
        "let __ret : R",
    ];
    let places: Vec<_> = order.iter().map(|part| code.find(part).unwrap()).collect();
    assert!(places[..2].is_sorted() && places[4] > places[3], "{code}");
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
    let order = ["# ! [allow (unused)]", "__taken", "const A", "use b :: C", "if let", "work ()"];
    let places: Vec<_> = order.iter().map(|part| code.find(part).unwrap()).collect();
    assert!(places.is_sorted(), "{code}");
}

#[test]
fn impl_trait_is_not_named_in_the_body() {
    let code = function(r#""a""#, "async fn f() -> Result<Vec<impl Iterator<Item = u8>>, E> { Ok(vec![]) }");
    assert_eq!(code.matches("impl").count(), 1, "{code}");
    assert!(code.contains("None :: < Result < Vec < _ > , E > >"), "{code}");
    assert!(code.contains("< _ as :: lock_db :: __private :: LockedOutput > :: refused"), "{code}");
}

/// As `#[async_trait]` writes it.
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
    let mut rest = code.as_str();
    for part in order {
        let at = rest.find(part).unwrap_or_else(|| panic!("`{part}` is missing or out of order: {code}"));
        rest = &rest[at..];
    }
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
    // As `#[tokio::test]` writes it.
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
