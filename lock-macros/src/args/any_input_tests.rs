//! Any input gives options or errors, and never a panic. A panic would hide the user's mistake
//! behind a message about the macro.

use proptest::prelude::*;

use super::{Args, RULES};

/// Half of the input is nearly right: it gets deeper into the parser than random input.
fn pieces() -> impl Strategy<Value = String> {
    let tokens = [
        ",",
        "=",
        "==",
        "::",
        "&",
        "*",
        ".",
        "..",
        "#",
        "!",
        "?",
        "|",
        "'a",
        "_",
        "self",
        "crate",
        "super",
        "r#type",
        "mut",
        "true",
        "false",
        "row",
        "insert",
        "tx",
        "()",
        "(",
        ")",
        "{",
        "}",
        "[",
        "]",
        "{}",
        "b\"a\"",
        "c\"a\"",
        "'a'",
        "1.5",
        "30s",
        "0x1F",
        "1e9",
        "if",
        "match",
        "async",
        "\"\"",
        "\"a\"",
        "\"a:{b}\"",
        "\"{\"",
        "\"}\"",
        "\"{{\"",
        "\"{}\"",
        "\"{0}\"",
        "\"{a.b}\"",
        "\"{self}\"",
        "\"{r#type:?}\"",
        "\"{:é}\"",
        "\"{é\"",
        "\"é}\"",
        "\"\\0\"",
        "\"30s\"",
        "\"0\"",
        "\"99999999999999999999y\"",
        "\"1e9s\"",
        "\"-1s\"",
        "\"１s\"",
        "\"584942417355y 1s\"",
    ];
    prop_oneof![
        4 => proptest::sample::select(tokens.to_vec()).prop_map(str::to_owned),
        2 => (0..RULES.len()).prop_map(|rule| RULES[rule].key.to_owned()),
        2 => (0..RULES.len()).prop_map(|rule| format!(", {}", RULES[rule].example)),
        1 => any::<String>().prop_map(|text| format!("{text:?}")),
        1 => "[{}a-zé0:?.<>$ ]{0,12}".prop_map(|text| format!("{text:?}")),
        1 => "[0-9. a-zµ]{0,12}".prop_map(|text| format!(", ttl = {text:?}")),
        1 => any::<i128>().prop_map(|number| number.to_string()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_tokens_are_read_or_refused(pieces in proptest::collection::vec(pieces(), 0..12)) {
        let _read = syn::parse_str::<Args>(&pieces.join(" "));
    }

    #[test]
    fn any_tokens_behind_a_name_are_read_or_refused(pieces in proptest::collection::vec(pieces(), 0..8)) {
        let _read = syn::parse_str::<Args>(&format!("\"a\" {}", pieces.join(" ")));
        let _read = syn::parse_str::<Args>(&format!("\"a\", {}", pieces.join(" ")));
    }

    #[test]
    fn any_text_is_read_or_refused(text in any::<String>()) {
        let _read = syn::parse_str::<Args>(&text);
        for literal in [format!("{text:?}"), format!("\"a\", ttl = {text:?}"), format!("\"a\", {text:?}")] {
            let _read = syn::parse_str::<Args>(&literal);
        }
    }

    #[test]
    fn an_error_says_something(pieces in proptest::collection::vec(pieces(), 0..8)) {
        if let Err(error) = syn::parse_str::<Args>(&pieces.join(" ")) {
            prop_assert!(!error.to_string().is_empty());
            prop_assert!(!error.to_compile_error().is_empty());
        }
    }
}
