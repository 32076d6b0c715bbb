//! The network between the callers and a server: direct, or with a delay.

use std::time::Duration;

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;
use serde::{Serialize, Serializer};
use sqlx::{MySql, Postgres};

use crate::contender::System;
use crate::database::Database;
use crate::proxy::Proxy;
use crate::server::Server;
use crate::statistics::DatabaseStatistics;
use crate::summary::{Distribution, distribution_of};

/// The delay of a network in each direction. `None`: there is no network.
#[derive(Clone, Copy, PartialEq, PartialOrd, Debug)]
pub(crate) struct Delay(pub(crate) Option<Duration>);

impl Delay {
    /// For tables.
    pub(crate) fn text(self) -> String {
        match self.0 {
            Some(delay) => format!("{} ms", delay.as_secs_f64() * 1e3),
            None => "-".to_owned(),
        }
    }
}

impl Serialize for Delay {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.map(|delay| delay.as_secs_f64()).serialize(serializer)
    }
}

/// A way to a server.
pub(crate) struct Route<'a> {
    pub(crate) server: &'a Server,
    pub(crate) delay: Delay,
    /// The address for the callers.
    pub(crate) url: String,
    /// `None`: the callers connect to the server directly.
    pub(crate) proxy: Option<Proxy>,
}

/// All ways to all servers, in the order of the delays. SQLite has no network, so it is reached in
/// one way only.
pub(crate) fn routes<'a>(servers: &'a [Server], delays: &[Duration]) -> anyhow::Result<Vec<Route<'a>>> {
    let mut routes = Vec::new();
    for (number, delay) in delays.iter().enumerate() {
        for server in servers {
            if server.system != System::Sqlite {
                routes.push(Route::new(server, *delay)?);
            } else if number == 0 {
                routes.push(Route { server, delay: Delay(None), url: server.url.clone(), proxy: None });
            }
        }
    }
    Ok(routes)
}

impl<'a> Route<'a> {
    fn new(server: &'a Server, delay: Duration) -> anyhow::Result<Self> {
        let (mut url, mut proxy) = (server.url.clone(), None);
        if !delay.is_zero() {
            let (host, port) = address(server.system, &url)?;
            let started = Proxy::start(host, port, delay)?;
            url = redirected(&url, started.port);
            ensure!(
                address(server.system, &url)? == ("127.0.0.1".to_owned(), started.port),
                "--delay needs an address of {:?} in which the host follows `://`",
                server.system
            );
            proxy = Some(started);
        }
        Ok(Self { server, delay: Delay(Some(delay)), url, proxy })
    }

    /// The processor time of the proxy so far.
    pub(crate) fn processor_time(&self) -> Duration {
        self.proxy.as_ref().map_or(Duration::ZERO, Proxy::processor_time)
    }
}

/// How accurate a delay was.
#[derive(Serialize)]
pub(crate) struct Accuracy {
    #[serde(rename = "delay_seconds")]
    pub(crate) delay: Delay,
    /// By how much the delay of a chunk of bytes was too long, in microseconds.
    pub(crate) late: Distribution,
}

/// The accuracy of each delay, over all servers.
pub(crate) fn accuracy(routes: &[Route<'_>]) -> anyhow::Result<Vec<Accuracy>> {
    let mut delays: Vec<(Delay, Histogram<u64>)> = Vec::new();
    for route in routes {
        let Some(proxy) = &route.proxy else { continue };
        if let Some((_, late)) = delays.iter_mut().find(|(delay, _)| *delay == route.delay) {
            proxy.add_lateness_to(late)?;
        } else {
            let mut late = Histogram::new(3)?;
            proxy.add_lateness_to(&mut late)?;
            delays.push((route.delay, late));
        }
    }
    Ok(delays.into_iter().map(|(delay, late)| Accuracy { delay, late: distribution_of(&late) }).collect())
}

fn address(system: System, url: &str) -> anyhow::Result<(String, u16)> {
    let default = match system {
        System::Postgres => return of_database::<Postgres>(url),
        System::MySql => return of_database::<MySql>(url),
        System::Sqlite => anyhow::bail!("SQLite has no address"),
        System::Redis => 6379,
        System::ZooKeeper => 2181,
        System::Etcd => 2379,
    };
    let authority = &url[host_of(url)];
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => {
            Ok((without_brackets(host), port.parse().with_context(|| format!("the port of {system:?}"))?))
        }
        _ => Ok((without_brackets(authority), default)),
    }
}

fn of_database<DB: DatabaseStatistics>(url: &str) -> anyhow::Result<(String, u16)> {
    <DB as DatabaseStatistics>::address(&<DB as Database>::options(url)?).context("there is no network")
}

/// Of an IPv6 address.
fn without_brackets(host: &str) -> String {
    host.trim_start_matches('[').trim_end_matches(']').to_owned()
}

/// The same address with the port of a proxy.
fn redirected(url: &str, port: u16) -> String {
    let host = host_of(url);
    format!("{}127.0.0.1:{port}{}", &url[..host.start], &url[host.end..])
}

/// Where the host and port are in an address, which may have no scheme.
fn host_of(url: &str) -> std::ops::Range<usize> {
    let begin = url.find("://").map_or(0, |scheme| scheme + 3);
    let end = url[begin..].find(['/', '?']).map_or(url.len(), |length| begin + length);
    let begin = url[begin..end].rfind('@').map_or(begin, |user| begin + user + 1);
    begin..end
}

#[cfg(test)]
mod tests {
    use super::{address, redirected};
    use crate::contender::System;

    #[test]
    fn replaces_host_and_port() {
        for (url, expected) in [
            ("postgres://user:p%40ss@host:5433/name?a=b", "postgres://user:p%40ss@127.0.0.1:7/name?a=b"),
            ("mysql://root@host/mysql", "mysql://root@127.0.0.1:7/mysql"),
            ("redis://:secret@host:6380", "redis://:secret@127.0.0.1:7"),
            ("http://[::1]:2379/", "http://127.0.0.1:7/"),
            ("host:2181", "127.0.0.1:7"),
        ] {
            assert_eq!(redirected(url, 7), expected);
        }
    }

    #[test]
    fn finds_the_address() {
        for (system, url, expected) in [
            (System::Postgres, "postgres://user@host/name", ("host", 5432)),
            (System::MySql, "mysql://root@host:3307/mysql", ("host", 3307)),
            (System::Redis, "redis://:secret@host/1", ("host", 6379)),
            (System::Etcd, "http://[::1]:2380", ("::1", 2380)),
            (System::Etcd, "http://[::1]", ("::1", 2379)),
            (System::ZooKeeper, "host:2182", ("host", 2182)),
        ] {
            let found = address(system, url).ok();
            assert_eq!(found, Some((expected.0.to_owned(), expected.1)), "{url}");
        }
    }
}
