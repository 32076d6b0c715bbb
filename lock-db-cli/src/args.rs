//! The arguments.

use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand};

/// Shows the locks of lock-db in a database, and frees them.
#[derive(Debug, Parser)]
#[command(
    name = "lock-db",
    version,
    after_help = "Exit status: 0 done, 1 failed, 2 wrong arguments, 3 there is no such lock or the number is not that of its \
                  present grant."
)]
pub(crate) struct Args {
    /// The database that has the table `distributed_lock`: postgres://…, mysql://… (also MariaDB) or
    /// sqlite://…
    #[arg(
        long,
        env = "DATABASE_URL",
        hide_env_values = true,
        value_name = "URL",
        global = true,
        default_value = ""
    )]
    pub(crate) database_url: String,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Creates the table, and brings it up to date
    Migrate,
    /// Checks the table, and shows what could be better
    Check(CheckArgs),
    /// Lists locks, by name
    List(ListArgs),
    /// Shows one lock: who holds it, and who waits
    Show(ShowArgs),
    /// Ends a lease by force, if its grant has this number
    ///
    /// The holder is told with its next renewal, and can't commit under the lock any more. Until then
    /// it may go on with other work: end its process first if you can. `show` prints the number.
    Release(ReleaseArgs),
    /// Removes the rows of names that were not used for long
    Prune(PruneArgs),
}

#[derive(Debug, ClapArgs)]
pub(crate) struct CheckArgs {
    /// Prints JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ListArgs {
    /// Which names; `*` stands for anything
    #[arg(default_value = "*")]
    pub(crate) pattern: String,
    /// Only locks that are held
    #[arg(long)]
    pub(crate) held: bool,
    /// At most this many locks
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) limit: Option<u32>,
    /// Only names behind this one
    #[arg(long, value_name = "NAME")]
    pub(crate) after: Option<String>,
    /// Prints JSON, an array of objects
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ShowArgs {
    /// The name of the lock
    pub(crate) name: String,
    /// Prints JSON, an object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ReleaseArgs {
    /// The name of the lock
    pub(crate) name: String,
    /// The number of the grant, as `show` and `list` print it
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub(crate) token: i64,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct PruneArgs {
    /// For how long a name was not used, for example 30d or 12h
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) older_than: Duration,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Args;

    #[test]
    fn arguments_are_consistent() {
        Args::command().debug_assert();
    }
}
