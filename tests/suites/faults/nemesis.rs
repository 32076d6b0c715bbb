//! What goes wrong, and when: a schedule that a seed decides.

use std::fmt;
use std::time::Duration;

use lock_tests::Random;

use super::TTL;

/// Each happens to one worker or its network, but for those of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// kill -9; another worker takes the place a little later.
    Kill,
    /// The same, right after it said that it is about to commit.
    KillAtCommit,
    /// SIGSTOP and SIGCONT: mostly for longer than the TTL.
    Stop,
    /// The same, right after it said that it is about to commit.
    StopAtCommit,
    /// The application takes all connections of its pool.
    Starve,
    /// Everything arrives later.
    Delay,
    /// Connections are reset.
    Cut,
    /// The same, in the middle of a commit that is slow.
    CutAtCommit,
    /// What is sent arrives, but no answer comes back; then the connections are reset: half-open.
    LoseAnswers,
    /// Nothing arrives, in either direction; then it arrives all the same: a partition that heals.
    Silence,
    /// Connections are reset, and new ones are refused.
    Refuse,
    /// The network of the worker is parted from that of the server, by the kernel: what is sent is sent again, later and
    /// later.
    Part,
    /// kill -9 of the server, and its start.
    KillServer,
    /// The server's clock is set forward by several TTLs, and later back.
    ClockForward,
    /// The server's clock is set back by several TTLs, and later forward.
    ClockBack,
}

pub(crate) const OF_PROCESSES: &[Fault] =
    &[Fault::Kill, Fault::KillAtCommit, Fault::Stop, Fault::StopAtCommit, Fault::Starve];
pub(crate) const OF_NETWORKS: &[Fault] =
    &[Fault::Delay, Fault::Cut, Fault::CutAtCommit, Fault::LoseAnswers, Fault::Silence, Fault::Refuse];

/// With networks of the workers' own.
pub(crate) const OF_PARTITIONS: &[Fault] = &[
    Fault::Part,
    Fault::Part,
    Fault::Part,
    Fault::Kill,
    Fault::Stop,
    Fault::StopAtCommit,
    Fault::CutAtCommit,
];

/// On a server of the test's own.
pub(crate) const OF_SERVERS: &[Fault] = &[
    Fault::KillServer,
    Fault::KillServer,
    Fault::Kill,
    Fault::Stop,
    Fault::StopAtCommit,
    Fault::CutAtCommit,
];
pub(crate) const OF_CLOCKS: &[Fault] = &[
    Fault::ClockForward,
    Fault::ClockBack,
    Fault::Kill,
    Fault::Stop,
    Fault::StopAtCommit,
    Fault::CutAtCommit,
];

impl Fault {
    /// Leases are cut short when the database's clock is set forward, be it back to where it was.
    pub(crate) fn moves_clock(self) -> bool {
        matches!(self, Self::ClockForward | Self::ClockBack)
    }

    fn lasts(self, random: &mut Random) -> Duration {
        let ttl = u64::try_from(TTL.as_millis()).unwrap();
        match self {
            Self::Kill | Self::KillAtCommit => random.millis(50, 400),
            Self::Stop | Self::StopAtCommit => random.millis(ttl / 2, 2 * ttl),
            Self::Starve | Self::LoseAnswers | Self::Silence | Self::Part => random.millis(50, 2 * ttl),
            Self::Refuse | Self::Delay | Self::CutAtCommit => random.millis(50, ttl),
            Self::Cut => Duration::ZERO,
            Self::KillServer => random.millis(20, ttl),
            Self::ClockForward | Self::ClockBack => random.millis(ttl / 2, 2 * ttl),
        }
    }
}

/// One fault of a schedule.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    /// Since the beginning of the run.
    pub(crate) at: Duration,
    pub(crate) fault: Fault,
    /// The place of the worker.
    pub(crate) place: usize,
    pub(crate) lasts: Duration,
}

impl fmt::Display for Step {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, fault, place, lasts } = self;
        write!(formatter, "after {at:.3?}: {fault:?} at place {place}, for {lasts:.3?}")
    }
}

/// Faults of these kinds, as long as the run goes on. They overlap, also at one place.
pub(crate) fn schedule(seed: u64, faults: &[Fault], length: Duration, places: usize) -> Vec<Step> {
    let mut random = Random(seed);
    let mut steps = Vec::new();
    let mut at = random.millis(100, 300);
    let mut server_is_back = Duration::ZERO;
    while at < length {
        let fault = random.pick(faults);
        let step = Step { at, fault, place: random.below(places), lasts: fault.lasts(&mut random) };
        // A server takes its time to come back, and without it nothing happens that could be disturbed.
        if fault != Fault::KillServer || at > server_is_back {
            steps.push(step);
        }
        if fault == Fault::KillServer {
            server_is_back = server_is_back.max(at + step.lasts + Duration::from_secs(2));
        }
        at += random.millis(30, 500);
    }
    steps
}
