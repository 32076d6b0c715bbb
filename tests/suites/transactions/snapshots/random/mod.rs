pub mod holders;
pub mod ledger;
pub mod schedule;
pub mod transactions;
pub mod work;
pub mod world;
