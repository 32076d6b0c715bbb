//! The database, by its address.

use std::str::FromStr;

use anyhow::{Context, bail};
use lock_db::{AnyLocks, LockDatabase, Locks};
use sqlx::mysql::MySqlConnectOptions;
use sqlx::pool::PoolOptions;
use sqlx::postgres::PgConnectOptions;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{Connection, Database, MySql, Postgres, Sqlite};

/// What the owner of a lock shows of this program.
const LABEL: &str = "lock-db";

/// The locks in the database with this address. Does not connect yet.
pub(crate) fn connect(url: &str) -> anyhow::Result<AnyLocks> {
    let (scheme, _) = url.split_once(':').unwrap_or_default();
    match scheme {
        "postgres" | "postgresql" => {
            locks::<Postgres>(PgConnectOptions::from_str(url).map(|options| options.application_name(LABEL)))
        }
        "mysql" | "mariadb" => locks::<MySql>(MySqlConnectOptions::from_str(url)),
        // The program makes no database where the address has a mistake.
        "sqlite" => locks::<Sqlite>(SqliteConnectOptions::from_str(url)),
        _ if url.is_empty() => {
            bail!(
                "which database? Set DATABASE_URL, or give --database-url postgres://…, mysql://… or sqlite://…"
            )
        }
        _ => bail!("an address begins with postgres://, mysql:// or sqlite://"),
    }
}

fn locks<DB: LockDatabase>(
    options: Result<<<DB as Database>::Connection as Connection>::Options, sqlx::Error>,
) -> anyhow::Result<AnyLocks> {
    // The address may have a password, so it is not shown.
    let options = options.context("the address of the database can't be read")?;
    let pool = PoolOptions::<DB>::new().max_connections(2).connect_lazy_with(options);
    Ok(Locks::builder(pool).label(LABEL).prune_after(None).build().into())
}
