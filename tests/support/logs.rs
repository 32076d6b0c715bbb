//! Records what this process logs.

use std::fmt::Write as _;
use std::sync::{Mutex, OnceLock};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, span};

static LINES: Mutex<Vec<Line>> = Mutex::new(Vec::new());

/// An event as a log shows it.
#[derive(Debug, Clone)]
pub struct Line {
    pub level: Level,
    pub target: String,
    /// The fields, including the message.
    pub text: String,
}

impl Line {
    pub fn is_warning(&self) -> bool {
        self.level <= Level::WARN
    }
}

/// Records all events of lock-db and sqlx from now on. On all threads, because a session has its
/// own.
pub fn record_logs() {
    static BEGUN: OnceLock<()> = OnceLock::new();
    BEGUN.get_or_init(|| {
        tracing::subscriber::set_global_default(Recorder).expect("nothing else listens in this process");
    });
}

/// The lines that contain a text. Other cases log at the same time.
pub fn logged(text: &str) -> Vec<Line> {
    let lines = LINES.lock().expect("nobody panics while it is locked");
    lines.iter().filter(|line| line.text.contains(text)).cloned().collect()
}

/// The warnings that contain a text.
pub fn warned(text: &str) -> Vec<String> {
    logged(text).into_iter().filter(Line::is_warning).map(|line| line.text).collect()
}

struct Recorder;

impl Subscriber for Recorder {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let target = metadata.target();
        // sqlx first asks with metadata that is not of an event, so only spans are excluded.
        !metadata.is_span() && (target.starts_with("lock_db") || target.starts_with("sqlx"))
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        let (level, target) = (*event.metadata().level(), event.metadata().target().to_owned());
        LINES.lock().expect("nobody panics while it is locked").push(Line { level, target, text: text.0 });
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _infallible = write!(self.0, "{field}={value:?} ");
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        let _infallible = write!(self.0, "{field}={value} ");
    }
}
