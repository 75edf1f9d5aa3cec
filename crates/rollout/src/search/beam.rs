//! Beam search: of all paths of one length, the best go on.
//!
//! ```text
//! kept ← {empty path}
//! while a kept path is unfinished, and max_steps are not reached:
//!     candidates ← finished paths of kept, and `expansions` next steps of each of the others
//!     kept ← the `beams` candidates that the judge values most; of equals, the earlier
//! ```
//!
//! With tokens as steps and [`LengthNormalized`](super::LengthNormalized) as the judge it is the textbook's beam search: one beam is greedy
//! decoding, as many beams as there are completions find the most probable one. With sampled lines as steps and a process reward model as
//! the judge it is the step-level search of Snell et al., "Scaling LLM Test-Time Compute Optimally", arXiv 2408.03314.

use super::{Expansion, Found, Judge, Path, Proposer, distinct};

/// How wide and how deep a beam search is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BeamOptions {
    /// Paths that are kept.
    pub beams: usize,
    /// Next steps of each kept path.
    pub expansions: usize,
    /// Most steps of a path.
    pub max_steps: usize,
}

/// For each of `problems`, the kept paths, the best first. A path may be unfinished where `max_steps` ended the search.
///
/// # Errors
/// Those of the proposer and the judge.
pub fn beam<E>(
    problems: usize,
    options: BeamOptions,
    proposer: &dyn Proposer<E>,
    judge: &dyn Judge<E>,
) -> Result<Vec<Vec<Found>>, E> {
    let mut kept = vec![vec![Found { path: Path::default(), value: 0.0 }]; problems];
    let mut next_node = vec![0; problems];
    for _ in 0..options.max_steps {
        let mut expansions = Vec::new();
        for (problem, kept) in kept.iter().enumerate() {
            for found in kept.iter().filter(|found| !found.path.is_finished()) {
                let node = next_node[problem];
                next_node[problem] += 1;
                expansions.push(Expansion { problem, path: &found.path, node, count: options.expansions });
            }
        }
        if expansions.is_empty() {
            break;
        }
        let steps = proposer.propose(&expansions)?;
        let grown: Vec<(usize, Path)> = expansions
            .iter()
            .zip(steps)
            .flat_map(|(from, steps)| distinct(steps).into_iter().map(|step| (from.problem, from.path.with(step))))
            .collect();
        let paths: Vec<(usize, &Path)> = grown.iter().map(|(problem, path)| (*problem, path)).collect();
        let values = judge.judge(&paths)?;
        for kept in &mut kept {
            kept.retain(|found| found.path.is_finished());
        }
        for ((problem, path), value) in grown.into_iter().zip(values) {
            kept[problem].push(Found { path, value });
        }
        for kept in &mut kept {
            // The sort is stable: of equals, the earlier stays ahead.
            kept.sort_by(|a, b| b.value.total_cmp(&a.value));
            kept.truncate(options.beams);
        }
    }
    Ok(kept)
}
