//! Histories with one fault each, of every kind, at random places in random histories: none may be missed, and nothing
//! may be found where nothing is wrong.

use lock_tests::Random;

use super::*;

lock_tests::cases! {
    without a database:
    nothing_is_found_where_nothing_is_wrong,
    a_token_that_is_granted_twice,
    tokens_that_decrease,
    a_lease_that_two_have,
    a_late_request_may_come_to_a_lease_that_was_lost,
    a_row_lock_that_two_have,
    a_loss_that_is_taken_back,
    a_commit_that_was_not_kept,
    a_refused_transaction_that_was_kept,
    a_row_that_no_client_wrote,
    a_lost_update,
    a_read_of_what_was_never_there,
    a_register_that_ends_otherwise,
    a_commit_after_the_next_grants,
    a_read_of_what_was_overwritten_long_ago,
    the_two_checkers_agree,
    a_long_history_is_checked_quickly,
}

const STRICT: Rules = Rules { leases_exclude: true };
const SEEDS: u64 = 60;

/// A history as it should be: holders come one after the other, with and without a pause in between, some of them lose
/// their lease, and some transactions are refused or of unknown outcome.
fn sound(random: &mut Random, name: &str, is_lease: bool) -> History {
    let (mut history, mut time, mut value) = (History::default(), 1000, 0);
    for number in 1..=40 {
        let client = random.next() % 5;
        let token = is_lease.then_some(1_000_000 + number);
        let asked = time - random.next() % 900;
        time += 1 + random.next() % 100;
        let granted = time;
        for _ in 0..random.below(4) {
            let called = time + 1;
            time += 10 + random.next() % 50;
            let outcome = random.pick(&[
                Outcome::Committed,
                Outcome::Committed,
                Outcome::Committed,
                Outcome::Refused,
                Outcome::Unknown,
            ]);
            let writes = random.below(3) > 0;
            let new = i64::try_from(time).unwrap();
            let is_kept =
                outcome == Outcome::Committed || (outcome == Outcome::Unknown && random.below(2) == 0);
            history.deeds.push(Deed {
                client: 100 * u64::try_from(number).unwrap() + client,
                register: name.into(),
                token,
                called,
                returned: Some(time).filter(|_| outcome != Outcome::Unknown),
                previous: value,
                value: writes.then_some(new),
                outcome,
            });
            if writes && is_kept {
                history.kept.push(Kept { register: name.into(), previous: value, value: new });
                value = new;
            }
        }
        let held = time;
        time += 1 + random.next() % 10;
        let told = Some(time + 500).filter(|_| random.below(5) == 0);
        history.holds.push(Hold {
            client,
            name: name.into(),
            token,
            asked,
            granted,
            held: Some(held).filter(|_| random.below(5) > 0),
            told,
            held_again: false,
        });
    }
    history.registers.insert(name.into(), value);
    history
}

/// Puts a fault into many histories. It answers `false` where it has no place.
fn finds(
    is_lease: bool,
    is_it: impl Fn(&Violation) -> bool,
    mut spoil: impl FnMut(&mut History, &mut Random) -> bool,
) {
    let mut spoilt = 0;
    for seed in 0..SEEDS {
        let mut random = Random(seed);
        let mut history = sound(&mut random, "a", is_lease);
        if spoil(&mut history, &mut random) {
            spoilt += 1;
            let violations = check(&history, STRICT);
            assert!(violations.iter().any(&is_it), "seed {seed}: {violations:#?}");
        }
    }
    assert!(spoilt > SEEDS / 4, "only {spoilt} histories had a place for it");
}

fn is_not_linearizable(violation: &Violation) -> bool {
    matches!(violation, Violation::NotLinearizable { .. })
}

/// Which of the deeds that wrote and are kept, by their places.
fn kept_writes(history: &History) -> Vec<usize> {
    let is_kept = |deed: &Deed| history.kept.iter().any(|kept| Some(kept.value) == deed.value);
    (0..history.deeds.len()).filter(|index| is_kept(&history.deeds[*index])).collect()
}

fn nothing_is_found_where_nothing_is_wrong() {
    for seed in 0..SEEDS {
        for is_lease in [true, false] {
            let mut random = Random(seed);
            let mut history = sound(&mut random, "a", is_lease);
            let other = sound(&mut random, "b", true);
            history.holds.extend(other.holds);
            history.deeds.extend(other.deeds);
            history.kept.extend(other.kept);
            history.registers.extend(other.registers);
            assert_eq!(check(&history, STRICT), [], "seed {seed}");
        }
    }
}

fn a_token_that_is_granted_twice() {
    finds(
        true,
        |violation| matches!(violation, Violation::TokenTwice { .. }),
        |history, random| {
            let index = random.below(history.holds.len() - 1);
            history.holds[index + 1].token = history.holds[index].token;
            true
        },
    );
}

fn tokens_that_decrease() {
    finds(
        true,
        |violation| matches!(violation, Violation::TokensWentBack { .. }),
        |history, random| {
            let index = random.below(history.holds.len() - 10);
            let later = &mut history.holds[index + 9];
            later.token = Some(1);
            later.asked = later.granted - 1;
            true
        },
    );
}

fn a_lease_that_two_have() {
    finds(
        true,
        |violation| matches!(violation, Violation::HeldByTwo { .. }),
        |history, random| {
            let index = random.below(history.holds.len() - 1);
            history.holds[index].held = Some(history.holds[index + 1].granted + 1);
            true
        },
    );
}

fn a_late_request_may_come_to_a_lease_that_was_lost() {
    let mut random = Random(1);
    let mut history = sound(&mut random, "a", true);
    history.holds[3].told = Some(history.holds[9].granted);
    assert_eq!(check(&history, STRICT), []);
}

fn a_row_lock_that_two_have() {
    finds(
        false,
        |violation| matches!(violation, Violation::HeldByTwo { .. }),
        |history, random| {
            let index = random.below(history.holds.len() - 1);
            let second = &history.holds[index + 1];
            let granted = second.granted;
            let has_evidence = second.held.is_some_and(|held| held > granted);
            history.holds[index].held = Some(granted + 1);
            has_evidence
        },
    );
}

fn a_loss_that_is_taken_back() {
    finds(
        true,
        |violation| matches!(violation, Violation::HeldAfterLoss { .. }),
        |history, random| {
            let index = random.below(history.holds.len());
            history.holds[index].held_again = true;
            true
        },
    );
}

fn a_commit_that_was_not_kept() {
    finds(
        true,
        |violation| matches!(violation, Violation::NotKept { .. }),
        |history, random| {
            let writes = kept_writes(history);
            let deed = &mut history.deeds[writes[random.below(writes.len())]];
            deed.outcome = Outcome::Committed;
            let value = deed.value;
            history.kept.retain(|kept| Some(kept.value) != value);
            true
        },
    );
}

fn a_refused_transaction_that_was_kept() {
    finds(
        true,
        |violation| matches!(violation, Violation::KeptAllTheSame { .. }),
        |history, random| {
            let writes = kept_writes(history);
            history.deeds[writes[random.below(writes.len())]].outcome = Outcome::Refused;
            true
        },
    );
}

fn a_row_that_no_client_wrote() {
    finds(
        true,
        |violation| matches!(violation, Violation::FromNobody { .. }),
        |history, random| {
            let index = random.below(history.kept.len());
            history.kept[index].value += 1;
            true
        },
    );
}

fn a_lost_update() {
    finds(
        true,
        |violation| matches!(violation, Violation::LostUpdate { .. }),
        |history, random| {
            let writes = kept_writes(history);
            let index = random.below(writes.len() - 1);
            let (first, second) = (writes[index], writes[index + 1]);
            let previous = history.deeds[first].previous;
            let value = history.deeds[second].value;
            history.deeds[second].previous = previous;
            history.kept.iter_mut().find(|kept| Some(kept.value) == value).unwrap().previous = previous;
            true
        },
    );
}

fn a_read_of_what_was_never_there() {
    finds(
        true,
        |violation| matches!(violation, Violation::ReadOfNothing { .. }),
        |history, _| {
            let read = history
                .deeds
                .iter_mut()
                .find(|deed| deed.value.is_none() && deed.outcome == Outcome::Committed);
            let Some(read) = read else { return false };
            read.previous = -1;
            true
        },
    );
}

fn a_register_that_ends_otherwise() {
    finds(
        true,
        |violation| matches!(violation, Violation::WrongEnd { .. }),
        |history, _| {
            history.registers.values_mut().for_each(|value| *value += 1);
            true
        },
    );
}

fn a_commit_after_the_next_grants() {
    finds(
        true,
        |violation| matches!(violation, Violation::LateCommit { .. }),
        |history, random| {
            let writes = kept_writes(history);
            let index = random.below(writes.len() - 1);
            let (first, second) = (writes[index], writes[index + 1]);
            let differ = history.deeds[first].token != history.deeds[second].token;
            let token = history.deeds[first].token;
            history.deeds[first].token = history.deeds[second].token;
            history.deeds[second].token = token;
            differ
        },
    );
}

/// Both checkers see it: ours, which goes along the chain, and stateright's, which knows of no chain.
fn a_read_of_what_was_overwritten_long_ago() {
    let mut spoil = |history: &mut History, random: &mut Random| {
        let writes = kept_writes(history);
        let read = history.deeds.iter().position(|deed| {
            deed.value.is_none() && deed.outcome == Outcome::Committed && deed.called > 2000
        });
        let Some(read) = read else { return false };
        let earlier: Vec<usize> = writes.into_iter().filter(|index| *index < read).collect();
        // Everything before the last write before it is old.
        let known = earlier.iter().filter(|index| history.deeds[**index].returned.is_some()).count();
        if known < 3 || earlier.len() < 3 || history.deeds[earlier[earlier.len() - 1]].returned.is_none() {
            return false;
        }
        let old = earlier[random.below(earlier.len() - 1)];
        history.deeds[read].previous = history.deeds[old].value.unwrap();
        true
    };
    finds(false, |violation| matches!(violation, Violation::OutOfTime { .. }), &mut spoil);
    finds(false, is_not_linearizable, &mut spoil);
}

/// Transactions that overlap, with their effects at a random moment in between, and then two of them exchanged or not.
fn the_two_checkers_agree() {
    let (mut right, mut wrong) = (0, 0);
    for seed in 0..1000 {
        let mut random = Random(seed);
        let mut moments: Vec<u64> = (0..12).map(|_| random.next() % 1000).collect();
        moments.sort_unstable();
        moments.dedup();
        if random.below(2) == 0 {
            let (one, other) = (random.below(moments.len()), random.below(moments.len()));
            moments.swap(one, other);
        }
        let mut history = History::default();
        let mut value = 0;
        for (index, moment) in moments.iter().enumerate() {
            let new = i64::try_from(index + 1).unwrap();
            let is_write = random.below(3) > 0;
            history.deeds.push(Deed {
                client: index as u64,
                register: "a".into(),
                token: None,
                called: 1000 + moment - random.next() % 100,
                returned: Some(1000 + moment + random.next() % 100),
                previous: value,
                value: is_write.then_some(new),
                outcome: Outcome::Committed,
            });
            if is_write {
                history.kept.push(Kept { register: "a".into(), previous: value, value: new });
                value = new;
            }
        }
        history.registers.insert("a".into(), value);
        let violations = check(&history, STRICT);
        let by_chain = violations.iter().any(|violation| matches!(violation, Violation::OutOfTime { .. }));
        let by_search = violations.iter().any(is_not_linearizable);
        assert_eq!(by_chain, by_search, "seed {seed}: {violations:#?}");
        *(if by_search { &mut wrong } else { &mut right }) += 1;
    }
    assert!(right > 150 && wrong > 150, "{right} right, {wrong} wrong");
}

/// What a long run hands to it.
fn a_long_history_is_checked_quickly() {
    let mut random = Random(1);
    let (mut history, mut value) = (History::default(), 0);
    for number in 1..=5_000_i64 {
        let called = u64::try_from(number).unwrap() * 100;
        history.deeds.push(Deed {
            client: random.next() % 6,
            register: "a".into(),
            token: Some(number),
            called,
            returned: Some(called + 90),
            previous: value,
            value: Some(number),
            outcome: Outcome::Committed,
        });
        history.kept.push(Kept { register: "a".into(), previous: value, value: number });
        value = number;
    }
    history.registers.insert("a".into(), value);
    assert_eq!(check(&history, STRICT), []);
}
