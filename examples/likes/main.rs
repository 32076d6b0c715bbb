//! A like counter behind HTTP, with many users who like one comment at the same time. Without a
//! lock, likes get lost. With an insert lock or a row lock of lock-db, none does.
//!
//! ```sh
//! cargo run --release --example likes
//! DATABASE_URL=postgres://user@host/database cargo run --release --example likes -- --processes 4
//! ```

mod drive;
mod processes;
mod report;
mod service;
mod store;

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use lock_db::{Error, LockInfo, Locks};
use sqlx::{MySql, Pool, Postgres, Sqlite};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use url::Url;

use crate::drive::{Load, drive};
use crate::processes::Services;
use crate::report::Run;
use crate::service::Protection;
use crate::store::Store;

/// The comment that all users like.
const COMMENT_ID: i64 = 1;
/// Held while this example uses the database.
const RUN_LOCK: &str = "lock-db-example:run";
const TIDY_UP_LIMIT: Duration = Duration::from_secs(30);

/// A like counter behind HTTP and many users at once: without a lock, with an insert lock, and with
/// a row lock.
///
/// The two tables of the business, `lock_db_example_*`, are created anew and removed at the end.
/// The exit status is 1 when a like was lost, or a request failed, in spite of a lock.
#[derive(Parser)]
struct Arguments {
    /// How many likes to send, each time
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    requests: u64,

    /// How many users send them at the same time
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    clients: u32,

    /// How many processes serve them, all on one database
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    processes: u32,

    /// Only serve, until Ctrl-C, for you to try with curl
    #[arg(long, value_name = "LOCK", num_args = 0..=1, default_missing_value = "insert")]
    serve: Option<Protection>,

    /// postgres://… or mysql://… (also MariaDB), with a user who may create tables; a temporary
    /// SQLite file if not given
    #[arg(long, env, hide_env_values = true)]
    database_url: Option<String>,

    /// For the processes that this one starts
    #[arg(long, hide = true, requires = "role_connections")]
    role_service: Option<Protection>,

    #[arg(long, hide = true)]
    role_connections: Option<u32>,
}

#[tokio::main]
async fn main() -> ExitCode {
    match start(&Arguments::parse()).await {
        Ok(exit) => exit,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn start(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    if let Some(url) = arguments.database_url.as_deref().filter(|url| !url.is_empty()) {
        return start_at(url, arguments).await;
    }
    let folder = tempfile::tempdir().context("making a temporary folder")?;
    let file = folder.path().join("likes.db");
    let exit = start_at(&format!("sqlite:{}", file.display()), arguments).await?;
    folder.close().context("removing the temporary folder")?;
    Ok(exit)
}

async fn start_at(url: &str, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    match url.split(':').next().unwrap_or_default() {
        "postgres" | "postgresql" => start_on::<Postgres>(url, arguments).await,
        "mysql" | "mariadb" => start_on::<MySql>(url, arguments).await,
        "sqlite" => start_on::<Sqlite>(url, arguments).await,
        other => bail!("the database URL begins with `{other}`: write postgres://…, mysql://… or sqlite://…"),
    }
}

async fn start_on<DB: Store>(url: &str, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let interrupted = tokio::spawn(interrupted());
    if let (Some(protection), Some(connections)) = (arguments.role_service, arguments.role_connections) {
        processes::serve_for_parent::<DB>(url, protection, connections, interrupted).await?;
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("{} at {}", DB::NAME, without_password(url)?);
    let pool = store::connect::<DB>(url, 2).await.context("connecting to the database")?;
    let locks = Locks::builder(pool.clone()).label("likes example").build();
    match locks.check().await {
        Err(Error::SchemaMissing { .. }) => {
            locks.migrate().await.context("making the table of the locks")?;
            locks.check().await?;
            if arguments.database_url.as_deref() == Some(url) {
                eprintln!("Made the table `distributed_lock` (and `_lock_db_migrations`), which will stay");
            }
        }
        checked => {
            for warning in checked?.warnings() {
                eprintln!("{warning}");
            }
        }
    }

    // Two runs in one database would remove each other's tables.
    if let Some(LockInfo { owner, held_until: Some(_), .. }) = locks.info(RUN_LOCK).await? {
        eprintln!("Waiting for another run of this example, {owner}, to end or to be found dead");
    }
    let exit = locks
        .insert_lock(RUN_LOCK)
        .ttl(Duration::from_secs(10))
        .wait(Duration::from_secs(15))
        .run(async |_lease| {
            let exit = run_until_interrupted(&pool, url, arguments, interrupted).await;
            let tidied_up = timeout(TIDY_UP_LIMIT, tidy_up(&pool)).await;
            let exit = exit?;
            tidied_up.context("removing the tables")?.context("removing the tables")?;
            Ok(exit)
        })
        .await;
    locks.close().await;
    pool.close().await;
    exit
}

async fn run_until_interrupted<DB: Store>(
    pool: &Pool<DB>,
    url: &str,
    arguments: &Arguments,
    interrupted: JoinHandle<std::io::Result<()>>,
) -> anyhow::Result<ExitCode> {
    if let Some(protection) = arguments.serve {
        let services = serve(pool, url, protection, arguments.processes).await?;
        interrupted.await?.context("waiting for Ctrl-C")?;
        eprintln!("\nStopping: requests under way are finished, locks are released, tables are removed.");
        services.stop().await?;
        return Ok(ExitCode::SUCCESS);
    }
    tokio::select! {
        exit = compare(pool, url, arguments) => exit,
        interrupted = interrupted => {
            interrupted?.context("waiting for Ctrl-C")?;
            eprintln!("\nInterrupted: services are ended, tables are removed.");
            Ok(ExitCode::from(130))
        }
    }
}

/// Starts services to try with curl.
async fn serve<DB: Store>(
    pool: &Pool<DB>,
    url: &str,
    protection: Protection,
    processes: u32,
) -> anyhow::Result<Services> {
    DB::create_tables(&mut *pool.acquire().await?, COMMENT_ID).await.context("making the tables")?;
    let services = Services::start(protection, processes, url).await?;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "Serving with {protection}. Try:\n")?;
    for address in services.addresses() {
        let comment = format!("http://{address}/comments/{COMMENT_ID}");
        writeln!(stdout, "  curl -X POST {comment}/like")?;
        writeln!(stdout, "  curl {comment}")?;
        writeln!(stdout, "  seq 200 | xargs -P 50 -I '{{}}' curl -s -o /dev/null -X POST {comment}/like\n")?;
    }
    writeln!(stdout, "Ctrl-C ends it.")?;
    Ok(services)
}

/// The same load three times, and the table.
async fn compare<DB: Store>(pool: &Pool<DB>, url: &str, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let Arguments { requests, clients, processes, .. } = *arguments;
    eprintln!(
        "{requests} likes of one comment, from {clients} clients at once; service processes: {processes}"
    );
    let mut runs = Vec::new();
    for protection in [Protection::None, Protection::Insert, Protection::Row] {
        let load = Load { requests, clients: usize::try_from(clients)? };
        let run = run(pool, url, protection, load, processes).await;
        runs.push(run.with_context(|| format!("the run with {protection}"))?);
    }
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{}", report::table(&runs))?;
    for run in &runs {
        writeln!(stdout, "{}", report::verdict(run))?;
    }
    let locks_work = runs.iter().all(|run| run.protection == Protection::None || run.is_right());
    Ok(if locks_work { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn run<DB: Store>(
    pool: &Pool<DB>,
    url: &str,
    protection: Protection,
    load: Load,
    processes: u32,
) -> anyhow::Result<Run> {
    DB::create_tables(&mut *pool.acquire().await?, COMMENT_ID).await.context("making the tables")?;
    let services = Services::start(protection, processes, url).await?;
    let progress = progress_bar(protection, load)?;
    let path = format!("/comments/{COMMENT_ID}/like");
    let outcome = drive(&services.addresses(), &path, load, &progress).await?;
    progress.finish();
    services.stop().await?;
    let comment = DB::comment(&mut *pool.acquire().await?, COMMENT_ID).await?;
    let comment = comment.ok_or_else(|| anyhow!("the comment is gone"))?;
    Ok(Run { protection, requests: load.requests, outcome, comment })
}

/// Hidden if the output is not a terminal.
fn progress_bar(protection: Protection, load: Load) -> anyhow::Result<ProgressBar> {
    let style = ProgressStyle::with_template("{prefix:12} {wide_bar} {pos}/{len}")?;
    Ok(ProgressBar::new(load.requests).with_style(style).with_prefix(protection.to_string()))
}

/// Removes the tables of the business and the rows of its locks.
async fn tidy_up<DB: Store>(pool: &Pool<DB>) -> sqlx::Result<()> {
    let mut connection = pool.acquire().await?;
    DB::drop_tables(&mut connection).await?;
    DB::remove_locks(&mut connection).await
}

/// Resolves on Ctrl-C, and when another process asks this one to end.
async fn interrupted() -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};

        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            pressed = tokio::signal::ctrl_c() => pressed,
            _ = terminate.recv() => Ok(()),
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}

/// Host, port and database of a URL.
fn without_password(url: &str) -> anyhow::Result<String> {
    let url = Url::parse(url).context("reading the database URL")?;
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    Ok(format!("{}{port}{}", url.host_str().unwrap_or_default(), url.path()))
}
