//! Files that are in the repository twice. Links would break a clone on Windows.

use std::fs;
use std::path::Path;

lock_tests::cases! {
    without a database:
    copies_are_equal_to_their_originals,
}

/// Originals and their copies. Packages contain only files of their own folders.
const COPIES: [(&str, &str); 5] = [
    ("LICENSE-APACHE", "lock-db/LICENSE-APACHE"),
    ("LICENSE-APACHE", "lock-macros/LICENSE-APACHE"),
    ("LICENSE-MIT", "lock-db/LICENSE-MIT"),
    ("LICENSE-MIT", "lock-macros/LICENSE-MIT"),
    ("docs/testing-your-service.md", "lock-db/src/testing/recipe.md"),
];

fn copies_are_equal_to_their_originals() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for (original, copy) in COPIES {
        let [text, copied] = [original, copy].map(|file| fs::read(repository.join(file)).unwrap());
        assert!(text == copied, "run: cp {original} {copy}");
    }
}
