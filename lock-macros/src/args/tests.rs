#![allow(clippy::unwrap_used, clippy::panic)]

use std::time::Duration;

use super::rules::edits;
use super::*;

fn args(text: &str) -> Args {
    syn::parse_str(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// What the error points at, and its message.
fn refusal(text: &str) -> (String, String) {
    let Err(error) = syn::parse_str::<Args>(text) else { panic!("accepted: {text}") };
    assert_eq!(error.clone().into_iter().count(), 1, "one error for one mistake: {text}");
    (error.span().source_text().unwrap_or_default(), error.to_string())
}

#[track_caller]
fn refused(text: &str, at: &str, message: &str) {
    assert_eq!(refusal(text), (at.to_owned(), message.to_owned()));
}

fn fixed_name(text: &str) -> String {
    match args(text).name {
        Name::Fixed(name) => name.value(),
        _ => panic!("not fixed: {text}"),
    }
}

fn fixed_length(given: Option<Given<Length>>) -> Duration {
    match given.unwrap().value {
        Length::Fixed(length) => length,
        Length::Computed(_) => panic!("not fixed"),
    }
}

#[test]
fn a_bare_name() {
    let Args { name, options } = args(r#""nightly-report""#);
    assert!(matches!(name, Name::Fixed(name) if name.value() == "nightly-report"));
    assert_eq!(options.mode(), Mode::Insert);
    assert!(options.ttl.is_none() && options.wait.is_none() && options.locks.is_none());
    assert!(options.tx.is_none() && options.lock_db.is_none());
    assert!(
        options.at_least.is_none()
            && options.lease.is_none()
            && options.skip.is_none()
            && options.reentrant.is_none()
    );
}

#[test]
fn all_options() {
    let options = args(r#""a", ttl = "1m 30s", wait = "500ms", mode = insert, locks = self.locks,"#).options;
    assert_eq!(fixed_length(options.ttl), Duration::from_secs(90));
    assert_eq!(fixed_length(options.wait), Duration::from_millis(500));
    assert!(options.mode.is_some_and(|mode| mode.value == Mode::Insert));
    assert!(options.locks.is_some());

    let options =
        args(r#""a", tx = &mut *tx, mode = row, crate = ::outer::lock_db, wait = self.wait"#).options;
    assert_eq!(options.mode(), Mode::Row);
    assert!(options.tx.is_some() && options.lock_db.is_some());
    assert!(matches!(options.wait.unwrap().value, Length::Computed(_)));

    let options = args(r#""a", skip, lease = _lease, reentrant = false"#).options;
    assert!(options.skip.is_some());
    assert_eq!(options.lease.unwrap().value, "_lease");
    assert!(!options.reentrant.unwrap().value);
    assert!(args(r#""a", reentrant = true, skip,"#).options.reentrant.unwrap().value);
}

#[test]
fn every_option_is_accepted_as_its_example_shows() {
    for rule in RULES {
        let mode = if rule.key == "tx" { ", mode = row" } else { "" };
        args(&format!("\"a\", {}{mode}", rule.example));
        let is_flag = rule.example == rule.key;
        assert!(is_flag || rule.example.starts_with(&format!("{} = ", rule.key)));
    }
}

#[test]
fn braces_in_a_name() {
    assert_eq!(fixed_name(r#""{{a}}""#), "{a}");
    assert!(matches!(args(r#""{a}""#).name, Name::Format { captures_self: false, .. }));
    assert!(matches!(args(r#""a:{self}""#).name, Name::Format { captures_self: true, .. }));
    assert!(matches!(args(r#""{{{a:>08.3}}}{b:?}""#).name, Name::Format { .. }));
}

#[test]
fn an_expression_as_name() {
    for text in ["order.name()", "NAME", "format!(\"a:{}\", b.c)", "\"a\".to_owned() + b", "a == b", "skip"] {
        assert!(matches!(args(text).name, Name::Computed(_)), "{text}");
    }
}

#[test]
fn the_longest_name() {
    assert_eq!(fixed_name(&format!("{:?}", "a".repeat(255))).len(), 255);
    let (_, message) = refusal(&format!("{:?}", "é".repeat(128)));
    assert_eq!(message, "the name of a lock has at most 255 bytes, this text has 256");
    // Escaped braces count once, captures not at all.
    args(&format!("\"{}{{{{{{id}}\"", "a".repeat(254)));
    let (_, message) = refusal(&format!("\"{}{{id}}\"", "a".repeat(256)));
    assert_eq!(message, "the name of a lock has at most 255 bytes, this text has 256");
}

#[test]
fn names_that_can_not_work() {
    refused(r#""""#, r#""""#, "the name of a lock can't be empty");
    refused(r#""a\0b""#, r#""a\0b""#, "the name of a lock can't contain NUL");
    refused(r#""{a}\0""#, r#""{a}\0""#, "the name of a lock can't contain NUL");
    for number in ["42", "true", "'a'", "b\"a\""] {
        refused(number, number, r#"the name of a lock is a text: `"order:{order_id}"`"#);
    }
    refused(r#""a{b""#, r#""a{b""#, "`{` without `}`: for a brace in the name write `{{`");
    refused(r#""a}b""#, r#""a}b""#, "`}` without `{`: for a brace in the name write `}}`");
    let nothing = "has no argument to show: write the argument's name into the braces, `{order_id}`";
    refused(r#""a{}""#, r#""a{}""#, &format!("`{{}}` {nothing}"));
    refused(r#""a{0:?}""#, r#""a{0:?}""#, &format!("`{{0:?}}` {nothing}"));
    refused(
        r#""a{self.id}""#,
        r#""a{self.id}""#,
        "`{self.id}` is more than the name of an argument: write an expression instead of the text, \
         `format!(\"…{}\", self.id)`",
    );
}

#[test]
fn a_missing_name() {
    let needed = r#"a lock needs a name, before any option: `#[distributed_lock("order:{order_id}")]`"#;
    refused("", "", needed);
    refused(r#"ttl = "30s""#, "ttl", needed);
    refused("crate = a", "crate", needed);
    refused(r#", ttl = "30s""#, ",", needed);
    for key in ["name", "key", "keys"] {
        let without = r#"the name is written without a key: `#[distributed_lock("order:{order_id}")]`"#;
        refused(&format!("{key} = \"a\""), key, without);
        let first = r#"the name comes first and without a key: `#[distributed_lock("order:{order_id}")]`"#;
        refused(&format!("ttl(), {key} = \"a\""), key, first);
    }
}

#[test]
fn unknown_options() {
    refused(r#""a", tll = "3s""#, "tll", "unknown option `tll`; did you mean `ttl`?");
    refused(r#""a", lock = a"#, "lock", "unknown option `lock`; did you mean `locks`?");
    refused(r#""a", txn = a"#, "txn", "unknown option `txn`; did you mean `tx`?");
    refused(r#""a", at_lest = a"#, "at_lest", "unknown option `at_lest`; did you mean `at_least`?");
    // Their names in other libraries.
    for (theirs, ours) in [
        ("lockAtMostFor", "ttl"),
        ("lock_at_most_for", "ttl"),
        ("lockAtLeastFor", "at_least"),
        ("leaseTime", "ttl"),
        ("lease_time", "ttl"),
        ("expire", "ttl"),
        ("acquireTimeout", "wait"),
        ("acquire_timeout", "wait"),
        ("timeout", "wait"),
        ("waitTime", "wait"),
        ("blocking_timeout", "wait"),
        ("blocking", "skip"),
        ("max_hold_time", "at_most"),
        ("TTL", "ttl"),
        ("atMost", "at_most"),
        ("transaction", "tx"),
        ("guard", "lease"),
        ("try_lock", "skip"),
        ("reentrancy", "reentrant"),
    ] {
        let message = format!("unknown option `{theirs}`: it is `{ours}` here");
        refused(&format!(r#""a", {theirs} = 1"#), theirs, &message);
    }
    refused(
        r#""a", colour = 3"#,
        "colour",
        "unknown option `colour`; there are `ttl`, `wait`, `at_least`, `at_most`, `mode`, `locks`, `tx`, `lease`, `skip`, \
         `reentrant`, `crate`",
    );
    let examples = "`ttl = \"30s\"`, `wait = \"5s\"`, `at_least = \"30s\"`, `at_most = \"10m\"`, `mode = row`, \
                    `locks = self.locks`, `tx = tx`, `lease = lease`, `skip`, `reentrant = false`, `crate = my_crate::lock_db`";
    refused(r#""a", "b""#, r#""b""#, &format!("expected an option: {examples}"));
    refused(
        r#""a", order_id"#,
        "order_id",
        &format!(
            "expected an option: {examples}; an argument of the function goes into the name in braces: \
             `\"…{{order_id}}\"`"
        ),
    );
}

#[test]
fn options_that_are_not_written_as_such() {
    for (key, example) in RULES.iter().map(|rule| (rule.key, rule.example)).filter(|(key, _)| *key != "skip")
    {
        let needs = format!("`{key}` needs a value: `{example}`");
        refused(&format!("\"a\", {key}"), key, &needs);
        refused(&format!("\"a\", {key} ="), key, &needs);
        refused(&format!("\"a\", {key} = , wait = \"1s\""), key, &needs);
        refused(&format!("\"a\", {key}(1)"), key, &needs);
    }
    for text in [r#""a", skip = true"#, r#""a", skip()"#, r#""a", skip wait = "1s""#] {
        refused(text, "skip", "`skip` has no value: write `skip`, or leave it out");
    }
    let variable = "expected the name of a variable, which the body then has: `lease = lease`";
    for (value, at) in [("\"a\"", "\"a\""), ("_", "_"), ("self", "self"), ("&lease", "&"), ("1", "1")] {
        refused(&format!("\"a\", lease = {value}"), at, variable);
    }
    for (value, at) in [("no", "no"), ("\"false\"", "\"false\""), ("0", "0")] {
        refused(&format!("\"a\", reentrant = {value}"), at, "expected `true` or `false`");
    }
    refused(r#""a" ttl = "3s""#, "ttl", "expected `,`");
    refused(r#""a", wait = "3s" ttl = "3s""#, "ttl", "expected `,`");
}

#[test]
fn duplicates() {
    let (at, message) = refusal(r#""a", ttl = "3s", wait = "1s", ttl = "30s""#);
    assert_eq!((at.as_str(), message.as_str()), ("ttl", "`ttl` is given twice"));
    let error = syn::parse_str::<Args>(r#""a", ttl = "3s", ttl = "4s""#).err().unwrap();
    assert_eq!(error.span().start().column, 17, "points at the second");
    for rule in RULES {
        let twice = format!("\"a\", {0}, {0}", rule.example);
        refused(&twice, rule.key, &format!("`{}` is given twice", rule.key));
    }
}

#[test]
fn durations_that_can_not_work() {
    let unit = "a duration needs a unit: \"30s\" or \"30ms\"";
    for bare in ["30", "30u64", r#""30""#, r#"" 30 ""#] {
        refused(&format!("\"a\", ttl = {bare}"), bare, unit);
        refused(&format!("\"a\", wait = {bare}"), bare, unit);
    }
    refused(r#""a", wait = 1.5"#, "1.5", "a duration needs a unit: \"1.5s\" or \"1.5ms\"");
    refused(r#""a", wait = "0""#, r#""0""#, "a duration needs a unit: \"0s\" or \"0ms\"");
    refused(r#""a", wait = 30s"#, "30s", "a duration is written in quotes: \"30s\"");
    let forms = "write it like \"30s\", \"1m 30s\" or \"500ms\", or as an expression of type `Duration`";
    refused(r#""a", wait = true"#, "true", &format!("expected a duration: {forms}"));
    refused(r#""a", wait = """#, r#""""#, &format!("not a duration: value was empty; {forms}"));
    let (at, message) = refusal(r#""a", ttl = "3 parsecs""#);
    assert_eq!(at, r#""3 parsecs""#);
    assert!(message.starts_with("not a duration: unknown time unit \"parsecs\""), "{message}");
    assert!(message.ends_with(forms), "{message}");
}

#[test]
fn limits_of_durations() {
    refused(
        r#""a", ttl = "0s""#,
        r#""0s""#,
        "a `ttl` of zero is over at once: write \"30s\", or leave it out for the default",
    );
    let no_effect = "an `at_least` of zero has no effect: leave it out";
    refused(r#""a", at_least = "0s""#, r#""0s""#, no_effect);
    refused(r#""a", at_most = "49ms""#, r#""49ms""#, "an `at_most` is 50ms at least, as a `ttl` is");
    refused(r#""a", at_most = "366days""#, r#""366days""#, "too long: 365 days at most");
    assert_eq!(fixed_length(args(r#""a", at_most = "50ms""#).options.at_most), Duration::from_millis(50));
    for option in ["ttl", "wait", "at_least", "at_most"] {
        let negative = format!("`{option}` can't be negative");
        refused(&format!("\"a\", {option} = \"-1s\""), "\"-1s\"", &negative);
        refused(&format!("\"a\", {option} = \" - 1s\""), "\" - 1s\"", &negative);
        refused(&format!("\"a\", {option} = -1"), "-1", &negative);
    }
    refused(r#""a", at_least = "366days""#, r#""366days""#, "too long: 365 days at most");
    assert_eq!(fixed_length(args(r#""a", at_least = "1h""#).options.at_least), Duration::from_hours(1));
    refused(r#""a", ttl = "49ms""#, r#""49ms""#, "a `ttl` needs 50ms at least, to be renewed in time");
    refused(r#""a", ttl = "366days""#, r#""366days""#, "too long: 365 days at most");
    refused(r#""a", wait = "366days""#, r#""366days""#, "too long: 365 days at most");
    assert_eq!(fixed_length(args(r#""a", ttl = "50ms""#).options.ttl), Duration::from_millis(50));
    assert_eq!(fixed_length(args(r#""a", wait = "0s""#).options.wait), Duration::ZERO);
    assert_eq!(fixed_length(args(r#""a", wait = "365days""#).options.wait), Duration::from_hours(365 * 24));
}

#[test]
fn modes() {
    refused(r#""a", mode = "row""#, r#""row""#, "a mode is written without quotes: `mode = row`");
    refused(r#""a", mode = 1"#, "1", "expected `insert` or `row`");
    refused(
        r#""a", mode = rows"#,
        "rows",
        "unknown mode `rows`: write `insert` (a lease, the default) or `row` (held by a transaction)",
    );
}

#[test]
fn options_that_exclude_each_other() {
    let no_ttl = "a row lock has no `ttl`: it ends with its transaction";
    refused(r#""a", mode = row, ttl = "3s""#, "ttl", no_ttl);
    refused(r#""a", ttl = "3s", mode = row, tx = tx"#, "ttl", no_ttl);
    let not_kept = "a row lock can't be kept `at_least` so long: it ends with its transaction";
    refused(r#""a", at_least = "1m", mode = row"#, "at_least", not_kept);
    refused(r#""a", mode = row, tx = tx, at_least = self.at_least"#, "at_least", not_kept);
    let not_taken_back = "a row lock can't be taken back after `at_most`: it ends with its transaction";
    refused(r#""a", mode = row, at_most = "1m""#, "at_most", not_taken_back);
    let needs_row = "only a row lock is held by a transaction: write `mode = row` as well, or leave `tx` out";
    refused(r#""a", tx = transaction"#, "tx", needs_row);
    refused(r#""a", mode = insert, tx = transaction"#, "tx", needs_row);
    let nothing_to_bind = "there is no guard to bind: your own transaction holds the lock";
    refused(r#""a", mode = row, tx = tx, lease = lease"#, "lease", nothing_to_bind);
    let always = "a transaction always takes its own locks again: they last until it ends, not until the function does";
    refused(r#""a", reentrant = false, mode = row, tx = tx"#, "reentrant", always);
    let too_short = "`at_most` is shorter than `at_least`";
    refused(r#""a", at_least = "2m", at_most = "1m""#, "at_most", too_short);
    args(r#""a", at_most = "1m", at_least = "1m""#);
    args(r#""a", at_most = "1m", at_least = a"#);
    args(r#""a", reentrant = true, mode = row, tx = tx, skip"#);
}

#[test]
fn the_guard_of_a_row_lock_needs_its_database() {
    let named = "the guard of a row lock is the connection to one kind of database, which the ambient `Locks` does not \
                 tell: name them, `locks = …`";
    refused(r#""a", mode = row, lease = guard"#, "lease", named);
    args(r#""a", mode = row, lease = guard, locks = locks"#);
    args(r#""a", lease = guard"#);
}

#[test]
fn edits_are_counted() {
    assert_eq!(edits("ttl", "ttl"), 0);
    assert_eq!(edits("tll", "ttl"), 1);
    assert_eq!(edits("", "wait"), 4);
    assert_eq!(edits("kitten", "sitting"), 3);
}
