//! What a check of the database has found.

use std::fmt;

/// The result of [`Locks::check`](crate::Locks::check).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct CheckReport {
    pub(crate) server: String,
    pub(crate) guard: CommitGuard,
    pub(crate) findings: Vec<Finding>,
    pub(crate) warnings: Vec<String>,
}

impl CheckReport {
    pub(crate) fn new(server: String, guard: CommitGuard, findings: Vec<Finding>) -> Self {
        let warnings = findings.iter().map(|finding| finding.text.clone()).collect();
        Self { server, guard, findings, warnings }
    }

    /// The server, its version, and whether it is part of a cluster. For example
    /// `PostgreSQL 17.2` or `MariaDB 10.11.9 (Galera, 3 nodes)`.
    #[must_use]
    pub fn server(&self) -> &str {
        &self.server
    }

    /// How other holders are held off while a guarded transaction commits.
    #[must_use]
    pub fn guard(&self) -> CommitGuard {
        self.guard
    }

    /// What works and could be better, in sentences for people. The texts of
    /// [`findings`](Self::findings).
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// What works and could be better, for programs.
    #[must_use]
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }
}

/// Something that works and could be better: see [`CheckReport::findings`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Finding {
    /// What it is about.
    pub kind: FindingKind,
    /// The setting of the server that it is about, if it is about one.
    pub setting: Option<&'static str>,
    /// A sentence for people: what was found, what follows, and what to do.
    pub text: String,
}

impl Finding {
    pub(crate) fn new(kind: FindingKind, text: impl Into<String>) -> Self {
        Self { kind, setting: None, text: text.into() }
    }

    pub(crate) fn of_setting(kind: FindingKind, setting: &'static str, text: impl Into<String>) -> Self {
        Self { kind, setting: Some(setting), text: text.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.text)
    }
}

/// What a [`Finding`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum FindingKind {
    /// A crash may forget grants, because commits do not wait for the disk.
    NotDurable,
    /// A failover may forget grants, because a standby follows asynchronously.
    AsynchronousStandby,
    /// The clocks of the database and of this machine differ.
    Clock,
    /// The server closes idle connections soon.
    IdleTimeout,
    /// The account lacks a right for something that is not needed for locks.
    MissingRight,
    /// A transaction, reader or replication slot keeps old row versions, which makes hot locks slow.
    OldSnapshot,
    /// The sequence of the ids is behind the rows.
    Sequence,
    /// Deadlocks are not detected.
    DeadlockDetection,
    /// The server is a replica that this account may write to.
    Replica,
    /// The journal mode of SQLite.
    JournalMode,
}

impl FindingKind {
    /// One word, for programs: `not_durable`, `clock`, ….
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotDurable => "not_durable",
            Self::AsynchronousStandby => "asynchronous_standby",
            Self::Clock => "clock",
            Self::IdleTimeout => "idle_timeout",
            Self::MissingRight => "missing_right",
            Self::OldSnapshot => "old_snapshot",
            Self::Sequence => "sequence",
            Self::DeadlockDetection => "deadlock_detection",
            Self::Replica => "replica",
            Self::JournalMode => "journal_mode",
        }
    }
}

impl fmt::Display for FindingKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// How other holders are held off while a guarded transaction commits: see
/// [`CheckReport::guard`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum CommitGuard {
    /// The transaction locks the row of the lock, which a takeover has to write.
    RowLock,
    /// The transaction writes the row of the lock. On clusters whose nodes do not know each other's
    /// row locks: certification refuses one of two transactions that have written the same row.
    Write,
    /// The transaction locks the whole database, as every one that writes on SQLite.
    WholeDatabase,
}

impl fmt::Display for CommitGuard {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::RowLock => "by a lock on the row",
            Self::Write => "by writing the row",
            Self::WholeDatabase => "by a lock on the whole database",
        })
    }
}
