pub mod cells;
pub mod crash;
pub mod data;
pub mod holder;
pub mod reader;
pub mod statements;
