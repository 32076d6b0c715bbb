//! Tests of passing permits from thread to thread, in many interleavings.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use shuttle::future::block_on;
use shuttle::thread;
use tokio::select;

use super::*;
use crate::interleavings::{draw, explore, pause};

const CALLERS: usize = 4;
const ROUNDS: usize = 2;

/// The names whose permit is taken.
type Inside = std::sync::Mutex<BTreeSet<Name>>;

async fn call(queue: &Arc<KeyedQueue>, inside: &Inside) {
    let name: Name = ["a", "b"][draw(2)].into();
    let moments = 1 + draw(5);
    let leaves = async {
        for _ in 0..moments {
            shuttle::future::yield_now().await;
        }
    };
    let permit = match draw(3) {
        0 => queue.try_enter(&name),
        1 => Some(queue.enter(&name).await),
        _ => select! {
            biased;
            // First, so that a caller may also leave when it has just become the next one.
            () = leaves => None,
            permit = queue.enter(&name) => Some(permit),
        },
    };
    let Some(permit) = permit else { return };
    assert!(inside.lock().unwrap().insert(name.clone()), "two have the permit");
    pause().await;
    inside.lock().unwrap().remove(&name);
    drop(permit);
}

#[test]
fn one_at_a_time_and_nothing_left_over() {
    explore(|| {
        let (queue, inside) = (Arc::<KeyedQueue>::default(), Arc::<Inside>::default());
        let callers: Vec<_> = (0..CALLERS)
            .map(|_| {
                let (queue, inside) = (Arc::clone(&queue), Arc::clone(&inside));
                thread::spawn(move || {
                    block_on(async {
                        for _ in 0..ROUNDS {
                            call(&queue, &inside).await;
                        }
                    });
                })
            })
            .collect();
        for caller in callers {
            caller.join().unwrap();
        }
        assert!(queue.names().is_empty(), "a name is left over");
    });
}
