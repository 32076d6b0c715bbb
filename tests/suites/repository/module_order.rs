//! The modules of lock-db depend on one another in one direction only (docs/architecture.md).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

lock_tests::cases! {
    without a database:
    no_module_uses_itself_by_way_of_another,
    a_circle_of_modules_is_found,
}

/// Which other modules each top-level module of `lock-db/src` uses.
type Uses = BTreeMap<String, BTreeSet<String>>;

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../lock-db/src")
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Without comments, and without the tests at the end.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let text = text.split("\n#[cfg(test)]\nmod tests").next().unwrap();
    let text = text.split("\n#[cfg(all(test, not(lock_db_shuttle)))]\nmod tests").next().unwrap();
    text.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// The paths after `crate::`, with the parts of `crate::{a::B, C}` one by one.
fn paths(code: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for rest in code.split("crate::").skip(1) {
        let Some(list) = rest.strip_prefix('{') else {
            paths.push(rest.to_owned());
            continue;
        };
        let (mut depth, mut part) = (0, String::new());
        for character in list.chars() {
            match character {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => paths.push(std::mem::take(&mut part)),
                _ => {}
            }
            if depth == 0 && character != ',' {
                part.push(character);
            }
        }
        paths.push(part);
    }
    paths
}

fn first_word(text: &str) -> &str {
    let text = text.trim_start();
    let end = text.find(|character: char| !character.is_alphanumeric() && character != '_');
    &text[..end.unwrap_or(text.len())]
}

/// `pub use self::module::{A, B}` in `lib.rs`: maps each name to its module.
fn re_exports(code: &str) -> BTreeMap<String, String> {
    let mut exports = BTreeMap::new();
    for rest in code.split("pub use self::").skip(1) {
        let (module, names) = rest.split(';').next().unwrap().split_once("::").unwrap();
        for name in names.trim_matches(['{', '}']).split(',') {
            exports.insert(name.trim().to_owned(), module.to_owned());
        }
    }
    exports
}

fn uses() -> Uses {
    let source = source();
    let exports = re_exports(&code(&source.join("lib.rs")));
    let mut all = Vec::new();
    files(&source, &mut all);
    let mut uses = Uses::new();
    for path in all {
        let relative = path.strip_prefix(&source).unwrap();
        let module = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
        // The interleavings and tests in files of their own may use more than the code.
        let file = relative.file_name().unwrap().to_str().unwrap();
        if module == "lib" || module == "interleavings" || ["interleavings.rs", "tests.rs"].contains(&file) {
            continue;
        }
        for path in paths(&code(&path)) {
            let word = first_word(&path);
            let used = exports.get(word).map_or(word, |module| module).to_owned();
            if used != module && !used.is_empty() {
                uses.entry(module.clone()).or_default().insert(used);
            }
        }
        uses.entry(module).or_default();
    }
    uses
}

/// A path from a module back to itself, if there is one.
fn circle(uses: &Uses) -> Option<Vec<String>> {
    fn walk(uses: &Uses, way: &mut Vec<String>, done: &mut BTreeSet<String>) -> bool {
        let last = way.last().unwrap().clone();
        if way[..way.len() - 1].contains(&last) {
            return true;
        }
        if done.contains(&last) {
            return false;
        }
        for next in uses.get(&last).into_iter().flatten() {
            way.push(next.clone());
            if walk(uses, way, done) {
                return true;
            }
            way.pop();
        }
        done.insert(last);
        false
    }
    let mut done = BTreeSet::new();
    uses.keys().find_map(|module| {
        let mut way = vec![module.clone()];
        walk(uses, &mut way, &mut done).then_some(way)
    })
}

fn no_module_uses_itself_by_way_of_another() {
    let uses = uses();
    assert!(uses.len() > 20 && uses["locks"].contains("context"), "the modules are not found: {uses:?}");
    assert_eq!(circle(&uses), None);
}

fn a_circle_of_modules_is_found() {
    let uses = |pairs: &[(&str, &str)]| {
        let mut uses = Uses::new();
        for (module, used) in pairs {
            uses.entry((*module).to_owned()).or_default().insert((*used).to_owned());
        }
        uses
    };
    assert_eq!(circle(&uses(&[("a", "b"), ("b", "c"), ("a", "c")])), None);
    assert!(circle(&uses(&[("a", "b"), ("b", "c"), ("c", "a")])).is_some());
    let code = "use crate::{Error, session::{A, B}};\nuse crate::name::Name;";
    let words: Vec<String> = paths(code).iter().map(|path| first_word(path).to_owned()).collect();
    assert_eq!(words, ["Error", "session", "name"]);
}
