//! `lock-db prune`.

use lock_db::AnyLocks;

use crate::args::PruneArgs;
use crate::exit::Exit;
use crate::output::line;

pub(crate) async fn prune(locks: &AnyLocks, what: &PruneArgs) -> anyhow::Result<Exit> {
    let removed = locks.prune(what.older_than).await?;
    line(&format!("removed {removed} {}", if removed == 1 { "row" } else { "rows" }))?;
    Ok(Exit::Done)
}
