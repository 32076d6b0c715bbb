//! Runs a scenario in child processes.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use crate::child::{Instruction, Task};
use crate::clock::{after, now};
use crate::contender::Job;
use crate::handovers::HOLD_LIMIT;
use crate::record::Log;
use crate::scenario::Scenario;
use crate::summary::{Summary, Window};

const START_LIMIT: Duration = Duration::from_mins(1);
/// Time for callers and pools to end, and to transfer many records.
const END_LIMIT: Duration = Duration::from_secs(90);
/// Time for all processes to receive the instruction. It is added to the warm-up.
const NOTICE: Duration = Duration::from_millis(50);

/// How long a scenario runs.
#[derive(Clone, Copy)]
pub(crate) struct Times {
    pub(crate) warm_up: Duration,
    pub(crate) measured: Duration,
}

/// Runs one scenario. `job` is the job of the first process. The others differ only in their process number.
pub(crate) async fn run_scenario(scenario: Scenario, job: &Job, times: Times) -> anyhow::Result<Summary> {
    let mut processes = Vec::new();
    for process in 0..scenario.processes {
        processes.push(Process::start(&Task::Workload(Job { process, ..job.clone() })).await?);
    }
    if scenario.kind.is_wake_up() {
        introduce(&mut processes).await?;
    }
    let begin = after(now(), NOTICE + times.warm_up);
    let end = after(begin, times.measured);
    for process in &mut processes {
        process.send(&Instruction::Run { begin, end }).await?;
    }
    let mut log = Log::default();
    for process in &mut processes {
        log.add(process.receive(NOTICE + times.warm_up + times.measured + END_LIMIT).await?);
    }
    for process in processes {
        process.end().await?;
    }
    let (contention, window) = (scenario.contention(), Window { begin, end });
    if scenario.kind.is_wake_up() {
        Summary::of_handovers(log, &contention, window)
    } else {
        Summary::new(log, &contention, window)
    }
}

/// Connects two processes to each other, and lets the first one hold the locks.
async fn introduce(processes: &mut [Process]) -> anyhow::Result<()> {
    let [one, other] = processes else { bail!("two processes are needed") };
    one.send(&Instruction::Listen).await?;
    let port: u16 = one.receive(START_LIMIT).await?;
    other.send(&Instruction::Connect(port)).await?;
    let _connected: String = other.receive(START_LIMIT).await?;
    one.send(&Instruction::Hold).await?;
    let _held: String = one.receive(HOLD_LIMIT + START_LIMIT).await?;
    Ok(())
}

/// A child process that follows instructions.
pub(crate) struct Process {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Process {
    pub(crate) async fn start(task: &Task) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("finding the file of this program")?;
        let mut child = Command::new(program)
            .arg("--child")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("starting a process")?;
        let input = child.stdin.take().context("a process without input")?;
        let output = child.stdout.take().context("a process without output")?;
        let mut process = Self { child, input, output: BufReader::new(output).lines() };
        // The address may contain a password, and all users of the machine can read arguments. So
        // the task is not an argument.
        process.send(task).await?;
        let _ready: String = process.receive(START_LIMIT).await?;
        Ok(process)
    }

    async fn send(&mut self, message: &impl Serialize) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        Ok(self.input.write_all(&line).await?)
    }

    pub(crate) async fn receive<T: DeserializeOwned>(&mut self, limit: Duration) -> anyhow::Result<T> {
        let line = timeout(limit, self.output.next_line()).await.context("a process does not answer")??;
        let line = line.context("a process ended too early; its error is above")?;
        Ok(serde_json::from_str(&line)?)
    }

    /// Waits for the end of the process. Call this after its last answer.
    pub(crate) async fn end(mut self) -> anyhow::Result<()> {
        drop(self.input);
        let ended = timeout(START_LIMIT, self.child.wait()).await;
        let status = ended.context("a process does not end")??;
        anyhow::ensure!(status.success(), "a process ended with {status}");
        Ok(())
    }
}
