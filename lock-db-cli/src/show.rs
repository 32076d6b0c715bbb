//! `lock-db show`.

use lock_db::{AnyLocks, LockInfo, RowHolder};

use crate::args::ShowArgs;
use crate::exit::Exit;
use crate::list::holder;
use crate::output::{duration, line, shown, time};

pub(crate) async fn show(locks: &AnyLocks, what: &ShowArgs) -> anyhow::Result<Exit> {
    let Some(info) = locks.info(&what.name).await? else {
        eprintln!("lock-db: there is no lock {}", shown(&what.name));
        return Ok(Exit::NoSuchLock);
    };
    if what.json {
        line(&serde_json::to_string_pretty(&info)?)?;
        return Ok(Exit::Done);
    }
    for (title, text) in facts(&info) {
        line(&format!("{title:<12} {text}"))?;
    }
    Ok(Exit::Done)
}

fn facts(info: &LockInfo) -> Vec<(&'static str, String)> {
    let mut facts = vec![("name", shown(&info.name)), ("kind", info.kind.as_str().to_owned())];
    let is_held = !info.holders.is_empty() || matches!(info.row_holder, Some(RowHolder::Session(_)));
    facts.push(if is_held { ("held by", holder(info)) } else { ("last holder", shown(&info.owner)) });
    facts.push(("number", info.fencing_token.to_string()));
    match &info.row_holder {
        Some(RowHolder::Session(session)) => {
            let host = session.host.iter().map(|host| format!("from {}", shown(host)));
            let application =
                session.application_name.iter().map(|name| format!("application {}", shown(name)));
            let since = session.since.map(|since| format!("since {}", time(since)));
            let session: Vec<String> = host.chain(application).chain(since).collect();
            facts.push(("session", session.join(", ")));
        }
        Some(RowHolder::Unknown(why)) => facts.push(("held by", format!("unknown: {}", shown(why)))),
        _ => facts.push(("acquired", time(info.acquired_at))),
    }
    facts.extend(info.held_for.map(|held| ("held for", duration(held))));
    facts.extend(info.expires_in.map(|left| ("expires in", duration(left))));
    facts.extend(info.finished_at.map(|finished| ("finished", time(finished))));
    facts.push(("first used", time(info.created_at)));
    for waiter in &info.waiting {
        facts.push(("waits", format!("{} since {}", shown(&waiter.owner), time(waiter.since))));
    }
    facts
}
