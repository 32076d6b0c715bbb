//! ZooKeeper, by its recipe for locks. Each caller queues with an ephemeral sequential node and
//! watches only the node before its own. All callers share the session of the process.

use anyhow::Context;
use zookeeper_client::{Acls, Client, CreateMode, CreateOptions, Error};

use super::{Boxed, Caller, Job, Team};
use crate::zookeeper;

const PLACE: CreateOptions<'static> = CreateMode::EphemeralSequential.with_acls(Acls::anyone_all());
/// ZooKeeper removes these itself, some time after they became empty.
const QUEUE: CreateOptions<'static> = CreateMode::Container.with_acls(Acls::anyone_all());

/// A node in the queue.
struct Place {
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
    held: Option<Place>,
    /// Whether there may be a node, including one whose creation was not confirmed because the
    /// connection broke.
    may_have_node: bool,
}

impl RecipeLock {
    async fn queue_up(&mut self) -> anyhow::Result<Place> {
        if self.may_have_node
            && let Some(place) = self.find_place().await?
        {
            return Ok(place);
        }
        self.may_have_node = true;
        let path = self.path(&self.prefix);
        loop {
            match self.client.create(&path, &[], &PLACE).await {
                Ok((stat, sequence)) => {
                    let node = format!("{}{sequence}", self.prefix);
                    return Ok(Place { node, zxid: stat.czxid });
                }
                Err(Error::NoNode) => match self.client.create(&self.queue, &[], &QUEUE).await {
                    Ok(_) | Err(Error::NodeExists) => {}
                    Err(error) => return Err(error.into()),
                },
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn find_place(&self) -> anyhow::Result<Option<Place>> {
        let nodes = match self.client.list_children(&self.queue).await {
            Err(Error::NoNode) => return Ok(None),
            nodes => nodes?,
        };
        let Some(node) = nodes.into_iter().find(|node| node.starts_with(&self.prefix)) else {
            return Ok(None);
        };
        let stat = self.client.check_stat(&self.path(&node)).await?;
        Ok(stat.map(|stat| Place { node, zxid: stat.czxid }))
    }

    fn path(&self, node: &str) -> String {
        format!("{}/{node}", self.queue)
    }

    async fn wait_at(&self, place: &Place) -> anyhow::Result<()> {
        let mine = number(&place.node);
        loop {
            let nodes = self.client.list_children(&self.queue).await?;
            anyhow::ensure!(nodes.contains(&place.node), "the place in the queue was lost");
            let before = nodes.iter().filter(|node| number(node) < mine).max_by_key(|node| number(node));
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
            let place = self.queue_up().await?;
            self.wait_at(&place).await?;
            let zxid = place.zxid;
            self.held = Some(place);
            Ok(Some(zxid))
        })
    }

    fn release(&mut self) -> Boxed<'_, anyhow::Result<()>> {
        Box::pin(async {
            let place = self.held.take().context("not held")?;
            let path = self.path(&place.node);
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

pub(super) async fn team(job: &Job) -> anyhow::Result<Team> {
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
    Ok(Team { callers, end })
}
