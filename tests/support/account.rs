//! Accounts of the server.

use url::Url;

use crate::{AtEnd, TestDatabase};

/// Makes an account of the server, besides that of the test. Returns the URL with which it connects, the
/// account as SQL names it, and what drops it.
pub async fn account<T: TestDatabase>(database: &T) -> (String, String, AtEnd<T::Database>) {
    let mut url = Url::parse(database.url()).unwrap();
    let name = if T::NAME == "postgres" {
        format!("{}_app", database.text("SELECT current_database()").await)
    } else {
        format!("{}_a", database.text("SELECT DATABASE()").await)
    };
    url.set_username(&name).unwrap();
    url.set_password(Some("secret")).unwrap();
    let (create, account, end) = if T::NAME == "postgres" {
        let end = vec![format!("DROP OWNED BY {name}"), format!("DROP ROLE {name}")];
        (format!("CREATE ROLE {name} LOGIN PASSWORD 'secret'"), name, end)
    } else {
        let account = format!("'{name}'@'%'");
        (
            format!("CREATE USER {account} IDENTIFIED BY 'secret'"),
            account.clone(),
            vec![format!("DROP USER {account}")],
        )
    };
    let at_end = AtEnd::new(database.url(), end);
    database.run(&create).await;
    (url.into(), account, at_end)
}
