# Shortcuts for contributors (CONTRIBUTING.md). Each recipe calls a script of the project or a tool
# of cargo. No script requires just.

msrv := `sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml`

# List the recipes.
default:
    @just --list

# Check a change without any server: formatting, lints, documentation, tests on SQLite.
check:
    .ci/run formatting clippy documentation
    tests/run --no-install --only sqlite

# Run all tests, or those on some databases: just test postgres mariadb mysql sqlite.
test *databases:
    tests/run {{ if databases == "" { "" } else { "--only " + replace(databases, " ", ",") } }}

# Run everything that must hold before a change goes in.
ci:
    .ci/run

# Lint the workspace, and lock-db with each combination of its features.
lint:
    .ci/run clippy features

# Build the documentation; warnings are errors.
doc:
    .ci/run documentation

# Format the sources.
fmt:
    cargo fmt --all

# Run the benchmark on throw-away servers: just bench --seconds 10 --rounds 3.
bench *arguments:
    bench/run {{ arguments }}

# Check the published crates with the oldest supported Rust (needs rustup).
msrv:
    cargo +{{ msrv }} check --locked --all-features -p lock-db -p lock-macros

# Check licences, advisories, bans and sources of the dependencies (needs cargo-deny).
deny:
    cargo deny --workspace check

# Compare the public API with that of the last release (needs cargo-semver-checks).
semver:
    #!/usr/bin/env bash
    set -euo pipefail
    if release=$(git describe --tags --abbrev=0 --match 'v[0-9]*' 2>/dev/null); then
      cargo semver-checks -p lock-db --all-features --baseline-rev "$release"
    else
      echo "There is no tag v… to compare with."
    fi

# Search the orders of steps between threads: just interleavings [CASE…] or --mutations.
interleavings *arguments:
    tests/interleavings {{ arguments }}
