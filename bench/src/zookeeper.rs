//! ZooKeeper sessions.

use std::time::Duration;

use zookeeper_client::Client;

const TIMEOUT: Duration = Duration::from_secs(30);

/// The session ends with the last clone of the client.
pub(crate) async fn connect(address: &str) -> anyhow::Result<Client> {
    let connector = Client::connector().with_session_timeout(TIMEOUT).with_fail_eagerly();
    Ok(connector.connect(address).await?)
}
