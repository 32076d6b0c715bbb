//! The process that is measured: this program in another role. It reads its orders from its input
//! and ends with it.

use std::io::Write;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader, Lines, Stdin};

use crate::clock::{Moment, now};
use crate::contender::{self, Job};
use crate::drive::drive;
use crate::record::{Log, Record};
use crate::study::Study;
use crate::summary::Window;

/// The first line from the parent process.
#[derive(Serialize, Deserialize)]
pub(crate) enum Task {
    /// A part in a scene.
    Play(Job),
    Study(Study),
}

/// The lines that follow to a process that plays.
#[derive(Serialize, Deserialize)]
pub(crate) enum Order {
    /// To all callers. Answered with the log.
    Drive { begin: Moment, end: Moment },
    /// To the first caller. Answered when it has the lock.
    Acquire,
    /// To the first caller. Answered with the log of this one acquisition.
    Release,
}

pub(crate) async fn main() -> anyhow::Result<()> {
    let mut input = BufReader::new(tokio::io::stdin()).lines();
    let line = input.next_line().await?.context("there is no job")?;
    let job = match serde_json::from_str(&line)? {
        Task::Play(job) => job,
        Task::Study(study) => return study.carry_out().await,
    };
    let team = contender::team(&job).await?;
    answer(&"ready")?;
    match order(&mut input).await? {
        Some(Order::Drive { begin, end }) => {
            let log = drive(team, &job, Window { begin, end }).await;
            answer(&log)
        }
        Some(Order::Acquire) => one_by_one(team, &job, &mut input).await,
        Some(Order::Release) | None => Ok(()),
    }
}

/// An acquisition has already been ordered.
async fn one_by_one(
    team: contender::Team,
    job: &Job,
    input: &mut Lines<BufReader<Stdin>>,
) -> anyhow::Result<()> {
    let mut callers = team.callers;
    let caller = callers.first_mut().context("there is no caller")?;
    loop {
        let mut log = Log::default();
        let asked = now();
        let fencing_token = loop {
            match caller.acquire().await {
                Ok(token) => break token,
                Err(error) => log.add_error(&error, &job.names[0]),
            }
        };
        let granted = now();
        answer(&"granted")?;
        let Some(Order::Release) = order(input).await? else { break };
        let releasing = now();
        if let Err(error) = caller.release().await {
            log.add_error(&error, &job.names[0]);
        }
        let (process, released) = (job.process, now());
        log.records.push(Record { process, caller: 0, asked, granted, releasing, released, fencing_token });
        answer(&log)?;
        let Some(Order::Acquire) = order(input).await? else { break };
    }
    // As at the end of `drive`: a session may end with its last caller.
    drop(callers);
    team.end.await;
    Ok(())
}

async fn order(input: &mut Lines<BufReader<Stdin>>) -> anyhow::Result<Option<Order>> {
    let line = input.next_line().await?;
    Ok(line.map(|line| serde_json::from_str::<Order>(&line)).transpose()?)
}

pub(crate) fn answer(answer: &impl Serialize) -> anyhow::Result<()> {
    let mut output = std::io::stdout().lock();
    serde_json::to_writer(&mut output, answer)?;
    writeln!(output)?;
    Ok(output.flush()?)
}
