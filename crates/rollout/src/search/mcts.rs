//! Monte Carlo tree search over steps.
//!
//! ```text
//! simulation: from the root to a node that has not been opened, each time to the child with the largest
//!                 Q + exploration · P · √max(1, N_parent) / (1 + N)
//!             open the node: propose its next steps
//!             its value, by the judge, goes to it and to every node above it
//! ```
//!
//! `N` counts the simulations through a node, `Q` is the mean of their values (before the first, that of the node above), and
//! `P` the share of a step's probability among its siblings (PUCT: Rosin 2011; Silver et al., "Mastering the game of Go without
//! human knowledge", 2017). The judge takes the place of a rollout, as in "Reasoning with Language Model is Planning with World
//! Model" (arXiv 2305.14992). Values should lie in 0 to 1, for which an `exploration` of about 1 is meant. The answer is the
//! finished path that a descent by most visits comes to, or if it ends before, the finished path of the largest value.

use super::{Expansion, Found, Judge, Path, Proposer, distinct};

/// How large a tree grows and where.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MctsOptions {
    /// Simulations of each problem.
    pub simulations: usize,
    /// Next steps of each node.
    pub expansions: usize,
    /// Weight of what has been visited little against what has been found good.
    pub exploration: f64,
    /// Most steps of a path.
    pub max_steps: usize,
}

/// What came of one problem.
#[derive(Clone, Debug, PartialEq)]
pub struct Tree {
    /// The answer; unfinished only where no finished path was met.
    pub best: Found,
    /// All finished paths that were met, in the order they were.
    pub finished: Vec<Found>,
    /// Visits of the first steps.
    pub first_visits: Vec<u32>,
}

#[derive(Debug)]
struct Node {
    path: Path,
    parent: Option<usize>,
    prior: f64,
    children: Vec<usize>,
    opened: bool,
    /// The judge's value, once it was asked.
    value: Option<f64>,
    visits: u32,
    total: f64,
}

impl Node {
    fn new(path: Path, parent: Option<usize>, prior: f64) -> Self {
        Self { path, parent, prior, children: Vec::new(), opened: false, value: None, visits: 0, total: 0.0 }
    }

    fn mean(&self) -> f64 {
        if self.visits == 0 { 0.0 } else { self.total / f64::from(self.visits) }
    }
}

/// The tree of one problem; the root is node 0.
struct Grown {
    nodes: Vec<Node>,
    options: MctsOptions,
}

impl Grown {
    fn ends(&self, node: usize) -> bool {
        let path = &self.nodes[node].path;
        path.is_finished() || path.steps.len() >= self.options.max_steps
    }

    /// The child of `node` with the largest key; of equals the first.
    fn child_by(&self, node: usize, key: impl Fn(&Node) -> f64) -> Option<usize> {
        let children = self.nodes[node].children.iter().copied();
        children.reduce(|best, child| if key(&self.nodes[child]) > key(&self.nodes[best]) { child } else { best })
    }

    /// The node that the next simulation ends at.
    fn select(&self) -> usize {
        let mut node = 0;
        loop {
            let scale = self.options.exploration * f64::from(self.nodes[node].visits.max(1)).sqrt();
            let expected = self.nodes[node].mean();
            let upper = |child: &Node| {
                let mean = if child.visits == 0 { expected } else { child.mean() };
                mean + scale * child.prior / (1.0 + f64::from(child.visits))
            };
            match self.child_by(node, upper) {
                Some(child) => node = child,
                None => return node,
            }
        }
    }

    fn open(&mut self, node: usize, steps: Vec<super::Step>) {
        let steps = distinct(steps);
        // Softmax over the log-probabilities of the steps.
        let largest = steps.iter().map(|step| step.log_prob).fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = steps.iter().map(|step| (step.log_prob - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (step, weight) in steps.into_iter().zip(weights) {
            let child = Node::new(self.nodes[node].path.with(step), Some(node), weight / total);
            let index = self.nodes.len();
            self.nodes[node].children.push(index);
            self.nodes.push(child);
        }
        self.nodes[node].opened = true;
    }

    fn back_up(&mut self, node: usize, value: f64) {
        let mut above = Some(node);
        while let Some(index) = above {
            self.nodes[index].visits += 1;
            self.nodes[index].total += value;
            above = self.nodes[index].parent;
        }
    }

    fn result(self) -> Tree {
        let found = |node: &Node| Found { path: node.path.clone(), value: node.value.unwrap_or(0.0) };
        let met = |node: &&Node| node.path.is_finished() && node.visits > 0;
        let finished: Vec<Found> = self.nodes.iter().filter(met).map(found).collect();
        let mut node = 0;
        while let Some(child) = self.child_by(node, |child| f64::from(child.visits)) {
            if self.nodes[child].visits == 0 {
                break;
            }
            node = child;
        }
        let descended = found(&self.nodes[node]);
        let largest =
            finished.iter().cloned().reduce(|best, other| if other.value > best.value { other } else { best });
        let best = if descended.path.is_finished() { descended } else { largest.unwrap_or(descended) };
        let first_visits = self.nodes[0].children.iter().map(|&child| self.nodes[child].visits).collect();
        Tree { best, finished, first_visits }
    }
}

/// Grows a tree for each of `problems`, one simulation of each at a time.
///
/// # Errors
/// Those of the proposer and the judge.
pub fn mcts<E>(
    problems: usize,
    options: MctsOptions,
    proposer: &dyn Proposer<E>,
    judge: &dyn Judge<E>,
) -> Result<Vec<Tree>, E> {
    let root = || Grown { nodes: vec![Node::new(Path::default(), None, 1.0)], options };
    let mut trees: Vec<Grown> = (0..problems).map(|_| root()).collect();
    // Round 0 opens the roots, which have no value of their own.
    for _ in 0..=options.simulations {
        let leaves: Vec<usize> = trees.iter().map(Grown::select).collect();
        let to_open: Vec<usize> =
            (0..problems).filter(|&p| !trees[p].ends(leaves[p]) && !trees[p].nodes[leaves[p]].opened).collect();
        let expansion = |&problem: &usize| Expansion {
            problem,
            path: &trees[problem].nodes[leaves[problem]].path,
            node: leaves[problem] as u32,
            count: options.expansions,
        };
        let steps = proposer.propose(&to_open.iter().map(expansion).collect::<Vec<_>>())?;
        let unknown: Vec<usize> =
            (0..problems).filter(|&p| leaves[p] > 0 && trees[p].nodes[leaves[p]].value.is_none()).collect();
        let paths: Vec<(usize, &Path)> = unknown.iter().map(|&p| (p, &trees[p].nodes[leaves[p]].path)).collect();
        let values = judge.judge(&paths)?;
        for (&problem, value) in unknown.iter().zip(values) {
            trees[problem].nodes[leaves[problem]].value = Some(value);
        }
        for (problem, steps) in to_open.into_iter().zip(steps) {
            trees[problem].open(leaves[problem], steps);
        }
        for (tree, leaf) in trees.iter_mut().zip(leaves) {
            if let Some(value) = tree.nodes[leaf].value {
                tree.back_up(leaf, value);
            }
        }
    }
    Ok(trees.into_iter().map(Grown::result).collect())
}
