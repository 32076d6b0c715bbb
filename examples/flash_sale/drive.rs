//! The load: users who click the button several times, over HTTP.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use axum::body::Body;
use axum::http::{Request, StatusCode};
use hdrhistogram::Histogram;
use http_body_util::BodyExt;
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Longer than the service waits for a connection and two locks, so the service gives up first.
const REQUEST_LIMIT: Duration = Duration::from_mins(2);

/// Clicks are shuffled in groups of this size.
const TOGETHER: usize = 100;

/// The result of a load, as the clients saw it.
pub(crate) struct Outcome {
    /// Orders that were confirmed.
    pub(crate) confirmed: i64,
    /// Requests of users who already have their order.
    pub(crate) repeated: u64,
    pub(crate) sold_out: u64,
    pub(crate) failed: u64,
    /// The reason of one failed request.
    pub(crate) failure: Option<String>,
    pub(crate) elapsed: Duration,
    /// From the start to the last confirmation.
    pub(crate) sold_within: Duration,
    /// Of all requests, in microseconds.
    pub(crate) latencies: Histogram<u64>,
    /// Of the confirmed requests.
    pub(crate) buyers: Histogram<u64>,
}

/// The user of each request. All users click about equally often, and the clicks of one user are so
/// close together that they overlap.
pub(crate) fn clicks(requests: usize, users: usize, random: &mut fastrand::Rng) -> anyhow::Result<Vec<i64>> {
    let mut order: Vec<usize> = (0..users).collect();
    random.shuffle(&mut order);
    let clicks = (0..requests).map(|click| order.get(click * users / requests).copied().unwrap_or_default());
    let clicks = clicks.map(|user| i64::try_from(user).context("the number of a user"));
    let mut clicks = clicks.collect::<anyhow::Result<Vec<_>>>()?;
    for together in clicks.chunks_mut(TOGETHER) {
        random.shuffle(together);
    }
    Ok(clicks)
}

/// Sends all clicks in order. Each client sends its next click when the last one is answered.
pub(crate) async fn drive(service: SocketAddr, clicks: Vec<i64>, clients: usize) -> anyhow::Result<Outcome> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let http = HttpClient::builder(TokioExecutor::new()).build(connector);
    let (clicks, next) = (Arc::new(clicks), Arc::new(AtomicUsize::new(0)));
    let started = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..clients {
        let (clicks, next) = (Arc::clone(&clicks), Arc::clone(&next));
        tasks.spawn(Client { http: http.clone(), service, clicks, next, started }.run());
    }
    let mut outcome = Outcome::none()?;
    while let Some(client) = tasks.join_next().await {
        outcome.add(client.context("a client")??)?;
    }
    outcome.elapsed = started.elapsed();
    Ok(outcome)
}

impl Outcome {
    fn none() -> anyhow::Result<Self> {
        let longest = u64::try_from(REQUEST_LIMIT.as_micros())?;
        let latencies = Histogram::new_with_bounds(1, longest, 3).context("making a histogram")?;
        Ok(Self {
            confirmed: 0,
            repeated: 0,
            sold_out: 0,
            failed: 0,
            failure: None,
            elapsed: Duration::ZERO,
            sold_within: Duration::ZERO,
            buyers: latencies.clone(),
            latencies,
        })
    }

    fn add(&mut self, other: Self) -> anyhow::Result<()> {
        self.confirmed += other.confirmed;
        self.repeated += other.repeated;
        self.sold_out += other.sold_out;
        self.failed += other.failed;
        self.failure = self.failure.take().or(other.failure);
        self.sold_within = self.sold_within.max(other.sold_within);
        self.latencies.add(other.latencies).context("adding up the latencies")?;
        self.buyers.add(other.buyers).context("adding up the latencies")
    }
}

/// A client that sends one request at a time, on a connection that is kept alive.
struct Client {
    http: HttpClient<HttpConnector, Body>,
    service: SocketAddr,
    clicks: Arc<Vec<i64>>,
    next: Arc<AtomicUsize>,
    started: Instant,
}

impl Client {
    async fn run(self) -> anyhow::Result<Outcome> {
        let mut outcome = Outcome::none()?;
        while let Some(user_id) = self.clicks.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            let sent = Instant::now();
            let answer = match timeout(REQUEST_LIMIT, self.post(*user_id)).await {
                Ok(answer) => answer,
                Err(_elapsed) => Err(anyhow!("no answer within {REQUEST_LIMIT:?}")),
            };
            let latency = u64::try_from(sent.elapsed().as_micros())?;
            outcome.latencies.saturating_record(latency);
            match answer {
                Ok((StatusCode::CREATED, _)) => {
                    outcome.confirmed += 1;
                    outcome.sold_within = self.started.elapsed();
                    outcome.buyers.saturating_record(latency);
                }
                Ok((StatusCode::CONFLICT, _)) => outcome.repeated += 1,
                Ok((StatusCode::GONE, _)) => outcome.sold_out += 1,
                Ok((status, body)) => outcome.fail(format!("{status}: {body}")),
                Err(error) => outcome.fail(format!("{error:#}")),
            }
        }
        Ok(outcome)
    }

    async fn post(&self, user_id: i64) -> anyhow::Result<(StatusCode, String)> {
        let uri = format!("http://{}/users/{user_id}/order", self.service);
        let answer = self.http.request(Request::post(uri).body(Body::empty())?).await?;
        let status = answer.status();
        // Only a connection whose response was read to its end is used again.
        let body = answer.into_body().collect().await?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).trim().to_owned()))
    }
}

impl Outcome {
    fn fail(&mut self, reason: String) {
        self.failed += 1;
        self.failure.get_or_insert(reason);
    }
}
