//! Turns from thread to thread, in many orders of their steps.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use shuttle::future::block_on;
use shuttle::thread;
use tokio::select;

use super::*;
use crate::interleavings::{draw, explore, pause};

const CALLERS: usize = 4;
const ROUNDS: usize = 2;

/// Those who have a turn.
type Inside = std::sync::Mutex<BTreeSet<Name>>;

async fn call(turns: &Arc<Turns>, inside: &Inside) {
    let name: Name = ["a", "b"][draw(2)].into();
    let moments = draw(5);
    let leaves = async {
        for _ in 0..moments {
            shuttle::future::yield_now().await;
        }
    };
    let turn = match draw(3) {
        0 => turns.try_enter(&name),
        1 => Some(turns.enter(&name).await),
        _ => select! {
            biased;
            turn = turns.enter(&name) => Some(turn),
            () = leaves => None,
        },
    };
    let Some(turn) = turn else { return };
    assert!(inside.lock().unwrap().insert(name.clone()), "two have the turn");
    pause().await;
    inside.lock().unwrap().remove(&name);
    drop(turn);
}

#[test]
fn one_at_a_time_and_nothing_left_over() {
    explore(|| {
        let (turns, inside) = (Arc::<Turns>::default(), Arc::<Inside>::default());
        let callers: Vec<_> = (0..CALLERS)
            .map(|_| {
                let (turns, inside) = (Arc::clone(&turns), Arc::clone(&inside));
                thread::spawn(move || {
                    block_on(async {
                        for _ in 0..ROUNDS {
                            call(&turns, &inside).await;
                        }
                    });
                })
            })
            .collect();
        for caller in callers {
            caller.join().unwrap();
        }
        assert!(turns.names().is_empty(), "a name is left over");
    });
}
