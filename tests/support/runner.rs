//! The main function of a test binary.

use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::Case;
use crate::cases::Ignored;
use crate::output::{self, Output};
use crate::process::{Role, become_child};

/// Options of the standard test runner that are followed by their value.
const WITH_A_VALUE: [&str; 6] = ["--color", "--format", "--logfile", "--skip", "--test-threads", "-Z"];

/// Runs the cases of all suites of a test binary, as the standard test runner would: with its
/// options, with `RUST_TEST_THREADS`, and with several filters. Cases may decide that they are
/// ignored, which is why it is not the standard one.
///
/// If this process was started by [`Process::spawn`](crate::Process::spawn), it runs one of the
/// roles instead.
pub fn run(
    suites: impl IntoIterator<Item = Vec<Case>>,
    roles: impl IntoIterator<Item = Vec<Role>>,
) -> ExitCode {
    let roles: Vec<Role> = roles.into_iter().flatten().collect();
    if become_child(&roles) {
        return ExitCode::SUCCESS;
    }
    let (options, mut filters) = split(env::args());
    let mut arguments = Arguments::from_iter(options);
    if arguments.test_threads.is_none() {
        let threads = env::var("RUST_TEST_THREADS").ok();
        arguments.test_threads =
            threads.map(|threads| threads.parse().expect("RUST_TEST_THREADS is a number"));
    }
    output::capture_panics(arguments.nocapture);

    let mut cases: Vec<Case> = suites.into_iter().flatten().collect();
    cases.sort_by(|one, other| one.name.cmp(&other.name));
    if filters.len() == 1 {
        arguments.filter = filters.pop();
    } else if !filters.is_empty() {
        let is_wanted = |name: &str, filter: &String| {
            if arguments.exact { name == filter } else { name.contains(filter) }
        };
        cases.retain(|case| filters.iter().any(|filter| is_wanted(&case.name, filter)));
    }
    let conclusion = libtest_mimic::run(&arguments, cases.into_iter().map(trial).collect());
    let others = output::of_other_threads();
    if conclusion.has_failed() && !others.is_empty() {
        println!("Panics on threads that belong to no case:\n\n{others}");
    }
    conclusion.exit_code()
}

fn trial(case: Case) -> Trial {
    let Case { name, run } = case;
    Trial::ignorable_test(name, move || {
        let output = Output::new();
        Output::attach(output.clone());
        let outcome = catch_unwind(AssertUnwindSafe(run));
        Output::detach();
        match outcome {
            Ok(()) => Ok(Completion::Completed),
            Err(payload) => match payload.downcast::<Ignored>() {
                Ok(ignored) => Ok(Completion::ignored_with(ignored.0)),
                Err(_panic) => Err(Failed::from(output.take())),
            },
        }
    })
}

/// libtest-mimic takes one filter only, so the filters are split off.
fn split(arguments: impl Iterator<Item = String>) -> (Vec<String>, Vec<String>) {
    let (mut options, mut filters) = (Vec::new(), Vec::new());
    let mut is_value = true; // the first one is the program
    for argument in arguments {
        if is_value || argument.starts_with('-') {
            is_value = WITH_A_VALUE.contains(&argument.as_str());
            options.push(argument);
        } else {
            filters.push(argument);
        }
    }
    (options, filters)
}
