//! The measured process: a child process of the same program. It reads instructions from its
//! standard input, and ends when the input ends.

use std::io::Write;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader, Lines, Stdin};

use crate::clock::{Moment, now};
use crate::contender::{self, Job};
use crate::cost_report::CostMeasurement;
use crate::record::{Log, Record};
use crate::summary::Window;
use crate::workload;

/// The first line from the parent process.
#[derive(Serialize, Deserialize)]
pub(crate) enum Task {
    /// Runs the callers of a scenario.
    Workload(Job),
    /// Runs a measurement of the cost report.
    Cost(CostMeasurement),
}

/// The following lines, for a process that runs a workload.
#[derive(Serialize, Deserialize)]
pub(crate) enum Instruction {
    /// All callers acquire and release. The answer is the log.
    Run { begin: Moment, end: Moment },
    /// The first caller acquires. The answer follows when it has the lock.
    Acquire,
    /// The first caller releases. The answer is the log of this acquisition.
    Release,
}

pub(crate) async fn main() -> anyhow::Result<()> {
    let mut input = BufReader::new(tokio::io::stdin()).lines();
    let line = input.next_line().await?.context("there is no task")?;
    let job = match serde_json::from_str(&line)? {
        Task::Workload(job) => job,
        Task::Cost(measurement) => return measurement.run().await,
    };
    let group = contender::connect(&job).await?;
    reply(&"ready")?;
    match next_instruction(&mut input).await? {
        Some(Instruction::Run { begin, end }) => {
            let log = workload::run(group, &job, Window { begin, end }).await;
            reply(&log)
        }
        Some(Instruction::Acquire) => run_handovers(group, &job, &mut input).await,
        Some(Instruction::Release) | None => Ok(()),
    }
}

/// The workload of scenario D. The first `Acquire` has already been read.
async fn run_handovers(
    group: contender::CallerGroup,
    job: &Job,
    input: &mut Lines<BufReader<Stdin>>,
) -> anyhow::Result<()> {
    let mut callers = group.callers;
    let caller = callers.first_mut().context("there is no caller")?;
    loop {
        let mut log = Log::default();
        let requested = now();
        let fencing_token = loop {
            match caller.acquire().await {
                Ok(token) => break token,
                Err(error) => log.add_error(&error, &job.names[0]),
            }
        };
        let granted = now();
        reply(&"granted")?;
        let Some(Instruction::Release) = next_instruction(input).await? else { break };
        let releasing = now();
        if let Err(error) = caller.release().await {
            log.add_error(&error, &job.names[0]);
        }
        let (process, released) = (job.process, now());
        log.records.push(Record {
            process,
            caller: 0,
            requested,
            granted,
            releasing,
            released,
            fencing_token,
        });
        reply(&log)?;
        let Some(Instruction::Acquire) = next_instruction(input).await? else { break };
    }
    // The callers first: a session may end with its last caller.
    drop(callers);
    group.end.await;
    Ok(())
}

async fn next_instruction(input: &mut Lines<BufReader<Stdin>>) -> anyhow::Result<Option<Instruction>> {
    let line = input.next_line().await?;
    Ok(line.map(|line| serde_json::from_str::<Instruction>(&line)).transpose()?)
}

pub(crate) fn reply(message: &impl Serialize) -> anyhow::Result<()> {
    let mut output = std::io::stdout().lock();
    serde_json::to_writer(&mut output, message)?;
    writeln!(output)?;
    Ok(output.flush()?)
}
