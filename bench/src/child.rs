//! The measured process: a child process of the same program. It reads instructions from its
//! standard input, and ends when the input ends.

use std::io::Write;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::clock::Moment;
use crate::contender::{self, Job};
use crate::cost_report::CostMeasurement;
use crate::handovers::{self, Peer};
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
    /// The process expects a connection of the other process. The answer is the port.
    Listen,
    /// The process connects to the port of the other process. The answer follows when it has done so.
    Connect(u16),
    /// All callers acquire. The answer follows when they have their locks.
    Hold,
}

pub(crate) async fn main() -> anyhow::Result<()> {
    let mut input = BufReader::new(tokio::io::stdin()).lines();
    let line = input.next_line().await?.context("there is no task")?;
    let job = match serde_json::from_str(&line)? {
        Task::Workload(job) => job,
        Task::Cost(measurement) => return measurement.run().await,
    };
    let mut group = contender::connect(&job).await?;
    reply(&"ready")?;
    let (mut peer, mut held) = (None, Vec::new());
    while let Some(line) = input.next_line().await? {
        match serde_json::from_str(&line)? {
            Instruction::Listen => {
                let (listener, port) = Peer::listen().await?;
                reply(&port)?;
                peer = Some(Peer::accept(listener).await?);
            }
            Instruction::Connect(port) => {
                peer = Some(Peer::connect(port).await?);
                reply(&"connected")?;
            }
            Instruction::Hold => {
                held = handovers::hold(&mut group.callers, &job).await?;
                reply(&"held")?;
            }
            Instruction::Run { begin, end } => {
                let window = Window { begin, end };
                let log = match peer {
                    Some(peer) => handovers::run(group, &job, window, peer, held).await,
                    None => workload::run(group, &job, window).await,
                };
                return reply(&log);
            }
        }
    }
    Ok(())
}

pub(crate) fn reply(message: &impl Serialize) -> anyhow::Result<()> {
    let mut output = std::io::stdout().lock();
    serde_json::to_writer(&mut output, message)?;
    writeln!(output)?;
    Ok(output.flush()?)
}
