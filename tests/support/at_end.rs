use std::marker::PhantomData;
use std::thread;
use std::time::Duration;

use sqlx::Connection;
use tokio::runtime::Builder;

use crate::Backend;

/// Runs statements when it is dropped, however the case ends. For objects that a case creates
/// outside of its own database, such as roles and other databases.
#[derive(Debug)]
pub struct AtEnd<DB: Backend> {
    url: String,
    statements: Vec<String>,
    database: PhantomData<fn() -> DB>,
}

impl<DB: Backend> AtEnd<DB> {
    pub fn new(url: &str, statements: impl IntoIterator<Item = String>) -> Self {
        Self { url: url.to_owned(), statements: statements.into_iter().collect(), database: PhantomData }
    }
}

impl<DB: Backend> Drop for AtEnd<DB> {
    fn drop(&mut self) {
        let (url, statements) = (self.url.clone(), std::mem::take(&mut self.statements));
        // On a separate thread, because this one belongs to a runtime.
        let done = thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let all = async {
                let mut connection = DB::Connection::connect(&url).await?;
                for sql in &statements {
                    DB::run(&mut connection, sql).await?;
                }
                connection.close().await
            };
            let done = async { tokio::time::timeout(Duration::from_secs(30), all).await };
            runtime.block_on(done).map_err(|_| sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()))?
        });
        let done: Result<sqlx::Result<()>, _> = done.join();
        if !matches!(done, Ok(Ok(()))) {
            eprintln!("lock-tests: something is left on the server: {done:?}");
        }
    }
}
