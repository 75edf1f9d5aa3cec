//! Activations that sampling leaves for training.
//!
//! A token that is generated goes through the same layers as in a training forward, and gets the same bits there. So what its layers
//! computed, once kept, *is* the forward: a sequence that was sampled under the weights at hand can go to
//! [`Decoder::backward`] at once.

use kernels::RowCopy;

use super::workspace::{Activations, Kept, Workspace};
use super::{Decoder, Gradients, PackedTokens, WeightsId};

/// The activations of tokens that were generated, row by row, until training asks for them.
///
/// Life goes in circles: [`Tape::start`] makes room, [`Decoder::extend_onto`] fills rows, [`Tape::finish`] says which sequences
/// they are, [`Tape::recall`] hands them over.
#[derive(Default)]
pub struct Tape {
    /// The rows, from the start until they are handed over; memory for them otherwise is with those who train.
    workspace: Workspace,
    /// The weights of the rows, and the sequences once they are known.
    recorded: Option<(WeightsId, PackedTokens)>,
}

impl Tape {
    /// A tape without rows.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes room for `rows` rows that this decoder will compute. The memory is that of `workspace`, which gets it back with
    /// [`Tape::recall`]: recording takes no more than the forward that it saves. From now on `gradients` may keep logits of these rows.
    pub fn start(&mut self, decoder: &Decoder, rows: usize, workspace: &mut Workspace, gradients: &mut Gradients) {
        gradients.start_logits(decoder);
        if self.recorded.is_none() {
            self.workspace.exchange_kept(workspace);
        }
        let checkpoints = self.workspace.checkpoints() || workspace.checkpoints();
        self.workspace.set_checkpointing(checkpoints);
        workspace.set_checkpointing(checkpoints);
        self.workspace.fit_kept(&decoder.config, rows, decoder.low_rank(), true);
        self.recorded = Some((decoder.weights_id(), PackedTokens::new()));
    }

    /// Closes the tape: its rows are those of `tokens`, where sequence `i` was recorded from row `starts[i]` on. No start lies
    /// before the place of its sequence in `tokens`, and they ascend. `gradients` are those that it was started with.
    ///
    /// # Panics
    /// If the starts are others, or the tape is too short.
    pub fn finish(&mut self, decoder: &Decoder, tokens: PackedTokens, starts: &[usize], gradients: &mut Gradients) {
        let segments = tokens.segments();
        assert_eq!(segments.len(), starts.len(), "a tape's sequences and their starts");
        assert!(segments.iter().zip(starts).all(|(segment, &start)| segment.start <= start), "a sequence moves on");
        gradients.finish_logits(&tokens, starts);
        let rows = self.workspace.rows;
        for buffer in self.workspace.recorded(decoder.layers.len()) {
            let width = buffer.len() / rows;
            let mut end = 0;
            for (segment, &start) in segments.iter().zip(starts) {
                // Between sequences there may be a row of padding. Anything that is finite will do for it.
                buffer[end * width..segment.start * width].fill(0.0);
                buffer.copy_within(start * width..(start + segment.len) * width, segment.start * width);
                end = segment.start + segment.len;
            }
        }
        self.workspace.fit_kept(&decoder.config, tokens.rows(), decoder.low_rank(), true);
        self.workspace.positions = tokens.positions();
        if let Some((_, recorded)) = &mut self.recorded {
            *recorded = tokens;
        }
    }

    /// Hands over the forward of these tokens, if it is what the tape holds and the weights are still those that computed it:
    /// `workspace` is then as [`Decoder::forward`] leaves it that keeps its activations. Returns whether it was.
    pub fn recall(&mut self, decoder: &Decoder, tokens: &PackedTokens, workspace: &mut Workspace) -> bool {
        let now = decoder.weights_id();
        let same = self.recorded.as_ref().is_some_and(|(weights, recorded)| *weights == now && recorded == tokens);
        if same {
            self.workspace.exchange_kept(workspace);
            workspace.fit(&decoder.config, tokens.rows(), decoder.low_rank(), true);
            self.recorded = None;
        }
        same
    }

    /// Forgets everything, and gives the memory back.
    pub fn release(&mut self) {
        self.workspace.release();
        self.recorded = None;
    }

    /// Takes in rows of one layer: its `input`, and what it computed from there.
    pub(super) fn take_layer(&mut self, layer: usize, input: &[f32], kept: &Activations, rows: &[(usize, usize)]) {
        let count = self.workspace.rows;
        let mut arrays = vec![array(input, &mut self.workspace.stream[layer], count)];
        if self.workspace.kept == Kept::Everything {
            let own = self.workspace.layers[layer].buffers_mut();
            arrays.extend(own.zip(kept.buffers()).map(|(to, from)| array(from, to, count)));
        }
        kernels::copy_rows(&mut arrays, rows);
    }

    /// Takes in rows of what follows the layers: the last one's output, and what the final norm makes of it.
    pub(super) fn take_end(&mut self, layers: usize, from: [&[f32]; 3], rows: &[(usize, usize)]) {
        let Workspace { rows: count, stream, hidden, final_inverse_rms, .. } = &mut self.workspace;
        let to = [&mut stream[layers], hidden, final_inverse_rms];
        let mut arrays: Vec<RowCopy<'_>> = from.into_iter().zip(to).map(|(from, to)| array(from, to, *count)).collect();
        kernels::copy_rows(&mut arrays, rows);
    }
}

/// `rows` is the number of rows of `to`, whose width is that of `from`.
fn array<'a>(from: &'a [f32], to: &'a mut Vec<f32>, rows: usize) -> RowCopy<'a> {
    RowCopy { width: to.len() / rows, from, to }
}
