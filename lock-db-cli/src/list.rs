//! `lock-db list`.

use lock_db::{AnyLocks, Kind, LockInfo, RowHolder};

use crate::args::ListArgs;
use crate::exit::Exit;
use crate::output::{duration, line, shown, table};

pub(crate) async fn list(locks: &AnyLocks, what: &ListArgs) -> anyhow::Result<Exit> {
    let mut list = locks.list(&what.pattern);
    if what.held {
        list = list.held_only();
    }
    if let Some(limit) = what.limit {
        list = list.limit(limit.try_into()?);
    }
    if let Some(after) = &what.after {
        list = list.after(after);
    }
    let list = list.await?;
    if what.json {
        line(&serde_json::to_string_pretty(&list)?)?;
        return Ok(Exit::Done);
    }
    let mut table = table(&["NAME", "KIND", "HELD BY", "FOR", "EXPIRES IN", "NUMBER", "WAIT"]);
    for info in &list {
        table.add_row([
            shown(&info.name),
            info.kind.as_str().to_owned(),
            holder(info),
            info.held_for.map_or("-".into(), duration),
            info.expires_in.map_or("-".into(), duration),
            info.fencing_token.to_string(),
            info.waiting.len().to_string(),
        ]);
    }
    line(&table.to_string())?;
    Ok(Exit::Done)
}

/// Who holds it, in a few words.
pub(crate) fn holder(info: &LockInfo) -> String {
    if let Some(first) = info.holders.first() {
        return shown(&first.owner);
    }
    match &info.row_holder {
        Some(RowHolder::Session(session)) => format!("session {} of {}", session.id, shown(&session.user)),
        Some(RowHolder::Unknown(_)) if info.kind == Kind::Row => "?".to_owned(),
        _ => "-".to_owned(),
    }
}
