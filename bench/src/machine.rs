//! The machine, as shown with the figures.

use serde::Serialize;

#[derive(Clone, Serialize)]
pub(crate) struct Machine {
    pub(crate) cores: usize,
    pub(crate) processor: String,
    pub(crate) kernel: String,
    /// The load average of the last minute.
    pub(crate) load_before: f64,
    pub(crate) load_after: f64,
    /// The share of processor time that the host gave to other virtual machines ("steal").
    pub(crate) stolen: f64,
    #[serde(skip)]
    ticks_before: Ticks,
}

#[derive(Clone, Copy, Default)]
struct Ticks {
    all: f64,
    stolen: f64,
}

impl Machine {
    pub(crate) fn before() -> Self {
        let uname = rustix::system::uname();
        Self {
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            processor: processor().unwrap_or_else(|| uname.machine().to_string_lossy().into_owned()),
            kernel: format!("{} {}", uname.sysname().to_string_lossy(), uname.release().to_string_lossy()),
            load_before: load(),
            load_after: 0.0,
            stolen: 0.0,
            ticks_before: ticks().unwrap_or_default(),
        }
    }

    pub(crate) fn read_after(&mut self) {
        self.load_after = load();
        let now = ticks().unwrap_or_default();
        let all = now.all - self.ticks_before.all;
        self.stolen = if all > 0.0 { (now.stolen - self.ticks_before.stolen) / all } else { 0.0 };
    }
}

fn processor() -> Option<String> {
    let file = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = file.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn load() -> f64 {
    let file = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    file.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or_default()
}

fn ticks() -> Option<Ticks> {
    const STOLEN: usize = 7;
    let file = std::fs::read_to_string("/proc/stat").ok()?;
    let line = file.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<f64> = line.split_whitespace().filter_map(|tick| tick.parse().ok()).collect();
    Some(Ticks { all: ticks.iter().take(STOLEN + 1).sum(), stolen: *ticks.get(STOLEN)? })
}
