//! A world small enough to be solved: a tree of tokens with a return at each leaf.
//!
//! Soft values follow from the leaves upwards by the soft Bellman equations, and the objective of any guided policy is a sum over the tree.
//! What is learned is counted: the returns of walks of the reference, node by node.

use base::{Purpose, Random};
use rollout::guidance::returns::{soft, tilted};

/// A law: the logarithms of probabilities, and the returns that have them.
type Law = Vec<(f64, f64)>;

/// What comes after some tokens.
enum Node {
    /// The reference's log-probability of each next token, and the node that it leads to.
    Inner { log_probs: Vec<f64>, children: Vec<usize> },
    /// The end, and the return. It is sure: a return that is drawn behind the last token would be nobody's to choose, and soft values
    /// would be too high.
    Leaf(f64),
}

/// A tree; its root is node 0.
pub struct Tree {
    nodes: Vec<Node>,
}

/// How often each return came where a node was passed.
pub struct Counts(Vec<Vec<(f64, f64)>>);

/// What the nodes are worth, and the price of divergence that the guide of a walk goes by.
pub type Guide<'a> = (&'a [f64], f64);

impl Tree {
    /// A tree of this depth with the same number of tokens everywhere: logits of the reference are normal with deviation 0.7, and the return
    /// at each leaf is 0 or 1, drawn once.
    pub fn random(depth: u32, tokens: usize, seed: u64) -> Self {
        let random = Random::new(seed, Purpose::Task).step(2);
        let mut tree = Self { nodes: Vec::new() };
        tree.grow(depth, tokens, random);
        tree
    }

    fn grow(&mut self, depth: u32, tokens: usize, random: Random) -> usize {
        let here = self.nodes.len();
        let draws = random.prompt(here as u32);
        if depth == 0 {
            self.nodes.push(Node::Leaf(draws.at(0).below(2) as f64));
            return here;
        }
        self.nodes.push(Node::Leaf(0.0));
        let logits: Vec<f64> = (0..tokens).map(|token| 0.7 * draws.normal(token as u32)).collect();
        let (log_probs, _) = tilted(&logits, &vec![0.0; tokens], 1.0);
        let children = (0..tokens).map(|_| self.grow(depth - 1, tokens, random)).collect();
        self.nodes[here] = Node::Inner { log_probs, children };
        here
    }

    /// A sure 0.6, or a token that decides between 1 and 0. The reference decides by chance everywhere, so that its mean return speaks for
    /// the sure thing, and whoever can choose the token goes the other way.
    pub fn trap() -> Self {
        let even = vec![0.5f64.ln(); 2];
        let inner = |children: [usize; 2]| Node::Inner { log_probs: even.clone(), children: children.into() };
        Self { nodes: vec![inner([1, 2]), inner([3, 4]), Node::Leaf(0.6), Node::Leaf(1.0), Node::Leaf(0.0)] }
    }

    /// What each node is worth at a price `eta` to whoever goes on from it as well as possible: the soft Bellman equations.
    pub fn soft_values(&self, eta: f64) -> Vec<f64> {
        let mut values = vec![0.0; self.nodes.len()];
        // Children come after their parents.
        for (here, node) in self.nodes.iter().enumerate().rev() {
            values[here] = match node {
                Node::Leaf(value) => *value,
                Node::Inner { log_probs, children } => {
                    let worth: Vec<f64> = children.iter().map(|&child| values[child]).collect();
                    tilted(log_probs, &worth, eta).1
                }
            };
        }
        values
    }

    /// `E[return] - η KL(π ‖ π_ref)` of the policy that is guided by these worths.
    pub fn objective(&self, (worth, eta): Guide<'_>) -> f64 {
        let mut values = vec![0.0; self.nodes.len()];
        for (here, node) in self.nodes.iter().enumerate().rev() {
            values[here] = match node {
                Node::Leaf(value) => *value,
                Node::Inner { log_probs, children } => {
                    let policy = self.policy(here, (worth, eta));
                    let terms = policy.iter().zip(log_probs).zip(children);
                    terms
                        .map(|((log_prob, own), &child)| log_prob.exp() * (values[child] - eta * (log_prob - own)))
                        .sum()
                }
            };
        }
        values[0]
    }

    /// The log-probabilities of the guided policy at an inner node; none at a leaf.
    fn policy(&self, node: usize, (worth, eta): Guide<'_>) -> Vec<f64> {
        match &self.nodes[node] {
            Node::Leaf(_) => Vec::new(),
            Node::Inner { log_probs, children } => {
                tilted(log_probs, &children.iter().map(|&child| worth[child]).collect::<Vec<f64>>(), eta).0
            }
        }
    }

    /// A walk from the root, the first `guided` tokens by the guide and all others by the reference: the nodes after each token, and the
    /// return.
    fn walk(&self, guided: usize, guide: Option<Guide<'_>>, random: Random) -> (Vec<usize>, f64) {
        let (mut here, mut path) = (0, Vec::new());
        loop {
            let draw = random.at(path.len() as u32).uniform();
            match &self.nodes[here] {
                Node::Leaf(value) => return (path, *value),
                Node::Inner { log_probs, children } => {
                    let policy = match guide.filter(|_| path.len() < guided) {
                        Some(guide) => self.policy(here, guide),
                        None => log_probs.clone(),
                    };
                    here = children[drawn(policy.into_iter(), draw)];
                    path.push(here);
                }
            }
        }
    }

    /// The rounds of the data loop: `walks` walks in each, in the first by the reference alone, later with a beginning of every length by the
    /// guide that the counts so far make at the price `eta`. The switch is at a token drawn for each walk.
    pub fn count(&self, rounds: u32, walks: u32, eta: f64, seed: u64) -> Counts {
        let mut counts = Counts(vec![Vec::new(); self.nodes.len()]);
        for round in 0..rounds {
            let worth = counts.worth(|law| soft(law, eta));
            let guide = (round > 0).then_some((&worth[..], eta));
            let random = Random::new(seed, Purpose::Sampling).step(round);
            for walk in 0..walks {
                let random = random.prompt(walk);
                let guided = if round == 0 { 0 } else { random.at(u32::MAX).below(self.depth()) as usize };
                let (path, value) = self.walk(guided, guide, random);
                counts.note(&path[guided.saturating_sub(1)..], value);
            }
        }
        counts
    }

    /// The most tokens of a walk.
    fn depth(&self) -> u64 {
        let mut depths = vec![0; self.nodes.len()];
        for (here, node) in self.nodes.iter().enumerate() {
            if let Node::Inner { children, .. } = node {
                children.iter().for_each(|&child| depths[child] = depths[here] + 1);
            }
        }
        depths.into_iter().max().unwrap_or(0)
    }
}

impl Counts {
    fn note(&mut self, path: &[usize], value: f64) {
        for &node in path {
            match self.0[node].iter_mut().find(|(known, _)| *known == value) {
                Some((_, times)) => *times += 1.0,
                None => self.0[node].push((value, 1.0)),
            }
        }
    }

    /// What each node is worth by the law that was counted; 0 where nothing was.
    pub fn worth(&self, of: impl Fn(&[(f64, f64)]) -> f64) -> Vec<f64> {
        let worth = |counts: &Vec<(f64, f64)>| match counts.is_empty() {
            true => 0.0,
            false => of(&counts.iter().map(|(value, times)| (times.ln(), *value)).collect::<Law>()),
        };
        self.0.iter().map(worth).collect()
    }
}

/// The outcome that a number in `0..1` falls on.
fn drawn(log_probs: impl Iterator<Item = f64>, draw: f64) -> usize {
    let (mut before, mut last) = (0.0, 0);
    for (outcome, log_prob) in log_probs.enumerate() {
        before += log_prob.exp();
        last = outcome;
        if draw < before {
            break;
        }
    }
    last
}

/// The largest distance between what nodes are said to be worth and what they are, the root left out: nothing leads to it.
pub fn error(found: &[f64], exact: &[f64]) -> f64 {
    found.iter().zip(exact).skip(1).map(|(found, exact)| (found - exact).abs()).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use rollout::guidance::returns::expected;

    use super::*;

    /// The law of the return under the reference, node by node.
    fn laws(tree: &Tree) -> Vec<Law> {
        let mut laws: Vec<Law> = vec![Law::new(); tree.nodes.len()];
        for (here, node) in tree.nodes.iter().enumerate().rev() {
            laws[here] = match node {
                Node::Leaf(value) => vec![(0.0, *value)],
                Node::Inner { log_probs, children } => {
                    let of = |(log_prob, &child): (&f64, &usize)| {
                        laws[child].iter().map(|(own, value)| (own + log_prob, *value)).collect::<Law>()
                    };
                    log_probs.iter().zip(children).flat_map(of).collect()
                }
            };
        }
        laws
    }

    /// The theorem: no Bellman equation has to be solved, the law of the reference's return says it all.
    #[test]
    fn the_law_of_the_return_solves_the_soft_bellman_equations() {
        for tree in [Tree::random(4, 3, 5), Tree::trap()] {
            for eta in [0.02, 0.1, 0.5, 3.0] {
                let values = tree.soft_values(eta);
                for (law, value) in laws(&tree).iter().zip(&values) {
                    assert!((soft(law, eta) - value).abs() < 1e-9);
                }
                assert!((tree.objective((&values, eta)) - values[0]).abs() < 1e-9, "V is what the policy gets");
            }
        }
    }

    #[test]
    fn nothing_is_better_than_the_soft_values() {
        let (tree, eta) = (Tree::random(3, 3, 1), 0.2);
        let values = tree.soft_values(eta);
        let best = tree.objective((&values, eta));
        let means: Vec<f64> = laws(&tree).iter().map(|law| expected(law)).collect();
        assert!(tree.objective((&means, eta)) < best);
        for node in 1..values.len() {
            let mut other = values.clone();
            other[node] += 0.1;
            assert!(tree.objective((&other, eta)) <= best + 1e-12);
        }
    }

    /// A mean return speaks for the sure thing; what can be reached speaks against it.
    #[test]
    fn the_mean_falls_into_the_trap() {
        let (tree, eta) = (Tree::trap(), 0.05);
        let means: Vec<f64> = laws(&tree).iter().map(|law| expected(law)).collect();
        assert!(tree.policy(0, (&means, eta))[1] > 0.8f64.ln(), "the sure thing");
        assert!(tree.policy(0, (&tree.soft_values(eta), eta))[0] > 0.99f64.ln(), "the choice");
    }

    /// Labels before the last guided token belong to another policy; those from there on are the reference's, however the guide walks.
    #[test]
    fn labels_are_those_of_the_reference() {
        let tree = Tree::random(3, 2, 9);
        let exact: Vec<f64> = laws(&tree).iter().map(|law| expected(law)).collect();
        // A guide that wants one leaf of every pair and gets it.
        let worth: Vec<f64> = exact.iter().map(|mean| 20.0 * mean).collect();
        let random = Random::new(3, Purpose::Test);
        let (mut right, mut all) =
            (Counts(vec![Vec::new(); tree.nodes.len()]), Counts(vec![Vec::new(); tree.nodes.len()]));
        for walk in 0..200_000 {
            let random = random.prompt(walk);
            // Up to the whole walk.
            let guided = random.at(u32::MAX).below(4) as usize;
            let (path, value) = tree.walk(guided, Some((&worth, 0.5)), random);
            right.note(&path[guided.saturating_sub(1)..], value);
            all.note(&path, value);
        }
        let off = |counts: &Counts| error(&counts.worth(expected), &exact);
        assert!(off(&right) < 0.02, "{}", off(&right));
        assert!(off(&all) > 0.05, "{}", off(&all));
    }

    #[test]
    fn counts_come_near_what_is_exact() {
        let tree = Tree::random(3, 3, 2);
        let counts = tree.count(2, 40_000, 0.1, 7);
        for eta in [0.1, 0.5] {
            let worth = counts.worth(|law| soft(law, eta));
            assert!(error(&worth, &tree.soft_values(eta)) < 0.1);
            let (found, best) = (tree.objective((&worth, eta)), tree.soft_values(eta)[0]);
            assert!(found <= best && found > best - 0.01);
        }
    }
}
