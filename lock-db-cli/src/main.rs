//! The program `lock-db`: shows the locks in a database, and frees them.

mod args;
mod check;
mod connect;
mod exit;
mod list;
mod output;
mod prune;
mod release;
mod show;

use std::process::ExitCode;

use clap::Parser;

use self::args::{Args, Command};
use self::exit::Exit;

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::failed(&error.into()),
    };
    match runtime.block_on(run(args)) {
        Ok(exit) => exit.into(),
        Err(error) => exit::failed(&error),
    }
}

async fn run(args: Args) -> anyhow::Result<Exit> {
    let locks = connect::connect(&args.database_url)?;
    let done = match args.command {
        Command::Migrate => locks.migrate().await.map(|()| Exit::Done).map_err(Into::into),
        Command::Check(what) => check::check(&locks, &what).await,
        Command::List(what) => list::list(&locks, &what).await,
        Command::Show(what) => show::show(&locks, &what).await,
        Command::Release(what) => release::release(&locks, &what).await,
        Command::Prune(what) => prune::prune(&locks, &what).await,
    };
    locks.close().await;
    done
}
