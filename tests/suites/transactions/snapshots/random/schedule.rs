//! The order of steps: actors say what they are about to do and wait, and a seeded schedule lets them go on one at a time.
//! A step that waits for another actor does not stop the schedule.

use std::cell::RefCell;
use std::fmt::Display;
use std::time::Duration;

use lock_tests::Random;
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;

/// What takes longer is taken to wait for another actor.
const GRACE: Duration = Duration::from_millis(15);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Its step is under way.
    Running,
    /// It may do its next step.
    Ready,
    Done,
}

/// The order of the steps of some actors, which run in one task.
#[derive(Debug)]
pub struct Schedule {
    states: RefCell<Vec<State>>,
    turns: Vec<Semaphore>,
    changed: Notify,
    log: RefCell<Vec<String>>,
}

/// One of the actors.
pub struct Actor<'a> {
    schedule: &'a Schedule,
    number: usize,
    pub name: &'static str,
    pub random: Random,
}

impl Schedule {
    pub fn new(actors: usize) -> Self {
        Self {
            states: RefCell::new(vec![State::Running; actors]),
            turns: (0..actors).map(|_| Semaphore::new(0)).collect(),
            changed: Notify::new(),
            log: RefCell::default(),
        }
    }

    pub fn actor(&self, number: usize, name: &'static str, random: Random) -> Actor<'_> {
        Actor { schedule: self, number, name, random }
    }

    /// Lets the actors go on until all are done.
    pub async fn direct(&self, random: &mut Random) {
        loop {
            let ready = self.in_state(State::Ready);
            if ready.is_empty() {
                if self.in_state(State::Running).is_empty() {
                    return;
                }
                self.changed.notified().await;
                continue;
            }
            let actor = random.pick(&ready);
            self.set(actor, State::Running);
            self.turns[actor].add_permits(1);
            // Now and then the next one comes while this step is under way.
            if random.below(4) != 0 {
                let _waits_for_another = timeout(GRACE, self.is_over(actor)).await;
            }
        }
    }

    /// What has happened.
    pub fn log(&self) -> String {
        self.log.borrow().join("\n")
    }

    async fn is_over(&self, actor: usize) {
        while self.states.borrow()[actor] == State::Running {
            self.changed.notified().await;
        }
    }

    fn in_state(&self, state: State) -> Vec<usize> {
        let states = self.states.borrow();
        (0..states.len()).filter(|&actor| states[actor] == state).collect()
    }

    fn set(&self, actor: usize, state: State) {
        self.states.borrow_mut()[actor] = state;
        self.changed.notify_one();
    }
}

impl Actor<'_> {
    /// Waits until this actor may do its next step.
    pub async fn step(&mut self, what: impl Display) {
        self.schedule.set(self.number, State::Ready);
        self.schedule.turns[self.number].acquire().await.unwrap().forget();
        self.note(what);
    }

    /// What came of a step.
    pub fn note(&self, what: impl Display) {
        self.schedule.log.borrow_mut().push(format!("{}: {what}", self.name));
    }

    pub fn done(&self) {
        self.schedule.set(self.number, State::Done);
    }

    /// Whether something happens that happens one time in so many.
    pub fn one_in(&mut self, times: usize) -> bool {
        self.random.below(times) == 0
    }
}
