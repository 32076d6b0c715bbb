//! `lock-db release`.

use lock_db::AnyLocks;

use crate::args::ReleaseArgs;
use crate::exit::Exit;
use crate::output::{line, shown};

pub(crate) async fn release(locks: &AnyLocks, what: &ReleaseArgs) -> anyhow::Result<Exit> {
    let ReleaseArgs { name, token } = what;
    if locks.force_release(name, *token).await? {
        line(&format!("{} is free. Its holder is told with its next renewal.", shown(name)))?;
        return Ok(Exit::Done);
    }
    eprintln!(
        "lock-db: nothing was released: the present grant of {} has another number than {token}, or there is none. Look again: \
         lock-db show",
        shown(name)
    );
    Ok(Exit::NoSuchLock)
}
