//! Accounts of the server for one test.

use std::panic::{AssertUnwindSafe, resume_unwind};

use futures_util::FutureExt;
use lock_tests::TestServer;
use url::Url;

/// An account of the server.
pub struct Account {
    /// As it stands in SQL.
    pub name: String,
    user: String,
}

const PASSWORD: &str = "right";

impl Account {
    /// The same URL for this account.
    pub fn url(&self, url: &str) -> String {
        self.url_with_password(url, PASSWORD)
    }

    pub fn url_with_password(&self, url: &str, password: &str) -> String {
        let mut url = Url::parse(url).unwrap();
        url.set_username(&self.user).unwrap();
        url.set_password(Some(password)).unwrap();
        url.into()
    }
}

/// Makes an account with these options and rights, and drops it however the work ends.
pub async fn with_account<T: TestServer>(
    database: &T,
    options: &str,
    rights: &[&str],
    work: impl AsyncFnOnce(&Account),
) {
    let own = Url::parse(database.url()).unwrap();
    let name_of_database = own.path().trim_start_matches('/');
    // MySQL knows at most 32 characters.
    let user = format!("account_{}", &name_of_database[name_of_database.len() - 16..]);
    let is_postgres = T::NAME == "postgres";
    let name = if is_postgres { user.clone() } else { format!("'{user}'@'%'") };
    if is_postgres {
        let login = if options.contains("NOLOGIN") { "" } else { "LOGIN" };
        database.run(&format!("CREATE ROLE {name} {login} PASSWORD '{PASSWORD}' {options}")).await;
    } else {
        database.run(&format!("CREATE USER {name} IDENTIFIED BY '{PASSWORD}' {options}")).await;
    }
    let account = Account { name: name.clone(), user };
    let worked = AssertUnwindSafe(async {
        for right in rights {
            database.run(&format!("GRANT {right} ON distributed_lock TO {name}")).await;
        }
        work(&account).await;
    });
    let worked = worked.catch_unwind().await;
    if is_postgres {
        database.run(&format!("DROP OWNED BY {name}; DROP ROLE {name}")).await;
    } else {
        database.run(&format!("DROP USER {name}")).await;
    }
    if let Err(panic) = worked {
        resume_unwind(panic);
    }
}
