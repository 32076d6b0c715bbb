//! The scenarios.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::contender::Contender;
use crate::summary::Contention;

/// The letter of a scenario.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// Uncontended: 1, 8 and 64 callers, each with a free name of its own
    #[value(name = "A")]
    A,
    /// Contended in one process: 64 and 512 callers on one name
    #[value(name = "B")]
    B,
    /// Contended between processes: 4 processes of 16 callers on one name
    #[value(name = "C")]
    C,
    /// Wake-up: from the holder's release to the grant in another process
    #[value(name = "D")]
    D,
    /// lock-db alone: one process holds many leases
    #[value(name = "E")]
    E,
    /// lock-db alone: acquire and release the same names repeatedly
    #[value(name = "F")]
    F,
    /// lock-db alone: the cost of each operation in the database
    #[value(name = "G")]
    G,
    /// Every name is new: 1, 8 and 64 callers, as A with a new name for each acquisition
    #[value(name = "H")]
    H,
    /// Wake-up with many names: as D with 512 names at once
    #[value(name = "I")]
    I,
}

impl Kind {
    /// Whether the scenario belongs to the cost report. Such a scenario measures lock-db only. It
    /// takes minutes, so it runs only on request.
    pub(crate) fn is_cost_report(self) -> bool {
        matches!(self, Self::E | Self::F | Self::G)
    }

    /// Whether two processes pass locks to each other, and the time between the release and the
    /// grant is measured.
    pub(crate) fn is_wake_up(self) -> bool {
        matches!(self, Self::D | Self::I)
    }

    /// Whether no caller waits for another.
    pub(crate) fn is_uncontended(self) -> bool {
        matches!(self, Self::A | Self::H)
    }
}

/// Which names the callers use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Names {
    /// One name for all.
    One,
    /// Each caller has a name of its own.
    PerCaller,
    /// Each caller has a name that it shares with one caller of each other process.
    PerCallerOfEachProcess,
    /// A new name for each acquisition.
    New,
}

/// One scenario with its number of callers.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Scenario {
    pub(crate) kind: Kind,
    pub(crate) processes: u32,
    /// Per process.
    pub(crate) callers: u32,
}

const SCENARIOS: [Scenario; 11] = [
    Scenario { kind: Kind::A, processes: 1, callers: 1 },
    Scenario { kind: Kind::A, processes: 1, callers: 8 },
    Scenario { kind: Kind::A, processes: 1, callers: 64 },
    Scenario { kind: Kind::H, processes: 1, callers: 1 },
    Scenario { kind: Kind::H, processes: 1, callers: 8 },
    Scenario { kind: Kind::H, processes: 1, callers: 64 },
    Scenario { kind: Kind::B, processes: 1, callers: 64 },
    Scenario { kind: Kind::B, processes: 1, callers: 512 },
    Scenario { kind: Kind::C, processes: 4, callers: 16 },
    Scenario { kind: Kind::D, processes: 2, callers: 1 },
    Scenario { kind: Kind::I, processes: 2, callers: 512 },
];

impl Scenario {
    /// The scenarios with these letters, without those of the cost report. No letters: all.
    pub(crate) fn of(kinds: &[Kind]) -> Vec<Self> {
        SCENARIOS.into_iter().filter(|scenario| kinds.is_empty() || kinds.contains(&scenario.kind)).collect()
    }

    pub(crate) fn names(self) -> Names {
        match self.kind {
            Kind::A | Kind::E | Kind::F | Kind::G => Names::PerCaller,
            Kind::B | Kind::C => Names::One,
            Kind::D | Kind::I => Names::PerCallerOfEachProcess,
            Kind::H => Names::New,
        }
    }

    /// Whether the scenario measures this contender.
    pub(crate) fn includes(self, contender: Contender) -> bool {
        match contender {
            // It is no lock, and its rows have no names.
            Contender::Floor => self.kind == Kind::A,
            // The callers would wait in the same way as those of the row lock.
            Contender::ForUpdate => self.kind.is_uncontended(),
            // With 512 names the pool would be measured, not the wake-up.
            Contender::RowLock | Contender::AdvisoryLock | Contender::GetLock => self.kind != Kind::I,
            _ => true,
        }
    }

    pub(crate) fn contention(self) -> Contention {
        Contention { processes: self.processes, callers: self.callers, names: self.names() }
    }

    /// The short name, also used in file names: `A8`, `C4x16`.
    pub(crate) fn label(self) -> String {
        match self.kind {
            Kind::A | Kind::B | Kind::H => format!("{:?}{}", self.kind, self.callers),
            Kind::C | Kind::I => format!("{:?}{}x{}", self.kind, self.processes, self.callers),
            Kind::D | Kind::E | Kind::F | Kind::G => format!("{:?}", self.kind),
        }
    }

    pub(crate) fn title(self) -> String {
        let callers = self.callers;
        match self.kind {
            Kind::A if callers == 1 => "one caller, a free name".to_owned(),
            Kind::A => format!("{callers} callers, each with a free name of its own"),
            Kind::B => format!("{callers} callers of one process on one name"),
            Kind::C => format!("{} processes of {callers} callers on one name", self.processes),
            Kind::D => "from the release in one process to the lock in another".to_owned(),
            Kind::E | Kind::F | Kind::G => String::new(),
            Kind::H if callers == 1 => "one caller, every name is new".to_owned(),
            Kind::H => format!("{callers} callers, every name is new"),
            Kind::I => format!("{callers} names, from the release in one process to the lock in another"),
        }
    }
}
