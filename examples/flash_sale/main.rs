//! A flash sale over HTTP, with many more users than vouchers, who all click several times. The
//! first sale has no lock and sells more than there is. The second has a lock for each user and one
//! for the stock. In the third the stock is split into segments with a lock each.
//!
//! ```sh
//! cargo run --release --example flash_sale
//! DATABASE_URL=postgres://user@host/database cargo run --release --example flash_sale -- --segments 20
//! ```

mod drive;
mod report;
mod service;
mod store;

use std::io::Write;
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use lock_db::{Error, Locks};
use sqlx::{MySql, Pool, Postgres, Sqlite};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::drive::{clicks, drive};
use crate::report::Run;
use crate::service::{Protection, serve};
use crate::store::Store;

/// Held while this example uses the database.
const RUN_LOCK: &str = "lock-db-example:flash-sale";
const TIDY_UP_LIMIT: Duration = Duration::from_secs(30);

/// A flash sale over HTTP: without locks, with one lock for the stock, and with the stock in
/// segments of a lock each.
///
/// The two tables of the business, `lock_db_example_stock` and `…_orders`, are created anew and
/// removed at the end. The exit status is 1 when a sale with locks went wrong: more or less was
/// sold than there was, a user has two orders, the stock is below zero, or a request failed.
#[derive(Parser)]
struct Arguments {
    /// How many vouchers there are
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    stock: u32,

    /// How many users want one
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    users: u32,

    /// How often they click, all together
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    requests: u32,

    /// How many requests are under way at the same time
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    clients: u32,

    /// Into how many segments the stock is split in the last sale
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    segments: u32,

    /// How many connections the service has
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    connections: u32,

    /// How many milliseconds each order takes besides the database, while its locks are held: the
    /// confirmation of a payment, for example
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=10_000))]
    work: u64,

    /// Only the sale without locks; its mistakes then count
    #[arg(long)]
    unlocked: bool,

    /// Decides the order of the clicks; random if not given
    #[arg(long)]
    seed: Option<u64>,

    /// postgres://… or mysql://… (also MariaDB), with a user who may create tables; a temporary
    /// SQLite file if not given
    #[arg(long, env, hide_env_values = true)]
    database_url: Option<String>,
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
    let file = folder.path().join("sale.db");
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
    let pool = store::connect::<DB>(url, 2).await.context("connecting to the database")?;
    let locks = Locks::builder(pool.clone()).label("flash sale example").build();
    match locks.check().await {
        Err(Error::SchemaMissing { .. }) => {
            locks.migrate().await.context("making the table of the locks")?;
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
    let exit = locks
        .insert_lock(RUN_LOCK)
        .ttl(Duration::from_secs(10))
        .wait(Duration::from_secs(15))
        .run(async |_lease| {
            let exit = tokio::select! {
                exit = compare(&pool, url, arguments) => exit,
                pressed = tokio::signal::ctrl_c() => {
                    pressed.context("waiting for Ctrl-C")?;
                    eprintln!("\nInterrupted: tables are removed.");
                    Ok(ExitCode::from(130))
                }
            };
            let tidied_up = timeout(TIDY_UP_LIMIT, tidy_up(&pool)).await;
            let exit = exit?;
            tidied_up.context("removing the tables")?.context("removing the tables")?;
            Ok::<_, anyhow::Error>(exit)
        })
        .await;
    locks.close().await;
    pool.close().await;
    exit
}

/// The same clicks three times, the table, and the check.
async fn compare<DB: Store>(pool: &Pool<DB>, url: &str, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let Arguments { stock, users, requests, clients, connections, work, .. } = *arguments;
    let seed = arguments.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    eprintln!(
        "{stock} vouchers, {requests} requests of {users} users, {clients} at a time, on {} with {connections} \
         connections, {work} ms of other work for each order; seed {seed}",
        DB::NAME
    );
    let sales: &[Protection] = if arguments.unlocked {
        &[Protection::None]
    } else {
        &[
            Protection::None,
            Protection::Locks { segments: 1 },
            Protection::Locks { segments: arguments.segments },
        ]
    };
    let mut runs = Vec::new();
    for protection in sales {
        let run = sell(pool, url, *protection, seed, arguments).await;
        runs.push(run.with_context(|| format!("the sale with {protection}"))?);
    }
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{}", report::table(&runs))?;
    for run in &runs {
        writeln!(stdout, "{}", report::verdict(run))?;
    }
    let counts = |run: &&Run| arguments.unlocked || run.protection != Protection::None;
    let is_right = runs.iter().filter(counts).all(|run| run.mistakes().is_empty());
    Ok(if is_right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One sale, with a service of its own on a free port.
async fn sell<DB: Store>(
    pool: &Pool<DB>,
    url: &str,
    protection: Protection,
    seed: u64,
    arguments: &Arguments,
) -> anyhow::Result<Run> {
    let segments = match protection {
        Protection::None => 1,
        Protection::Locks { segments } => segments,
    };
    let stock = split(arguments.stock, segments);
    DB::create_tables(&mut *pool.acquire().await?, &stock).await.context("making the tables")?;
    // No sale finds rows of the previous one's locks.
    DB::remove_locks(&mut *pool.acquire().await?).await.context("removing the locks of the last sale")?;
    let requests = usize::try_from(arguments.requests)?;
    let clicks = clicks(requests, usize::try_from(arguments.users)?, &mut fastrand::Rng::with_seed(seed))?;

    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("opening a port")?;
    let address = listener.local_addr()?;
    let service_pool = store::connect::<DB>(url, arguments.connections).await?;
    let (stop, stopped) = oneshot::channel::<()>();
    let until_stopped = async {
        let _ = stopped.await;
    };
    let work = Duration::from_millis(arguments.work);
    let service = tokio::spawn(serve(service_pool, protection, work, listener, until_stopped));
    let outcome = drive(address, clicks, usize::try_from(arguments.clients)?).await?;
    drop(stop);
    service.await.context("the service")??;

    let books = DB::books(&mut *pool.acquire().await?).await.context("reading the books")?;
    let clicking_users = arguments.users.min(arguments.requests);
    let expected = i64::from(arguments.stock.min(clicking_users));
    Ok(Run { protection, requests, stock: i64::from(arguments.stock), expected, outcome, books })
}

/// Splits into parts that differ by at most one.
fn split(stock: u32, segments: u32) -> Vec<i64> {
    (0..segments).map(|segment| i64::from(stock / segments + u32::from(segment < stock % segments))).collect()
}

/// Removes the tables of the business and the rows of its locks.
async fn tidy_up<DB: Store>(pool: &Pool<DB>) -> sqlx::Result<()> {
    let mut connection = pool.acquire().await?;
    DB::drop_tables(&mut connection).await?;
    DB::remove_locks(&mut connection).await
}
