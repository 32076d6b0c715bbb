//! Ports for servers that a test starts.

use std::hash::{BuildHasher, RandomState};
use std::net::TcpListener;

use crate::Random;

/// A free port on 127.0.0.1. It is below the range of outgoing connections, so that it is still
/// free after the server was killed.
pub fn free_port() -> u16 {
    let mut random = Random(RandomState::new().hash_one(0));
    loop {
        let port = 20_000 + u16::try_from(random.below(12_000)).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
