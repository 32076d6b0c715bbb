//! The queue in the column `waiters`, as tests read it and write it by hand. No test but this
//! module knows the layout, which is in the migrations.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::TestDatabase;

const VERSION: char = '1';
const SECRET: usize = 32;
const TIME: usize = 13;
const OWNER: usize = 29;
const LISTENER: usize = 8;
const ENTRY: usize = 1 + SECRET + TIME + TIME + OWNER + LISTENER;

/// How many entries a queue has at most.
pub const MOST_QUEUED: usize = 64;
/// How many characters the column has to hold.
pub const LONGEST_QUEUE: usize = MOST_QUEUED * ENTRY;

/// An entry of a queue. Times are in milliseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queued {
    /// 32 hexadecimal digits.
    pub secret: String,
    pub since: u64,
    pub until: u64,
    pub owner: String,
    /// 0: none.
    pub listener: u32,
}

impl Queued {
    /// Of a process that was here and never comes back. The entry is valid for two more seconds,
    /// by the clock of this machine.
    pub fn abandoned(secret: u128) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap();
        Self {
            secret: format!("{secret:032x}"),
            since: millis(now),
            until: millis(now + Duration::from_secs(2)),
            owner: "gone/1".into(),
            listener: 0,
        }
    }

    /// As it is in the column.
    pub fn text(&self) -> String {
        let Self { secret, since, until, owner, listener } = self;
        let text =
            format!("{VERSION}{secret}{since:0TIME$}{until:0TIME$}{owner:OWNER$}{listener:0LISTENER$x}");
        assert_eq!(text.len(), ENTRY, "{text}");
        text
    }

    fn parse(entry: &str) -> Self {
        let (version, entry) = entry.split_at(1);
        assert_eq!(version, VERSION.to_string());
        let (secret, entry) = entry.split_at(SECRET);
        let (since, entry) = entry.split_at(TIME);
        let (until, entry) = entry.split_at(TIME);
        let (owner, listener) = entry.split_at(OWNER);
        Self {
            secret: secret.into(),
            since: since.parse().unwrap(),
            until: until.parse().unwrap(),
            owner: owner.trim_end().into(),
            listener: u32::from_str_radix(listener, 16).unwrap(),
        }
    }
}

/// Text of the length of an entry that is none, as a later version might write it.
pub fn foreign_entry() -> String {
    format!("{:x<ENTRY$}", "2")
}

/// The queue of a name, the first waiter first. Empty if the name has no row.
pub async fn queue_of<T: TestDatabase>(database: &T, name: &str) -> Vec<Queued> {
    let sql = format!("SELECT waiters FROM distributed_lock WHERE lock_name = '{name}'");
    let text = database.find_text(&sql).await.unwrap_or_default();
    assert_eq!(text.len() % ENTRY, 0, "{text}");
    text.as_bytes().chunks(ENTRY).map(|entry| Queued::parse(std::str::from_utf8(entry).unwrap())).collect()
}

/// Replaces the queue of a name, whose row exists.
pub async fn set_queue<T: TestDatabase>(database: &T, name: &str, queue: &[Queued]) {
    let text: String = queue.iter().map(Queued::text).collect();
    database.run(&format!("UPDATE distributed_lock SET waiters = '{text}' WHERE lock_name = '{name}'")).await;
}
