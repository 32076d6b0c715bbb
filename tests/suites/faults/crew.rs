//! The workers of a run, each with a network of its own, and what can be done to them.

use std::collections::BTreeMap;
use std::time::Duration;

use lock_tests::{Direction, Network, OwnServer, Process, Proxy, Random};
use tokio::time::Instant;

use super::TTL;
use super::broken::Mistake;
use super::events::{Event, Recorder, What};
use super::history::{Moment, now};
use super::nemesis::{Fault, Step};
use super::worker::{Contract, worker_of};

/// How long a message is under way while commits are slow.
const SLOW: Duration = Duration::from_millis(15);

/// Seconds: more than a TTL, but no longer than one can wait for a lock that was granted by a clock that went ahead.
const CLOCK_STEP: i64 = 5;

/// The way to the database from one place, where one worker after the other sits.
pub(crate) struct Way {
    pub(crate) url: String,
    pub(crate) proxy: Option<Proxy>,
    /// Where the worker runs, if not here.
    pub(crate) network: Option<Network>,
}

struct Place {
    way: Way,
    worker: Option<Process>,
    is_stopped: bool,
    is_parted: bool,
    /// Nobody heard of it, and nobody will.
    died_parted: bool,
    number: u64,
    /// What happens at the next commit.
    at_commit: Option<Fault>,
    cut_at: Option<Instant>,
}

/// What a worker has before it begins, and when it has nothing to do any more.
pub(crate) struct Idle {
    pub(crate) tasks: (u64, u64),
    /// In bytes.
    pub(crate) memory: (u64, u64),
}

/// Somebody died and had this lock.
#[derive(Debug, Clone)]
pub(crate) struct Death {
    pub(crate) name: String,
    pub(crate) at: Moment,
}

pub(crate) struct Crew<'a> {
    places: Vec<Place>,
    server: Option<&'a mut OwnServer>,
    random: Random,
    mistake: Option<Mistake>,
    workers: u64,
    pub(crate) recorder: Recorder,
    pub(crate) deaths: Vec<Death>,
    /// How often each fault took place.
    pub(crate) faults: BTreeMap<Fault, u64>,
}

impl<'a> Crew<'a> {
    pub(crate) fn new(
        ways: Vec<Way>,
        server: Option<&'a mut OwnServer>,
        seed: u64,
        mistake: Option<Mistake>,
    ) -> Self {
        let place = |way| Place {
            way,
            worker: None,
            is_stopped: false,
            is_parted: false,
            died_parted: false,
            number: 0,
            at_commit: None,
            cut_at: None,
        };
        let mut crew = Self {
            places: ways.into_iter().map(place).collect(),
            server,
            random: Random(seed),
            mistake,
            workers: 0,
            recorder: Recorder::default(),
            deaths: Vec::new(),
            faults: BTreeMap::new(),
        };
        crew.fill();
        crew
    }

    /// Puts a worker wherever there is none.
    pub(crate) fn fill(&mut self) {
        for place in self.places.iter_mut().filter(|place| place.worker.is_none()) {
            self.workers += 1;
            place.number = self.workers;
            place.is_stopped = false;
            let contract =
                Contract { seed: self.random.next(), number: place.number, mistake: self.mistake, ttl: TTL };
            place.worker = Some({
                let Way { url, network, .. } = &place.way;
                Process::spawn_in(network.as_ref(), "worker", url, contract.to_arguments())
            });
        }
    }

    pub(crate) async fn begin(&mut self, step: Step) {
        let Step { fault, place: index, lasts, .. } = step;
        let place = &mut self.places[index];
        let has_worker = place.worker.is_some();
        let took_place = match (fault, &place.way.proxy) {
            (Fault::Kill, _) => {
                self.kill(index).await;
                has_worker
            }
            (Fault::Stop, _) => place.stop(),
            (Fault::KillAtCommit | Fault::StopAtCommit, _) => {
                place.at_commit = Some(fault);
                false
            }
            (Fault::Starve, _) => {
                if let Some(worker) = &mut place.worker {
                    worker.say(&format!("starve {}", lasts.as_millis()));
                }
                has_worker
            }
            (Fault::CutAtCommit, Some(proxy)) => {
                place.at_commit = Some(fault);
                proxy.delay(Direction::ToServer, SLOW);
                proxy.delay(Direction::ToClient, SLOW);
                false
            }
            (Fault::Delay, Some(proxy)) => {
                proxy.delay(Direction::ToServer, self.random.millis(1, 100));
                proxy.delay(Direction::ToClient, self.random.millis(1, 100));
                true
            }
            (Fault::Cut, Some(proxy)) => {
                proxy.cut();
                true
            }
            (Fault::LoseAnswers, Some(proxy)) => {
                proxy.pause(Direction::ToClient);
                true
            }
            (Fault::Silence, Some(proxy)) => {
                proxy.swallow();
                proxy.pause(Direction::ToServer);
                proxy.pause(Direction::ToClient);
                true
            }
            (Fault::Refuse, Some(proxy)) => {
                proxy.refuse();
                proxy.cut();
                true
            }
            (Fault::Part, _) => {
                place.way.network.as_ref().expect("a network of its own").part();
                place.is_parted = true;
                true
            }
            (Fault::KillServer | Fault::ClockForward | Fault::ClockBack, _) => {
                let server = self.server.as_mut().expect("a server of our own");
                match fault {
                    Fault::KillServer => server.kill(),
                    Fault::ClockForward => server.set_clock(CLOCK_STEP),
                    _ => server.set_clock(-CLOCK_STEP),
                }
                true
            }
            (_, None) => unreachable!("there is no network here"),
        };
        *self.faults.entry(fault).or_default() += u64::from(took_place);
    }

    pub(crate) fn end(&mut self, step: Step) {
        let place = &mut self.places[step.place];
        place.at_commit = place.at_commit.filter(|fault| *fault != step.fault);
        match (step.fault, &place.way.proxy) {
            (Fault::Kill | Fault::KillAtCommit, _) => self.fill(),
            (Fault::Stop | Fault::StopAtCommit, _) => place.resume(),
            (Fault::Delay | Fault::CutAtCommit, Some(proxy)) => {
                proxy.delay(Direction::ToServer, Duration::ZERO);
                proxy.delay(Direction::ToClient, Duration::ZERO);
            }
            (Fault::LoseAnswers, Some(proxy)) => {
                proxy.cut();
                proxy.resume(Direction::ToClient);
            }
            (Fault::Silence, Some(proxy)) => {
                proxy.admit();
                proxy.resume(Direction::ToServer);
                proxy.resume(Direction::ToClient);
            }
            (Fault::Refuse, Some(proxy)) => proxy.admit(),
            (Fault::Part, proxy) => {
                place.way.network.as_ref().expect("a network of its own").join();
                place.is_parted = false;
                // The kernel said it once, and says it again only when it is asked: by keepalive, on servers that are
                // set to it.
                if std::mem::take(&mut place.died_parted) {
                    proxy.as_ref().inspect(|proxy| proxy.cut());
                }
            }
            (Fault::KillServer, _) => self.server.as_mut().expect("a server of our own").start(),
            (Fault::ClockForward | Fault::ClockBack, _) => {
                self.server.as_mut().expect("a server of our own").set_clock(0);
            }
            (Fault::Starve | Fault::Cut, _) => {}
            (_, None) => unreachable!("there is no network here"),
        }
    }

    async fn kill(&mut self, index: usize) {
        let place = &mut self.places[index];
        let Some(mut worker) = place.worker.take() else { return };
        for line in worker.kill_and_hear().await {
            self.recorder.hear(&line);
        }
        place.died_parted |= place.is_parted;
        let (number, at) = (place.number, now());
        let names = self.recorder.held_by(|client| worker_of(client) == number);
        self.deaths.extend(names.into_iter().map(|name| Death { name, at }));
    }

    /// Hears what there is to hear, and does what is due.
    pub(crate) async fn attend(&mut self) {
        for index in 0..self.places.len() {
            let place = &mut self.places[index];
            if place.cut_at.is_some_and(|at| at <= Instant::now()) {
                place.cut_at = None;
                place.way.proxy.as_ref().inspect(|proxy| proxy.cut());
                *self.faults.entry(Fault::CutAtCommit).or_default() += 1;
            }
            while let Some(line) = self.places[index].worker.as_mut().and_then(Process::overhear) {
                let commits = self.recorder.hear(&line);
                if let (true, Some(fault)) = (commits, self.places[index].at_commit) {
                    self.disturb_commit(index, fault).await;
                }
            }
        }
    }

    async fn disturb_commit(&mut self, index: usize, fault: Fault) {
        let place = &mut self.places[index];
        match fault {
            Fault::KillAtCommit => self.kill(index).await,
            Fault::StopAtCommit => {
                if !place.stop() {
                    return;
                }
            }
            _ => {
                place.cut_at = Some(Instant::now() + self.random.millis(0, 70));
                return;
            }
        }
        self.places[index].at_commit = None;
        *self.faults.entry(fault).or_default() += 1;
    }

    /// Nothing is wrong any more.
    pub(crate) fn heal(&mut self, steps: impl IntoIterator<Item = Step>) {
        for step in steps {
            self.end(step);
        }
        for place in &mut self.places {
            place.at_commit = None;
            place.cut_at = None;
        }
        self.fill();
    }

    /// Tells all to end, and waits until they have nothing to do any more.
    pub(crate) async fn end_work(&mut self) -> Vec<Idle> {
        let mut idle = Vec::new();
        for worker in self.places.iter_mut().filter_map(|place| place.worker.as_mut()) {
            worker.say("end");
        }
        for worker in self.places.iter_mut().filter_map(|place| place.worker.as_mut()) {
            loop {
                let line = worker.hear().await;
                if let Some(counts) = line.strip_prefix("idle ") {
                    let counts: Vec<u64> = counts.split(' ').map(|count| count.parse().unwrap()).collect();
                    let [tasks_before, tasks_after, memory_before, memory_after] = counts[..] else {
                        panic!("four numbers, not {line:?}");
                    };
                    idle.push(Idle {
                        tasks: (tasks_before, tasks_after),
                        memory: (memory_before, memory_after),
                    });
                    break;
                }
                self.recorder.hear(&line);
            }
        }
        idle
    }

    /// Waits until all have ended, which must be without an error.
    pub(crate) async fn leave(&mut self) {
        for worker in self.places.iter_mut().filter_map(|place| place.worker.take()) {
            let status = worker.wait().await;
            assert!(status.success(), "a worker has ended with {status}");
        }
    }
}

impl Place {
    /// Whether there was somebody to stop.
    fn stop(&mut self) -> bool {
        let Some(worker) = self.worker.as_ref().filter(|_| !self.is_stopped) else { return false };
        worker.stop();
        self.is_stopped = true;
        true
    }

    fn resume(&mut self) {
        if let Some(worker) = self.worker.as_ref().filter(|_| self.is_stopped) {
            worker.resume();
            self.is_stopped = false;
        }
    }
}

impl Recorder {
    /// Whether somebody is about to commit.
    fn hear(&mut self, line: &str) -> bool {
        let Some(event) = Event::parse(line) else { return false };
        let commits = matches!(event.what, What::Commits { .. });
        self.note(event);
        commits
    }
}
