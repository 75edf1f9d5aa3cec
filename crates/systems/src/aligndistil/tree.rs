//! The oracle: a tree of three tokens out of four with known token rewards, where models can be exact.
//!
//! Every context has a distribution of its own. The best policy for `E Σ r - β KL(π ‖ π_ref)` follows from values, from the leaves up; it is
//! what DPO finds from enough pairs.

use base::{Purpose, Random};
use objectives::{Anchor, Extrapolation};

const DEPTH: usize = 3;
const TOKENS: usize = 4;

/// One number for each token in each context; contexts of a depth are numbered in order.
type Table = Vec<Vec<[f64; TOKENS]>>;

fn table(seed: u64, scale: f64) -> Table {
    let random = Random::new(seed, Purpose::Test);
    let row = |depth: usize, context: usize| {
        let random = random.step(depth as u32).prompt(context as u32);
        [0, 1, 2, 3].map(|token| scale * (2.0 * random.at(token).uniform() - 1.0))
    };
    (0..DEPTH).map(|depth| (0..TOKENS.pow(depth as u32)).map(|context| row(depth, context)).collect()).collect()
}

fn map(of: impl Fn(usize, usize) -> [f64; TOKENS]) -> Table {
    (0..DEPTH).map(|depth| (0..TOKENS.pow(depth as u32)).map(|context| of(depth, context)).collect()).collect()
}

fn log_softmax(row: [f64; TOKENS]) -> [f64; TOKENS] {
    let total = row.iter().map(|z| z.exp()).sum::<f64>().ln();
    row.map(|z| z - total)
}

/// The log-probabilities of the policy that is best for rewards less β times the divergence from a reference.
fn best(rewards: &Table, reference: &Table, beta: f64) -> Table {
    let mut values = vec![0.0; TOKENS.pow(DEPTH as u32)];
    let mut policy = Table::new();
    for depth in (0..DEPTH).rev() {
        let q = |context: usize| -> [f64; TOKENS] {
            std::array::from_fn(|token| rewards[depth][context][token] + values[context * TOKENS + token])
        };
        let tilted = |context: usize| -> [f64; TOKENS] {
            let q = q(context);
            std::array::from_fn(|token| reference[depth][context][token] + q[token] / beta)
        };
        let contexts = TOKENS.pow(depth as u32);
        policy.push((0..contexts).map(|context| log_softmax(tilted(context))).collect());
        values = (0..contexts).map(|c| beta * tilted(c).iter().map(|z| z.exp()).sum::<f64>().ln()).collect();
    }
    policy.reverse();
    policy
}

/// `E Σ_t [r - β log(π/π_ref)]` of a policy.
fn worth(policy: &Table, rewards: &Table, reference: &Table, beta: f64) -> f64 {
    let mut values = vec![0.0; TOKENS.pow(DEPTH as u32)];
    for depth in (0..DEPTH).rev() {
        let value = |context: usize| -> f64 {
            let own = |token: usize| {
                let log_p = policy[depth][context][token];
                let paid = rewards[depth][context][token] - beta * (log_p - reference[depth][context][token]);
                log_p.exp() * (paid + values[context * TOKENS + token])
            };
            (0..TOKENS).map(own).sum()
        };
        values = (0..TOKENS.pow(depth as u32)).map(value).collect();
    }
    values[0]
}

/// The teacher of AlignDistil in every context.
fn teacher(extrapolation: Extrapolation, first: &Table, second: &Table) -> Table {
    map(|depth, context| {
        let rows = [first, second].map(|table| table[depth][context].map(|z| z as f32));
        let found = extrapolation.teacher(&[&rows[0][..], &rows[1][..]], 1.0);
        found.map_or([f64::NAN; TOKENS], |found| std::array::from_fn(|token| found.target.log_probs()[token]))
    })
}

struct Tree {
    rewards: Table,
    reference: Table,
    dpo: Table,
    reverse: Table,
}

const BETA: f64 = 0.1;

fn tree(seed: u64) -> Tree {
    let rewards = table(seed, 0.2);
    let reference = map(|depth, context| log_softmax(table(seed + 100, 1.0)[depth][context]));
    let opposite = map(|depth, context| rewards[depth][context].map(|r| -r));
    let (dpo, reverse) = (best(&rewards, &reference, BETA), best(&opposite, &reference, BETA));
    Tree { rewards, reference, dpo, reverse }
}

fn fixed(anchor: Anchor, weight: f64) -> Extrapolation {
    Extrapolation { anchor, weight, adaptive: false, beta: BETA }
}

/// The DPO reward of an answer is its reward up to a constant: what the values of contexts add to the tokens cancels along a path.
#[test]
fn dpo_rewards_add_up_to_the_reward() {
    let tree = tree(1);
    let mut constants = Vec::new();
    for answer in 0..TOKENS.pow(DEPTH as u32) {
        let (mut context, mut implied, mut reward) = (0, 0.0, 0.0);
        for depth in 0..DEPTH {
            let token = answer / TOKENS.pow((DEPTH - 1 - depth) as u32) % TOKENS;
            implied += BETA * (tree.dpo[depth][context][token] - tree.reference[depth][context][token]);
            reward += tree.rewards[depth][context][token];
            context = context * TOKENS + token;
        }
        constants.push(implied - reward);
    }
    assert!(constants.iter().all(|constant| (constant - constants[0]).abs() < 1e-12));
}

/// In the last context of a path the teacher of theorem 1 is the best policy. Before it, it leaves out what the partition function
/// of later contexts is worth: near the best, and not it.
#[test]
fn theorem_1_is_exact_where_nothing_follows_and_close_before() {
    for seed in 0..10 {
        let tree = tree(seed);
        for weight in [0.5, 1.0, 2.0] {
            let beta_2 = BETA / weight;
            // Token rewards of the DPO model, of which RLHF is to make the most.
            let implied = map(|depth, context| {
                std::array::from_fn(|t| BETA * (tree.dpo[depth][context][t] - tree.reference[depth][context][t]))
            });
            let optimum = best(&implied, &tree.reference, beta_2);
            let found = teacher(fixed(Anchor::Second, weight), &tree.dpo, &tree.reference);
            let far = |depth: usize| {
                let rows = found[depth].iter().flatten().zip(optimum[depth].iter().flatten());
                rows.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
            };
            assert!(far(DEPTH - 1) < 1e-5, "{}", far(DEPTH - 1));
            let of = |policy: &Table| worth(policy, &implied, &tree.reference, beta_2);
            assert!(of(&found) <= of(&optimum) + 1e-9);
            if weight == 1.0 {
                assert!((0..DEPTH).all(|depth| far(depth) < 1e-5), "the partition function is 1");
            } else {
                assert!(far(0) > 1e-3, "it is not the same everywhere");
                // Half of the way from the DPO model to the optimum, at the least.
                assert!(of(&found) - of(&tree.dpo) > 0.5 * (of(&optimum) - of(&tree.dpo)), "seed {seed}, w {weight}");
            }
        }
    }
}

/// Exact models: extrapolation from the DPO model, away from the reverse one, earns more than DPO, the more the further it goes.
#[test]
fn extrapolated_teachers_earn_more() {
    for seed in 0..10 {
        let tree = tree(seed);
        let earned = |policy: &Table| worth(policy, &tree.rewards, &tree.reference, 0.0);
        let contrast = |weight| earned(&teacher(fixed(Anchor::First, weight), &tree.dpo, &tree.reverse));
        let (dpo, reference) = (earned(&tree.dpo), earned(&tree.reference));
        assert!(reference < dpo && dpo < contrast(0.5) && contrast(0.5) < contrast(2.0), "seed {seed}");
        let adaptive = Extrapolation { weight: 2.0, ..Extrapolation::default() };
        assert!(earned(&teacher(adaptive, &tree.dpo, &tree.reverse)) > dpo);
    }
}
