//! The scenarios.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

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
}

impl Kind {
    /// Whether the scenario belongs to the cost report. Such a scenario measures lock-db only. It
    /// takes minutes, so it runs only on request.
    pub(crate) fn is_cost_report(self) -> bool {
        matches!(self, Self::E | Self::F | Self::G)
    }
}

/// One scenario with its number of callers.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Scenario {
    pub(crate) kind: Kind,
    pub(crate) processes: u32,
    /// Per process.
    pub(crate) callers: u32,
}

const SCENARIOS: [Scenario; 7] = [
    Scenario { kind: Kind::A, processes: 1, callers: 1 },
    Scenario { kind: Kind::A, processes: 1, callers: 8 },
    Scenario { kind: Kind::A, processes: 1, callers: 64 },
    Scenario { kind: Kind::B, processes: 1, callers: 64 },
    Scenario { kind: Kind::B, processes: 1, callers: 512 },
    Scenario { kind: Kind::C, processes: 4, callers: 16 },
    Scenario { kind: Kind::D, processes: 2, callers: 1 },
];

impl Scenario {
    /// The scenarios with these letters, without those of the cost report. No letters: all.
    pub(crate) fn of(kinds: &[Kind]) -> Vec<Self> {
        SCENARIOS.into_iter().filter(|scenario| kinds.is_empty() || kinds.contains(&scenario.kind)).collect()
    }

    pub(crate) fn is_contended(self) -> bool {
        self.kind != Kind::A
    }

    pub(crate) fn contention(self) -> Contention {
        Contention { processes: self.processes, callers: self.callers, one_name: self.is_contended() }
    }

    /// The short name, also used in file names: `A8`, `C4x16`.
    pub(crate) fn label(self) -> String {
        match self.kind {
            Kind::A => format!("A{}", self.callers),
            Kind::B => format!("B{}", self.callers),
            Kind::C => format!("C{}x{}", self.processes, self.callers),
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
        }
    }
}
