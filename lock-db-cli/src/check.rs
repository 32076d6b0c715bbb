//! `lock-db check`.

use lock_db::AnyLocks;

use crate::args::CheckArgs;
use crate::exit::Exit;
use crate::output::{line, shown};

pub(crate) async fn check(locks: &AnyLocks, what: &CheckArgs) -> anyhow::Result<Exit> {
    let report = locks.check().await?;
    if what.json {
        line(&serde_json::to_string_pretty(&report)?)?;
        return Ok(Exit::Done);
    }
    line(&format!(
        "{}: locks can be kept. A guarded commit holds others off {}.",
        report.server(),
        report.guard()
    ))?;
    for warning in report.warnings() {
        line(&format!("warning: {}", shown(warning)))?;
    }
    Ok(Exit::Done)
}
