//! ZooKeeper, by its recipe for locks. Each caller queues with an ephemeral sequential node and
//! watches only the node before its own. All callers share the session of the process.

use anyhow::Context;
use zookeeper_client::{Acls, Client, CreateMode, CreateOptions, Error};

use super::{Boxed, Caller, CallerGroup, Job};
use crate::zookeeper;

const ENTRY: CreateOptions<'static> = CreateMode::EphemeralSequential.with_acls(Acls::anyone_all());
/// ZooKeeper removes these itself, some time after they became empty.
const QUEUE: CreateOptions<'static> = CreateMode::Container.with_acls(Acls::anyone_all());

/// A node in the queue.
struct QueueEntry {
    node: String,
    /// When the node was created, in the order of all changes to all nodes. The queue has the same
    /// order, so this grows from holder to holder. It continues to grow when the queue was removed
    /// and created again.
    zxid: i64,
}

struct RecipeLock {
    client: Client,
    queue: String,
    /// The prefix of this caller's nodes.
    prefix: String,
    held: Option<QueueEntry>,
    /// Whether there may be a node, including one whose creation was not confirmed because the
    /// connection broke.
    may_have_node: bool,
}

impl RecipeLock {
    async fn enqueue(&mut self) -> anyhow::Result<QueueEntry> {
        if self.may_have_node
            && let Some(entry) = self.find_entry().await?
        {
            return Ok(entry);
        }
        self.may_have_node = true;
        let path = self.path(&self.prefix);
        loop {
            match self.client.create(&path, &[], &ENTRY).await {
                Ok((stat, sequence)) => {
                    let node = format!("{}{sequence}", self.prefix);
                    return Ok(QueueEntry { node, zxid: stat.czxid });
                }
                Err(Error::NoNode) => match self.client.create(&self.queue, &[], &QUEUE).await {
                    Ok(_) | Err(Error::NodeExists) => {}
                    Err(error) => return Err(error.into()),
                },
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn find_entry(&self) -> anyhow::Result<Option<QueueEntry>> {
        let nodes = match self.client.list_children(&self.queue).await {
            Err(Error::NoNode) => return Ok(None),
            nodes => nodes?,
        };
        let Some(node) = nodes.into_iter().find(|node| node.starts_with(&self.prefix)) else {
            return Ok(None);
        };
        let stat = self.client.check_stat(&self.path(&node)).await?;
        Ok(stat.map(|stat| QueueEntry { node, zxid: stat.czxid }))
    }

    fn path(&self, node: &str) -> String {
        format!("{}/{node}", self.queue)
    }

    async fn wait_for_grant(&self, entry: &QueueEntry) -> anyhow::Result<()> {
        let own_number = number(&entry.node);
        loop {
            let nodes = self.client.list_children(&self.queue).await?;
            anyhow::ensure!(nodes.contains(&entry.node), "the entry in the queue was lost");
            let before =
                nodes.iter().filter(|node| number(node) < own_number).max_by_key(|node| number(node));
            let Some(before) = before else { return Ok(()) };
            match self.client.get_and_watch_data(&self.path(before)).await {
                Ok((_, _, watcher)) => {
                    let _event = watcher.changed().await;
                }
                Err(Error::NoNode) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The server's number at the end of a node's name.
fn number(node: &str) -> Option<u64> {
    node.rsplit('-').next()?.parse().ok()
}

impl Caller for RecipeLock {
    /// When this is dropped, the node stays until the session ends, which comes next.
    fn acquire(&mut self) -> Boxed<'_, anyhow::Result<Option<i64>>> {
        Box::pin(async {
            let entry = self.enqueue().await?;
            self.wait_for_grant(&entry).await?;
            let zxid = entry.zxid;
            self.held = Some(entry);
            Ok(Some(zxid))
        })
    }

    fn release(&mut self) -> Boxed<'_, anyhow::Result<()>> {
        Box::pin(async {
            let entry = self.held.take().context("not held")?;
            let path = self.path(&entry.node);
            loop {
                match self.client.delete(&path, None).await {
                    Err(Error::ConnectionLoss) => {}
                    // An earlier, unconfirmed attempt may have deleted it.
                    Ok(()) | Err(Error::NoNode) => break,
                    Err(error) => return Err(error.into()),
                }
            }
            self.may_have_node = false;
            Ok(())
        })
    }
}

pub(super) async fn connect(job: &Job) -> anyhow::Result<CallerGroup> {
    let client = zookeeper::connect(&job.url).await?;
    let session = client.session_id().0;
    let caller = |(number, name): (usize, &String)| -> Box<dyn Caller> {
        Box::new(RecipeLock {
            client: client.clone(),
            queue: format!("/{name}"),
            prefix: format!("{session:x}-{number}-"),
            held: None,
            may_have_node: false,
        })
    };
    let callers = job.names.iter().enumerate().map(caller).collect();
    let end = Box::pin(async move {
        let mut states = client.state_watcher();
        // The last client closes the session, and the server removes its nodes.
        drop(client);
        while !states.changed().await.is_terminated() {}
    });
    Ok(CallerGroup { callers, end })
}
