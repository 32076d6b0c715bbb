//! The load: clients that like one comment over HTTP, as fast as they are answered.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use axum::body::Body;
use axum::http::{Request, Uri};
use hdrhistogram::Histogram;
use http_body_util::BodyExt;
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use indicatif::ProgressBar;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Longer than a service waits for a connection and a lock, so the service gives up first.
const REQUEST_LIMIT: Duration = Duration::from_secs(90);

/// The size of the load.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) requests: u64,
    pub(crate) clients: usize,
}

/// The result of a load.
pub(crate) struct Outcome {
    pub(crate) failed: u64,
    /// The reason of one failed request.
    pub(crate) failure: Option<String>,
    pub(crate) elapsed: Duration,
    /// Of all requests, in microseconds.
    pub(crate) latencies: Histogram<u64>,
}

/// Sends all requests. Each client sends its next request when the last one is answered. The
/// clients are distributed over the services.
pub(crate) async fn drive(
    services: &[SocketAddr],
    path: &str,
    load: Load,
    progress: &ProgressBar,
) -> anyhow::Result<Outcome> {
    ensure!(!services.is_empty(), "there is no service to send requests to");
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let http = HttpClient::builder(TokioExecutor::new()).build(connector);
    let requests_left = Arc::new(AtomicU64::new(load.requests));
    let mut clients = JoinSet::new();
    let started = Instant::now();
    for service in services.iter().cycle().take(load.clients) {
        let client = Client {
            http: http.clone(),
            uri: format!("http://{service}{path}").parse().context("the address of a service")?,
            requests_left: Arc::clone(&requests_left),
            progress: progress.clone(),
        };
        clients.spawn(client.run());
    }
    let mut outcome = Outcome::none()?;
    while let Some(client) = clients.join_next().await {
        let client = client.context("a client")??;
        outcome.failed += client.failed;
        outcome.failure = outcome.failure.or(client.failure);
        outcome.latencies.add(client.latencies).context("adding up the latencies")?;
    }
    outcome.elapsed = started.elapsed();
    Ok(outcome)
}

impl Outcome {
    fn none() -> anyhow::Result<Self> {
        let longest = u64::try_from(REQUEST_LIMIT.as_micros())?;
        let latencies = Histogram::new_with_bounds(1, longest, 3).context("making a histogram")?;
        Ok(Self { failed: 0, failure: None, elapsed: Duration::ZERO, latencies })
    }
}

/// A client that sends one request at a time, on a connection that is kept alive.
struct Client {
    http: HttpClient<HttpConnector, Body>,
    uri: Uri,
    requests_left: Arc<AtomicU64>,
    progress: ProgressBar,
}

impl Client {
    async fn run(self) -> anyhow::Result<Outcome> {
        let mut outcome = Outcome::none()?;
        let take = |left: u64| left.checked_sub(1);
        while self.requests_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
            let sent = Instant::now();
            let answer = match timeout(REQUEST_LIMIT, self.post()).await {
                Ok(answer) => answer,
                Err(_elapsed) => Err(anyhow!("no answer within {REQUEST_LIMIT:?}")),
            };
            outcome.latencies.saturating_record(u64::try_from(sent.elapsed().as_micros())?);
            if let Err(error) = answer {
                outcome.failed += 1;
                outcome.failure.get_or_insert(format!("{error:#}"));
            }
            self.progress.inc(1);
        }
        Ok(outcome)
    }

    async fn post(&self) -> anyhow::Result<()> {
        let request = Request::post(self.uri.clone()).body(Body::empty())?;
        let answer = self.http.request(request).await?;
        let status = answer.status();
        // Only a connection whose response was read to its end is used again.
        let body = answer.into_body().collect().await?.to_bytes();
        ensure!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&body).trim());
        Ok(())
    }
}
