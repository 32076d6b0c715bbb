//! What a case prints: its notes, and the panics of its threads. It is shown when the case fails,
//! and at once with `--nocapture`.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::cell::RefCell;
use std::fmt::Display;
use std::panic::{self, PanicHookInfo};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

static IS_SHOWN_AT_ONCE: AtomicBool = AtomicBool::new(false);

/// Of threads that belong to no case in particular, such as those of lock-db's sessions.
static OF_OTHER_THREADS: Output = Output(None);
static OTHER_LINES: Mutex<String> = Mutex::new(String::new());

thread_local! {
    static OF_THIS_THREAD: RefCell<Output> = const { RefCell::new(Output(None)) };
}

/// The output of one case, or of the threads that belong to none.
#[derive(Clone)]
pub(crate) struct Output(Option<Arc<Mutex<String>>>);

impl Output {
    /// The output of a case.
    pub(crate) fn new() -> Self {
        Self(Some(Arc::default()))
    }

    pub(crate) fn of_this_thread() -> Self {
        // A thread may panic while it ends.
        OF_THIS_THREAD.try_with(|output| output.borrow().clone()).unwrap_or(OF_OTHER_THREADS.clone())
    }

    /// Makes it the output of this thread.
    pub(crate) fn attach(output: Self) {
        OF_THIS_THREAD.set(output);
    }

    /// Ends what [`attach`](Self::attach) began.
    pub(crate) fn detach() {
        OF_THIS_THREAD.set(OF_OTHER_THREADS.clone());
    }

    /// All lines so far.
    pub(crate) fn take(&self) -> String {
        std::mem::take(&mut *self.lines().lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn add(&self, line: &str) {
        if IS_SHOWN_AT_ONCE.load(Ordering::Relaxed) {
            eprintln!("{line}");
            return;
        }
        let mut lines = self.lines().lock().unwrap_or_else(PoisonError::into_inner);
        lines.push_str(line);
        lines.push('\n');
    }

    fn lines(&self) -> &Mutex<String> {
        self.0.as_deref().unwrap_or(&OTHER_LINES)
    }
}

/// Panics of threads that belong to no case.
pub(crate) fn of_other_threads() -> String {
    OF_OTHER_THREADS.take()
}

/// Adds a line to the output of the case.
pub fn note(line: impl Display) {
    Output::of_this_thread().add(&line.to_string());
}

/// From now on, panics go to the output of their case. Many cases let a task panic on purpose.
pub(crate) fn capture_panics(is_shown_at_once: bool) {
    IS_SHOWN_AT_ONCE.store(is_shown_at_once, Ordering::Relaxed);
    panic::set_hook(Box::new(|panic: &PanicHookInfo<'_>| {
        let thread = thread::current();
        let mut text = format!("thread '{}' {panic}", thread.name().unwrap_or("<unnamed>"));
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            text += &format!("\n{backtrace}");
        }
        note(text);
    }));
}
