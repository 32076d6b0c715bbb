//! The benchmark: lock-db beside other ways to lock. `bench/README.md` describes the scenarios.
//! `bench/run` starts the servers.

mod child;
mod clock;
mod contender;
mod cost_report;
mod database;
mod etcd;
mod handovers;
mod machine;
mod network;
mod plots;
mod proxy;
mod ratios;
mod record;
mod report;
mod runner;
mod scenario;
mod server;
mod statistics;
mod summary;
mod workload;
mod zookeeper;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use crate::contender::{Contender, Job, System};
use crate::cost_report::{CostReport, Sizes};
use crate::machine::Machine;
use crate::network::Route;
use crate::ratios::Ratios;
use crate::report::{Entry, Report, UNEQUAL, are_unequal, median_round};
use crate::runner::{Times, run_scenario};
use crate::scenario::{Kind, Names, Scenario};
use crate::server::{Facts, Server};

/// Measures how fast and how fair the locks of lock-db are, beside other ways to lock.
///
/// Creates the table `distributed_lock` in each database, and tables named `lock_bench_*`. Removes
/// the latter at the end. Use a database without other load. The exit status is 1 if two holders
/// overlapped, a fencing token did not grow, or a scenario failed.
#[derive(Parser)]
#[command(version)]
#[expect(clippy::struct_excessive_bools, reason = "switches of the command line")]
struct Arguments {
    /// postgres://…; the user needs the right to create tables
    #[arg(long, value_name = "URL", env = "LOCK_BENCH_POSTGRES_URL", hide_env_values = true)]
    postgres: Option<String>,

    /// mysql://… (also MariaDB); the user needs the right to create tables
    #[arg(long, value_name = "URL", env = "LOCK_BENCH_MYSQL_URL", hide_env_values = true)]
    mysql: Option<String>,

    /// redis://…
    #[arg(long, value_name = "URL", env = "LOCK_BENCH_REDIS_URL", hide_env_values = true)]
    redis: Option<String>,

    /// HOST:PORT of a server that answers `mntr` (4lw.commands.whitelist)
    #[arg(long, value_name = "ADDRESS", env = "LOCK_BENCH_ZOOKEEPER_ADDRESS")]
    zookeeper: Option<String>,

    /// http://…; version 3.4 or later
    #[arg(long, value_name = "URL", env = "LOCK_BENCH_ETCD_URL")]
    etcd: Option<String>,

    /// Measure SQLite, on a temporary file
    #[arg(long)]
    sqlite: bool,

    /// The folder for the SQLite file, preferably on a disk [default: the folder for temporary
    /// files]
    #[arg(long, value_name = "FOLDER", requires = "sqlite")]
    sqlite_folder: Option<PathBuf>,

    /// The delay of the network in each direction, in milliseconds. With several, each scenario is
    /// measured with each of them. Scenarios E to G and SQLite are measured without a delay
    #[arg(long, default_value = "0", value_delimiter = ',', value_parser = delay, value_name = "MILLISECONDS")]
    delay: Vec<Duration>,

    /// The scenarios to run [default: A to D, H and I]
    #[arg(long, value_delimiter = ',', value_name = "LETTERS")]
    scenarios: Vec<Kind>,

    /// Scenario E: the number of leases
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    leases: u32,

    /// Scenario E: how long the leases are held
    #[arg(long, default_value_t = 45.0, value_parser = seconds, value_name = "SECONDS")]
    hold_leases: f64,

    /// Scenario F: the length of each of the two runs
    #[arg(long, default_value_t = 60.0, value_parser = seconds, value_name = "SECONDS")]
    churn: f64,

    /// Scenario G: how often each operation runs
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(50..=100_000))]
    repeats: u32,

    /// Only the scenarios with these labels, as in the tables: A64,B512 [default: all]
    #[arg(long, value_delimiter = ',', value_name = "LABELS")]
    labels: Vec<String>,

    /// Only contenders whose title contains one of these texts: insert,INCR [default: all]
    #[arg(long, value_delimiter = ',', value_name = "TEXTS")]
    contenders: Vec<String>,

    /// Measure lock-db only
    #[arg(long)]
    without_peers: bool,

    /// How long to measure each contender in each scenario
    #[arg(long, default_value_t = 5.0, value_parser = seconds)]
    seconds: f64,

    /// How long to run before measuring
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    warm_up: f64,

    /// How often to run each scenario; the table shows the median round
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,

    /// How long a holder keeps the lock, in microseconds
    #[arg(long, default_value_t = 0, value_name = "MICROSECONDS")]
    hold: u64,

    /// The maximum size of the pool of each process; 10 is sqlx's default
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    connections: u32,

    /// Run even if some systems answer before a commit is on disk and others do not
    #[arg(long)]
    allow_unequal_durability: bool,

    /// Write all figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Write the tables to this file, in addition to the standard output
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    /// Write the plots to this folder
    #[arg(long, value_name = "FOLDER")]
    plots: Option<PathBuf>,

    /// Measure how accurate the delay is on this machine, with an echo server, and nothing else
    #[arg(long)]
    measure_proxy: bool,

    /// Set for child processes
    #[arg(long, hide = true)]
    child: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_error| "not a number".to_owned())?;
    if (0.0..=3600.0).contains(&seconds) { Ok(seconds) } else { Err("0 to 3600".to_owned()) }
}

fn delay(text: &str) -> Result<Duration, String> {
    let milliseconds: f64 = text.parse().map_err(|_error| "not a number".to_owned())?;
    if (0.0..=1000.0).contains(&milliseconds) {
        Ok(Duration::from_secs_f64(milliseconds / 1e3))
    } else {
        Err("0 to 1000".to_owned())
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let exit = if arguments.child {
        child::main().await.map(|()| ExitCode::SUCCESS)
    } else if arguments.measure_proxy {
        proxy::accuracy::measure().map(|()| ExitCode::SUCCESS)
    } else {
        measure(&arguments).await
    };
    exit.unwrap_or_else(|error| {
        eprintln!("Error: {error:#}");
        ExitCode::FAILURE
    })
}

async fn measure(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let folder = match &arguments.sqlite_folder {
        Some(folder) => tempfile::tempdir_in(folder),
        None => tempfile::tempdir(),
    };
    let folder = folder.context("creating a temporary folder")?;
    let mut servers = Vec::new();
    let mut add = |system, url: &Option<String>| {
        if let Some(url) = url.clone().filter(|url| !url.is_empty()) {
            servers.push(Server { system, url });
        }
    };
    add(System::Postgres, &arguments.postgres);
    add(System::MySql, &arguments.mysql);
    let file = format!("sqlite:{}", folder.path().join("locks.db").display());
    add(System::Sqlite, &arguments.sqlite.then_some(file));
    add(System::Redis, &arguments.redis);
    add(System::ZooKeeper, &arguments.zookeeper);
    add(System::Etcd, &arguments.etcd);
    if servers.is_empty() {
        bail!(
            "nothing to measure: pass --postgres, --mysql, --sqlite, --redis, --zookeeper or --etcd, or use bench/run"
        );
    }
    let mut facts = Vec::new();
    for server in &servers {
        facts.push(server.prepare().await?);
    }
    let report = tokio::select! {
        report = run_all(arguments, &servers, facts) => report,
        interrupted = tokio::signal::ctrl_c() => {
            interrupted?;
            Err(anyhow::anyhow!("interrupted"))
        }
    };
    for server in &servers {
        if let Err(error) = server.clean_up().await {
            eprintln!("Error: {error:#}");
        }
    }
    folder.close().context("removing the temporary folder")?;
    publish(arguments, &report?)
}

async fn run_all(arguments: &Arguments, servers: &[Server], facts: Vec<Facts>) -> anyhow::Result<Report> {
    if are_unequal(&facts) && !arguments.allow_unequal_durability {
        for Facts { name, durable, settings, .. } in &facts {
            eprintln!("{name}: durable: {durable} {settings:?}");
        }
        eprint!("{UNEQUAL}");
        bail!("make the settings equal, or pass --allow-unequal-durability");
    }
    let mut machine = Machine::before();
    let routes = network::routes(servers, &delays(arguments))?;
    let combinations = combinations(arguments, &routes);
    let times = Times {
        warm_up: Duration::from_secs_f64(arguments.warm_up),
        measured: Duration::from_secs_f64(arguments.seconds),
    };
    let bar = ProgressBar::new(combinations.len() as u64 * u64::from(arguments.rounds));
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {eta:>5} left  {msg}")?);
    // At a low rate, because drawing uses processor time.
    bar.enable_steady_tick(Duration::from_secs(1));
    let mut summaries: Vec<Vec<_>> = combinations.iter().map(|_combination| Vec::new()).collect();
    let mut failures: Vec<Option<String>> = vec![None; combinations.len()];
    let mut proxy_shares = vec![0.0_f64; combinations.len()];
    for round in 0..arguments.rounds {
        for (number, (scenario, route, contender)) in combinations.iter().enumerate() {
            let (label, system, title) = (scenario.label(), route.server.system, contender.title());
            bar.set_message(format!("{label} {system:?} {} {title}", route.delay.text()));
            let job = job(arguments, *scenario, route, *contender, &format!("{round}-{number}"));
            let (begin, used) = (Instant::now(), route.processor_time());
            match run_scenario(*scenario, &job, times).await {
                Ok(summary) => summaries[number].push(summary),
                Err(error) => failures[number] = Some(format!("{error:#}")),
            }
            let used = route.processor_time().saturating_sub(used).as_secs_f64();
            proxy_shares[number] = proxy_shares[number].max(used / begin.elapsed().as_secs_f64());
            bar.inc(1);
        }
    }
    let costs = measure_costs(arguments, servers, &bar).await;
    bar.finish_and_clear();
    machine.read_after();
    let accuracy = network::accuracy(&routes)?;
    let results = combinations.into_iter().zip(summaries).zip(failures).zip(proxy_shares);
    let results = results.map(|((((scenario, route, contender), summaries), failure), proxy_share)| {
        let (rounds, summary) = median_round(scenario, summaries);
        let (label, system, delay) = (scenario.label(), route.server.system, route.delay);
        Entry { scenario, label, system, delay, contender, rounds, summary, failure, proxy_share }
    });
    let results: Vec<Entry> = results.collect();
    Ok(Report {
        ratios: Ratios::of(&results),
        results,
        costs,
        accuracy,
        machine,
        servers: facts,
        seconds: arguments.seconds,
        warm_up_seconds: arguments.warm_up,
        hold_seconds: hold(arguments).as_secs_f64(),
        connections_per_process: arguments.connections,
    })
}

/// Runs the scenarios of the cost report that were requested.
async fn measure_costs(arguments: &Arguments, servers: &[Server], bar: &ProgressBar) -> CostReport {
    let sizes = Sizes {
        leases: arguments.leases,
        hold: Duration::from_secs_f64(arguments.hold_leases),
        churn: Duration::from_secs_f64(arguments.churn),
        repeats: arguments.repeats,
    };
    let mut cost_report = CostReport::default();
    for kind in arguments.scenarios.iter().copied().filter(|kind| kind.is_cost_report()) {
        for server in servers.iter().filter(|server| server.system.is_database()) {
            bar.set_message(format!("{kind:?} {:?}", server.system));
            cost_report.add(kind, server.system, &server.url, sizes).await;
        }
    }
    cost_report
}

/// All contenders of one scenario run one after the other, so that they find the machine in a
/// similar state.
fn combinations<'a>(
    arguments: &Arguments,
    routes: &'a [Route<'a>],
) -> Vec<(Scenario, &'a Route<'a>, Contender)> {
    let mut combinations = Vec::new();
    let is_selected = |contender: &Contender| {
        let texts = &arguments.contenders;
        texts.is_empty() || texts.iter().any(|text| contender.title().contains(text))
    };
    for scenario in scenarios(arguments) {
        for route in routes {
            for contender in Contender::of(route.server.system) {
                let is_measured = contender.is_lock_db() || !arguments.without_peers;
                if is_measured && scenario.includes(*contender) && is_selected(contender) {
                    combinations.push((scenario, route, *contender));
                }
            }
        }
    }
    combinations
}

fn scenarios(arguments: &Arguments) -> Vec<Scenario> {
    let is_selected =
        |scenario: &Scenario| arguments.labels.is_empty() || arguments.labels.contains(&scenario.label());
    Scenario::of(&arguments.scenarios).into_iter().filter(is_selected).collect()
}

/// The delays, each of them once.
fn delays(arguments: &Arguments) -> Vec<Duration> {
    let mut delays = Vec::new();
    for delay in &arguments.delay {
        if !delays.contains(delay) {
            delays.push(*delay);
        }
    }
    delays
}

fn hold(arguments: &Arguments) -> Duration {
    Duration::from_micros(arguments.hold)
}

fn job(arguments: &Arguments, scenario: Scenario, route: &Route<'_>, contender: Contender, key: &str) -> Job {
    // Each run has a prefix of its own, so that the rows of one run do not affect the next.
    let prefix = format!("{}{key}", server::name_prefix());
    let names = scenario.names();
    let name = |caller| if names == Names::One { prefix.clone() } else { format!("{prefix}:{caller}") };
    Job {
        system: route.server.system,
        contender,
        url: route.url.clone(),
        names: (0..scenario.callers).map(name).collect(),
        new_names: names == Names::New,
        connections: arguments.connections,
        process: 0,
        hold: hold(arguments),
    }
}

fn publish(arguments: &Arguments, report: &Report) -> anyhow::Result<ExitCode> {
    let scenarios = scenarios(arguments);
    let text = report.text(&scenarios);
    print!("{text}");
    if let Some(file) = &arguments.text {
        std::fs::write(file, text).with_context(|| format!("writing {}", file.display()))?;
    }
    if let Some(file) = &arguments.json {
        let json = serde_json::to_string_pretty(report)?;
        std::fs::write(file, json + "\n").with_context(|| format!("writing {}", file.display()))?;
    }
    if let Some(folder) = &arguments.plots {
        plots::draw(report, &scenarios, folder)?;
    }
    if report.results.iter().all(Entry::is_correct) && report.costs.is_correct() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("The run failed: see the columns `overlaps`, `tokens` and `lost`, and lines with FAILED.");
    Ok(ExitCode::FAILURE)
}
