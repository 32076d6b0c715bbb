//! ZooKeeper's lock recipe. Each caller creates an ephemeral sequential node in a queue, and
//! watches only the node before its own. All callers share the session of the process.

use anyhow::Context;
use zookeeper_client::{Acls, Client, CreateMode, CreateOptions, Error};

use super::{Boxed, Caller, CallerGroup, Job};
use crate::zookeeper;

const ENTRY: CreateOptions<'static> = CreateMode::EphemeralSequential.with_acls(Acls::anyone_all());
/// ZooKeeper removes a container some time after it became empty.
const QUEUE: CreateOptions<'static> = CreateMode::Container.with_acls(Acls::anyone_all());

/// A node in the queue of a name.
struct QueueEntry {
    node: String,
    /// The transaction id of the node's creation. Ids grow with each change on the server, and the
    /// queue has the order of creation. So this grows from holder to holder, also after the queue
    /// was removed and created again.
    zxid: i64,
}

struct RecipeLock {
    client: Client,
    queue: String,
    /// The prefix of this caller's nodes.
    prefix: String,
    held: Option<QueueEntry>,
    /// Whether a node of this caller may exist. This includes a node whose creation was not
    /// confirmed because the connection broke.
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
            anyhow::ensure!(nodes.contains(&entry.node), "the queue entry was lost");
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

/// The sequence number that the server appended to the name of a node.
fn number(node: &str) -> Option<u64> {
    node.rsplit('-').next()?.parse().ok()
}

impl Caller for RecipeLock {
    fn set_name(&mut self, name: &str) {
        self.queue = format!("/{name}");
        self.may_have_node = false;
    }

    /// If the future is dropped, the node stays until the session ends. Callers are only dropped at
    /// the end of the measurement, immediately before the session ends.
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
                    // `NoNode`: an earlier attempt deleted it without a confirmation.
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
        // The session ends with its last client, and the server removes its nodes.
        drop(client);
        while !states.changed().await.is_terminated() {}
    });
    Ok(CallerGroup { callers, end })
}
