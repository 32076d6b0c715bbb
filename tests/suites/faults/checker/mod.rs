//! Says what is wrong with a history. It knows nothing of databases, and asks for nothing that a lock does not promise.

use std::collections::{BTreeMap, BTreeSet};

use super::history::{Deed, History, Hold, Kept, Moment, Outcome};

mod linearizable;
mod tests;

lock_tests::cases! {
    in modules: tests
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// Whether leases exclude one another also without the guard, by what their holders know. Not promised when the
    /// database's clock is set forward.
    pub(crate) leases_exclude: bool,
}

/// What must not be.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(dead_code)] // They are printed.
pub(crate) enum Violation {
    /// Two grants have one fencing token.
    TokenTwice { name: String, token: i64 },
    /// A grant that was asked for after the other had been answered has the smaller token.
    TokensWentBack { earlier: Hold, later: Hold },
    /// The second was granted while the first still had the lock, by all that its holder could know.
    HeldByTwo { first: Hold, second: Hold },
    /// A loss was taken back.
    HeldAfterLoss { hold: Hold },
    /// A transaction that was committed is not there.
    NotKept { deed: Deed },
    /// A transaction that was refused is there.
    KeptAllTheSame { deed: Deed },
    /// Something is there that nobody has written, or not so.
    FromNobody { kept: Kept },
    /// Two transactions read the same value and wrote: what the first of them wrote was overwritten unseen.
    LostUpdate { first: Kept, second: Kept, deeds: Vec<Deed> },
    /// Something was read that never stood there.
    ReadOfNothing { register: String, value: i64 },
    /// The register does not end with what was written last.
    WrongEnd { register: String, expected: i64, found: i64 },
    /// A transaction of an earlier grant counts after one of a later grant.
    LateCommit { earlier: Deed, later: Deed },
    /// A transaction that had ended before the other began counts after it.
    OutOfTime { earlier: Deed, later: Deed },
    /// What stateright's tester says to the same history.
    NotLinearizable { register: String },
}

pub(crate) fn check(history: &History, rules: Rules) -> Vec<Violation> {
    let mut violations = Vec::new();
    let names: BTreeSet<&String> = history.holds.iter().map(|hold| &hold.name).collect();
    for name in names {
        let holds: Vec<&Hold> = history.holds.iter().filter(|hold| hold.name == *name).collect();
        if holds[0].token.is_some() {
            check_tokens(&holds, &mut violations);
            if rules.leases_exclude {
                check_leases(&holds, &mut violations);
            }
        } else {
            check_row_locks(&holds, &mut violations);
        }
        let held_again = holds.iter().filter(|hold| hold.held_again);
        violations.extend(held_again.map(|hold| Violation::HeldAfterLoss { hold: (*hold).clone() }));
    }
    for (register, end) in &history.registers {
        let order = check_register(history, register, *end, &mut violations);
        if !linearizable::is_linearizable(&order) {
            violations.push(Violation::NotLinearizable { register: register.clone() });
        }
    }
    violations
}

fn check_tokens(holds: &[&Hold], violations: &mut Vec<Violation>) {
    let mut by_token = holds.to_vec();
    by_token.sort_by_key(|hold| hold.token);
    for pair in by_token.windows(2) {
        if let (true, Some(token)) = (pair[0].token == pair[1].token, pair[0].token) {
            violations.push(Violation::TokenTwice { name: pair[0].name.clone(), token });
        }
    }
    // Of all that have a larger token, the one that was answered first must not be before this one was asked for.
    let mut earliest: Option<&Hold> = None;
    for hold in by_token.iter().rev() {
        if let Some(earlier) = earliest.filter(|earlier| earlier.granted < hold.asked) {
            violations.push(Violation::TokensWentBack { earlier: earlier.clone(), later: (*hold).clone() });
        }
        if earliest.is_none_or(|earliest| hold.granted < earliest.granted) {
            earliest = Some(hold);
        }
    }
}

/// The database grants in the order of tokens. So when the answer to a later grant had come, the earlier lease was over,
/// and its holder must not have been told otherwise after that.
fn check_leases(holds: &[&Hold], violations: &mut Vec<Violation>) {
    let mut by_token = holds.to_vec();
    by_token.sort_by_key(|hold| hold.token);
    let mut earliest: Option<&Hold> = None;
    for hold in by_token.iter().rev() {
        if let Some(second) = earliest.filter(|second| hold.held.is_some_and(|held| second.granted < held)) {
            violations.push(Violation::HeldByTwo { first: (*hold).clone(), second: second.clone() });
        }
        if earliest.is_none_or(|earliest| hold.granted < earliest.granted) {
            earliest = Some(hold);
        }
    }
}

/// Row locks have no order of their own, but a transaction that is alive has had its lock since it got it.
fn check_row_locks(holds: &[&Hold], violations: &mut Vec<Violation>) {
    let mut certain: Vec<&Hold> =
        holds.iter().copied().filter(|hold| hold.held.is_some_and(|held| held > hold.granted)).collect();
    certain.sort_by_key(|hold| hold.granted);
    let mut longest: Option<&Hold> = None;
    for second in certain {
        if let Some(first) = longest.filter(|first| first.held > Some(second.granted)) {
            violations.push(Violation::HeldByTwo { first: first.clone(), second: second.clone() });
        }
        if longest.is_none_or(|longest| second.held > longest.held) {
            longest = Some(second);
        }
    }
}

/// Every value was written once, along with the one that was read before, so what was kept must be one chain, and that
/// is the one order in which it can have happened. Answers it, with the reads in between.
fn check_register<'a>(
    history: &'a History,
    register: &str,
    end: i64,
    violations: &mut Vec<Violation>,
) -> Vec<&'a Deed> {
    let deeds: Vec<&Deed> = history.deeds.iter().filter(|deed| deed.register == register).collect();
    let kept: Vec<&Kept> = history.kept.iter().filter(|kept| kept.register == register).collect();
    let writes: BTreeMap<i64, &Deed> =
        deeds.iter().filter_map(|deed| deed.value.map(|value| (value, *deed))).collect();
    let kept_values: BTreeSet<i64> = kept.iter().map(|kept| kept.value).collect();
    for deed in &deeds {
        let Some(value) = deed.value else { continue };
        match (deed.outcome, kept_values.contains(&value)) {
            (Outcome::Committed, false) => violations.push(Violation::NotKept { deed: (*deed).clone() }),
            (Outcome::Refused, true) => violations.push(Violation::KeptAllTheSame { deed: (*deed).clone() }),
            _ => {}
        }
    }

    let mut is_chain = true;
    let mut next: BTreeMap<i64, &Kept> = BTreeMap::new();
    for kept in kept {
        if writes.get(&kept.value).is_none_or(|deed| deed.previous != kept.previous) {
            violations.push(Violation::FromNobody { kept: kept.clone() });
        }
        if let Some(first) = next.insert(kept.previous, kept) {
            let both = [first.value, kept.value];
            let deeds =
                both.iter().filter_map(|value| writes.get(value)).map(|deed| (*deed).clone()).collect();
            violations.push(Violation::LostUpdate { first: first.clone(), second: kept.clone(), deeds });
            is_chain = false;
        }
    }
    let mut reads: BTreeMap<i64, Vec<&Deed>> = BTreeMap::new();
    for read in deeds.iter().filter(|deed| deed.value.is_none() && deed.outcome == Outcome::Committed) {
        reads.entry(read.previous).or_default().push(read);
    }

    let mut order = Vec::new();
    let mut value = 0;
    loop {
        let mut read = reads.remove(&value).unwrap_or_default();
        read.sort_by_key(|deed| (deed.token, deed.called));
        order.extend(read);
        let Some(kept) = next.remove(&value) else { break };
        value = kept.value;
        order.extend(writes.get(&value));
    }
    // What comes after a fork is on one of its ways, and nothing is to be learnt from that.
    if is_chain {
        if value != end {
            let register = register.to_owned();
            violations.push(Violation::WrongEnd { register, expected: value, found: end });
        }
        let nowhere = reads.into_keys().chain(next.into_keys());
        violations
            .extend(nowhere.map(|value| Violation::ReadOfNothing { register: register.to_owned(), value }));
    }
    check_order(&order, violations);
    order
}

fn check_order(order: &[&Deed], violations: &mut Vec<Violation>) {
    let (mut latest_call, mut largest_token): (Option<&Deed>, Option<&Deed>) = (None, None);
    for deed in order {
        let ended = deed.returned.unwrap_or(Moment::MAX);
        if let Some(later) = latest_call.filter(|latest| latest.called > ended) {
            violations.push(Violation::OutOfTime { earlier: (*deed).clone(), later: later.clone() });
        }
        if let Some(later) = largest_token.filter(|largest| largest.token > deed.token) {
            violations.push(Violation::LateCommit { earlier: (*deed).clone(), later: later.clone() });
        }
        if latest_call.is_none_or(|latest| deed.called > latest.called) {
            latest_call = Some(deed);
        }
        if largest_token.is_none_or(|largest| deed.token > largest.token) {
            largest_token = Some(deed);
        }
    }
}
