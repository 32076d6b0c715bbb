//! The same question again, put to a checker that others maintain: is there an order of all transactions on a register
//! in which each read what the one before had written, and which agrees with the clock?
//!
//! Its search copies what is left of the history at each step and is exponential at worst. Both are bounded here: the
//! history is cut into windows at moments at which nothing was under way, and every value is written once, so few
//! transactions are possible at each step.

use stateright::semantics::{ConsistencyTester, LinearizabilityTester, SequentialSpec};

use super::super::history::{Deed, Moment, Outcome};

/// Cut as soon as possible after so many.
const WINDOW: usize = 60;
/// What is longer is not searched: it has no pause in which to cut it, and the search would take too long.
const LONGEST: usize = 300;

/// The register, as a thing that does one transaction at a time.
#[derive(Debug, Clone)]
struct Register(i64);

#[derive(Debug, Clone, PartialEq)]
struct Transaction {
    previous: i64,
    value: Option<i64>,
}

/// Whether it was carried out.
type Done = bool;

impl SequentialSpec for Register {
    type Op = Transaction;
    type Ret = Done;

    fn invoke(&mut self, transaction: &Transaction) -> Done {
        let done = transaction.previous == self.0;
        if let (true, Some(value)) = (done, transaction.value) {
            self.0 = value;
        }
        done
    }
}

/// Of what is known to have happened, in any order.
pub(super) fn is_linearizable(deeds: &[&Deed]) -> bool {
    let mut remaining: Vec<(Moment, Moment, &Deed)> =
        deeds.iter().map(|deed| (deed.called, end_of(deed, deeds), *deed)).collect();
    remaining.sort_by_key(|(called, ..)| *called);
    let (mut first, mut value) = (0, 0);
    let mut running_until = 0;
    for index in 0..=remaining.len() {
        let at_end = index == remaining.len();
        let is_quiet = at_end || remaining[index].0 > running_until;
        if is_quiet && (at_end || index - first >= WINDOW) {
            let window = &remaining[first..index];
            if window.len() > LONGEST {
                return true;
            }
            match order_of(window, value) {
                Some(last) => value = last,
                None => return false,
            }
            first = index;
        }
        if !at_end {
            running_until = running_until.max(remaining[index].1);
        }
    }
    true
}

/// One that nobody heard the end of had happened when somebody had read what it wrote.
fn end_of(deed: &Deed, deeds: &[&Deed]) -> Moment {
    let seen = || {
        let readers = deeds
            .iter()
            .filter(|reader| Some(reader.previous) == deed.value && reader.outcome == Outcome::Committed);
        readers.filter_map(|reader| reader.returned).min()
    };
    deed.returned.or_else(seen).unwrap_or(Moment::MAX)
}

/// The last value, if there is an order.
fn order_of(window: &[(Moment, Moment, &Deed)], initial: i64) -> Option<i64> {
    let mut tester = LinearizabilityTester::new(Register(initial));
    let mut moments: Vec<(Moment, bool, usize)> = Vec::new();
    for (index, (called, returned, _)) in window.iter().enumerate() {
        moments.push((*called, false, index));
        moments.push((*returned, true, index));
    }
    moments.sort_unstable();
    for (_, is_return, index) in moments {
        let deed = window[index].2;
        // A client that does not know what became of its transaction goes on, which a thread of the tester can't.
        let thread = match deed.returned {
            Some(_) => (deed.client, 0),
            None => (deed.client, index + 1),
        };
        let noted = if is_return {
            tester.on_return(thread, true)
        } else {
            tester.on_invoke(thread, Transaction { previous: deed.previous, value: deed.value })
        };
        noted.expect("every call has one return, after it");
    }
    let order = tester.serialized_history()?;
    Some(order.iter().fold(initial, |value, (transaction, _)| transaction.value.unwrap_or(value)))
}
