//! The life cycle of a private connection: how it is made and used, how a silent one is detected,
//! and how it ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Connection as _;
use tokio::select;
use tokio::task::spawn_local;
use tokio::time::{sleep, sleep_until, timeout};

use super::connector::{CONNECT_LIMIT, Connector, no_answer};
use super::earlier::any_number;
use super::worker::WorkerLoop;
use crate::database::{Failure, StepError};
use crate::database::{Fault, Found, Location, LockDatabase, Server};
use crate::jitter::jitter;

/// How long this process does not listen after a server did not answer. A listening connection that
/// is left idle in a dead network takes long to end.
pub(super) const DEAF_FOR: Duration = Duration::from_mins(5);
/// How long a connection that has answered before may be silent before a second one is made. Less
/// than the time for a first answer.
pub(super) const SILENCE: Duration = Duration::from_millis(700);
/// The allowed silence is also at least this many times what recent answers and connections have
/// taken.
const PACES: u32 = 8;
/// How long a connection may take to close.
pub(super) const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// A connection, and what has been found out on it.
pub(super) struct Private<DB: LockDatabase> {
    pub(super) link: Link<DB>,
    pub(super) server: Option<Server>,
    /// When it is to be closed, by the pool's `max_lifetime`.
    retires: Option<Instant>,
    used: Instant,
    /// The session of the other connection that this one has seen, and its own: see `flush`.
    pub(super) seen: Option<(i64, i64)>,
}

/// A connection, which may listen.
pub(super) enum Link<DB: LockDatabase> {
    Plain(DB::Connection),
    Listening(DB::Listening),
}

impl<DB: LockDatabase> Link<DB> {
    pub(super) async fn connection(&mut self) -> Result<&mut DB::Connection, StepError> {
        match self {
            Self::Plain(connection) => Ok(connection),
            Self::Listening(listening) => DB::listening_connection(listening).await,
        }
    }
}

impl<DB: LockDatabase> WorkerLoop<DB> {
    /// Passes on notifications. Never resolves on databases without notifications, and may be
    /// dropped at any time.
    pub(super) async fn notified(&mut self) {
        let Some(Private { link: Link::Listening(listening), .. }) = &mut self.connection else {
            return std::future::pending().await;
        };
        match DB::notified(listening).await {
            Ok(id) => self.notifications.notify(id),
            Err(_gone) => self.give_up_connection(),
        }
    }

    /// When the connection is to be closed: by the pool's `max_lifetime`, or by its `idle_timeout`
    /// unless a notification is expected.
    pub(super) fn retires_at(&self) -> Option<Instant> {
        let Private { retires, used, .. } = self.connection.as_ref()?;
        let is_awaited = self.may_listen && self.notifications.waits();
        let idle = self.connector.idle_timeout().filter(|_| !is_awaited);
        let idle = idle.and_then(|timeout| used.checked_add(timeout));
        retires.iter().copied().chain(idle).min()
    }

    /// Closes a connection that has reached the maximum age or idle time of the pool's connections.
    /// The pool's options may have changed since it was made. The next operation makes another
    /// connection. Until that one listens again, waiters poll.
    pub(super) fn retire(&mut self) {
        let Some(Private { link, .. }) = self.connection.take() else { return };
        self.earlier.mark_closed();
        if matches!(link, Link::Listening(_)) {
            self.notifications.end();
        }
        close(link);
    }

    pub(super) fn give_up_connection(&mut self) {
        if self.connection.take().is_some() {
            self.notifications.end();
            self.lost.notify_one();
        }
    }

    /// Runs one operation on the table.
    pub(super) async fn on_connection<T>(
        &mut self,
        limit: Duration,
        operation: impl AsyncFnOnce(&mut DB::Connection, &Server) -> Result<T, StepError>,
    ) -> Result<T, Failure> {
        self.on_table(limit, SILENCE, operation).await
    }

    /// Like `on_connection`, for an operation that waits on the server for up to `silence`.
    pub(super) async fn on_table<T>(
        &mut self,
        limit: Duration,
        silence: Duration,
        operation: impl AsyncFnOnce(&mut DB::Connection, &Server) -> Result<T, StepError>,
    ) -> Result<T, Failure> {
        let known = self.connection.as_ref().and_then(|connection| connection.server.clone());
        let location = Arc::clone(&self.location);
        let answer = self
            .on_bare_connection(limit, silence, async move |connection| {
                let server = match known {
                    Some(server) => server,
                    None => find_table::<DB>(connection, &location).await?,
                };
                match operation(connection, &server).await.map_err(Failure::new::<DB>) {
                    Err(failure) if failure.fault == Fault::Disconnected => Err(failure),
                    Err(failure) if DB::lacks_right(failure.source()) => {
                        let checked = DB::check(connection, &server).await.map_err(Failure::new::<DB>);
                        Ok((server, Err(checked.err().unwrap_or(failure))))
                    }
                    answer => Ok((server, answer)),
                }
            })
            .await;
        let (server, answer) = answer?;
        if let Some(connection) = &mut self.connection {
            // A table that was changed or dropped is located again.
            let is_other = matches!(&answer, Err(failure) if failure.is_about_table());
            connection.server = (!is_other).then_some(server);
        }
        answer
    }

    /// Runs one operation, and gives the connection up if it is broken or does not answer in time.
    ///
    /// A connection that is silent for longer than `silence` may have been dropped while it was
    /// idle, by a network that reports nothing. So a second one is made. If the server knows of no
    /// work on the first, the first one counts as broken, and the next attempt uses the second.
    pub(super) async fn on_bare_connection<T>(
        &mut self,
        limit: Duration,
        silence: Duration,
        operation: impl AsyncFnOnce(&mut DB::Connection) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let asked = Instant::now();
        let deadline = asked + limit;
        let kept = self.connection.take();
        let may_be_dropped = DB::IS_REMOTE && kept.is_some();
        let mut connection = if let Some(connection) = kept {
            connection
        } else {
            let limit = limit.min(CONNECT_LIMIT);
            match timeout(limit, self.connect()).await {
                Ok(made) => made?,
                Err(_elapsed) => return Err(self.mark_silent(limit)),
            }
        };
        let silence = if may_be_dropped { silence.max(PACES * self.pace) } else { limit };
        let listening = self.is_to_listen();
        let Self { earlier, connector, .. } = self;
        let known = earlier.current();
        let running = async {
            let used = connection.link.connection().await.map_err(Failure::new::<DB>)?;
            if earlier.is_some() && !earlier.end::<DB>(used).await? {
                return Ok(Err(Failure::session_remains::<DB>()));
            }
            match operation(used).await {
                Err(failure) if failure.fault == Fault::Disconnected => Err(failure),
                result => Ok(result),
            }
        };
        let second = async {
            sleep(silence).await;
            match known {
                Some(known) => in_place_of(connector, listening, known).await,
                None => std::future::pending().await,
            }
        };
        let outcome = select! {
            biased;
            result = running => OperationEnd::Answer(result),
            (link, number) = second, if silence < limit => OperationEnd::Second(link, number),
            () = sleep_until(deadline.into()) => OperationEnd::Silence,
        };
        match outcome {
            OperationEnd::Answer(Ok(result)) => {
                let now = Instant::now();
                if silence < limit {
                    self.pace = now.duration_since(asked).max(self.pace * 7 / 8);
                }
                connection.used = now;
                self.connection = Some(connection);
                self.answered.set(Some(now));
                self.vitals.answered(now);
                result
            }
            OperationEnd::Answer(Err(broken)) => {
                self.leave(&connection);
                Err(broken)
            }
            OperationEnd::Second(link, number) => {
                tracing::debug!("a private connection was dropped without a word: another one is used");
                self.leave(&connection);
                self.earlier.continue_with(number);
                // If the server is only slow, the next operation gets more time, according to how
                // long this one took. The silence itself is not counted, or it would grow with each
                // operation.
                self.pace = self.pace.max(asked.elapsed().saturating_sub(silence) / 4);
                self.connection = Some(self.private(link));
                Err(Failure::new::<DB>(StepError::disconnected(
                    "the connection was dropped while it was idle",
                )))
            }
            OperationEnd::Silence => {
                self.leave(&connection);
                Err(self.mark_silent(limit))
            }
        }
    }

    /// Gives up a connection that is broken or silent, or whose session may have something locked.
    pub(super) fn leave(&mut self, connection: &Private<DB>) {
        self.earlier.mark_given_up();
        if matches!(connection.link, Link::Listening(_)) {
            self.notifications.end();
        }
        self.lost.notify_one();
    }

    pub(super) fn mark_silent(&mut self, limit: Duration) -> Failure {
        self.deaf_until = Some(Instant::now() + DEAF_FOR);
        no_answer::<DB>(self.connector.waits_for_hook(), limit)
    }

    pub(super) async fn connect(&mut self) -> Result<Private<DB>, Failure> {
        let asked = Instant::now();
        let mut link = self.connector.make(self.is_to_listen()).await?;
        let prepared = async { DB::prepare(link.connection().await?, self.earlier.next()).await };
        prepared.await.map_err(Failure::new::<DB>)?;
        self.pace = self.pace.max(asked.elapsed() / 4);
        Ok(self.private(link))
    }

    fn is_to_listen(&self) -> bool {
        DB::NOTIFIES && self.may_listen && self.deaf_until.is_none_or(|until| until <= Instant::now())
    }

    fn private(&self, link: Link<DB>) -> Private<DB> {
        // The ages differ, so that the connections of a process do not all retire at once. None
        // becomes older than the pool's own.
        let age = |lifetime: Duration| (lifetime / 5 * 4).saturating_add(jitter(lifetime / 5));
        let retires =
            self.connector.lifetime().and_then(|lifetime| Instant::now().checked_add(age(lifetime)));
        Private { link, server: None, retires, used: Instant::now(), seen: None }
    }
}

/// The outcome of an operation.
enum OperationEnd<DB: LockDatabase, T> {
    /// `Err`: the connection is broken.
    Answer(Result<Result<T, Failure>, Failure>),
    /// The connection was dropped. This one replaces it, with the number of its session.
    Second(Link<DB>, i64),
    Silence,
}

/// Makes another connection, and returns it if the server knows of no work on the first. If there
/// is work, the first connection is waited for.
async fn in_place_of<DB: LockDatabase>(
    connector: &mut Connector<DB>,
    listening: bool,
    first: i64,
) -> (Link<DB>, i64) {
    let number = any_number();
    if let Ok(mut link) = connector.make(listening).await {
        let is_idle = async {
            let connection = link.connection().await?;
            DB::prepare(connection, number).await?;
            DB::is_idle(connection, first, number).await
        };
        if is_idle.await.unwrap_or(false) {
            return (link, number);
        }
        close(link);
    }
    std::future::pending().await
}

/// Closes a connection in the background.
fn close<DB: LockDatabase>(link: Link<DB>) {
    if let Link::Plain(connection) = link {
        drop(spawn_local(async move {
            let _in_time = timeout(CLOSE_LIMIT, connection.close()).await;
        }));
    }
}

async fn find_table<DB: LockDatabase>(
    connection: &mut DB::Connection,
    location: &Location,
) -> Result<Server, Failure> {
    match DB::find_table(connection, location.schema().as_deref()).await.map_err(Failure::new::<DB>)? {
        Found::Table(server) => Ok(location.set(server)),
        Found::Nothing => Err(Failure::table_missing::<DB>()),
        Found::Differs(column) => Err(Failure::table_differs::<DB>(column)),
        Found::Unusable(reason) => Err(Failure::unusable_table::<DB>(reason)),
    }
}
