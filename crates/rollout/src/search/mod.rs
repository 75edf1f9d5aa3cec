//! Search over the steps of solutions, guided by a judge.
//!
//! A search grows [`Path`]s of [`Step`]s for several problems side by side. What a step is, a [`Proposer`] decides: a line that a model
//! samples ([`StepSampler`]), or a single token ([`TokenProposer`]). How good a path is so far, a [`Judge`] says: a process reward model, a
//! verifier, or the path's own probability ([`LengthNormalized`]). The searches know neither: [`beam`] keeps the best paths of each
//! length, [`mcts`] grows a tree where it pays.
//!
//! A search calls its proposer with everything it wants next, over all problems, so that a model works on full batches; what a problem's
//! paths become does not depend on the others. Draws are named by problem and node: the same seed gives the same bytes.

mod beam;
mod mcts;
mod sampler;
mod tokens;

pub use beam::{BeamOptions, beam};
pub use mcts::{MctsOptions, Tree, mcts};
pub use sampler::StepSampler;
pub use tokens::TokenProposer;

/// A step of a solution.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Its tokens, with those that end it.
    pub tokens: Vec<u32>,
    /// The log-probability of its tokens after all that comes before.
    pub log_prob: f64,
    /// Whether the solution ends with it.
    pub last: bool,
}

/// A solution as far as it has come.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Path {
    /// Its steps, from the first.
    pub steps: Vec<Step>,
}

impl Path {
    /// The path one step further.
    pub fn with(&self, step: Step) -> Self {
        let mut steps = self.steps.clone();
        steps.push(step);
        Self { steps }
    }

    /// Whether the solution is complete.
    pub fn is_finished(&self) -> bool {
        self.steps.last().is_some_and(|step| step.last)
    }

    /// All tokens.
    pub fn tokens(&self) -> Vec<u32> {
        self.steps.iter().flat_map(|step| &step.tokens).copied().collect()
    }

    /// The log-probability of all tokens.
    pub fn log_prob(&self) -> f64 {
        self.steps.iter().map(|step| step.log_prob).sum()
    }
}

/// A path to be continued.
#[derive(Clone, Copy, Debug)]
pub struct Expansion<'a> {
    /// The problem, by its index.
    pub problem: usize,
    /// The path.
    pub path: &'a Path,
    /// Names the expansion among those of its problem in random draws.
    pub node: u32,
    /// How many steps are asked for.
    pub count: usize,
}

/// What proposes the next steps of paths. `E` is what can go wrong.
pub trait Proposer<E> {
    /// For every expansion, up to as many next steps as it asks for.
    ///
    /// # Errors
    /// Those of the model behind it.
    fn propose(&self, expansions: &[Expansion<'_>]) -> Result<Vec<Vec<Step>>, E>;
}

/// What tells good paths from bad ones. `E` is what can go wrong.
pub trait Judge<E> {
    /// The value of every path, given with the index of its problem: the higher the better. Paths have at least one step, and may be
    /// unfinished.
    ///
    /// # Errors
    /// Those of the judge.
    fn judge(&self, paths: &[(usize, &Path)]) -> Result<Vec<f64>, E>;
}

/// A path that was found and what the judge says about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The path.
    pub path: Path,
    /// Its value.
    pub value: f64,
}

/// The log-probability of a path over `((5 + n) / 6)^alpha`, where `n` is its number of tokens: the judge of plain beam search (Wu et al.,
/// "Google's Neural Machine Translation System", arXiv 1609.08144, without the coverage penalty).
#[derive(Clone, Copy, Debug)]
pub struct LengthNormalized {
    /// 0 compares log-probabilities, 1 is close to comparing their means.
    pub alpha: f64,
}

impl<E> Judge<E> for LengthNormalized {
    fn judge(&self, paths: &[(usize, &Path)]) -> Result<Vec<f64>, E> {
        let value = |path: &Path| path.log_prob() / ((5.0 + path.tokens().len() as f64) / 6.0).powf(self.alpha);
        Ok(paths.iter().map(|(_, path)| value(path)).collect())
    }
}

/// Drops steps whose tokens came before; the first of equals stays.
fn distinct(steps: Vec<Step>) -> Vec<Step> {
    let mut kept: Vec<Step> = Vec::with_capacity(steps.len());
    for step in steps {
        if kept.iter().all(|other| other.tokens != step.tokens) {
            kept.push(step);
        }
    }
    kept
}
