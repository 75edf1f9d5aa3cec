//! The forward pass: from tokens to hidden states, and from those to log-probabilities.

use kernels::Precision;
use rayon::prelude::*;

use super::head::{Head, LogProbs, LogitRow, Target, check_temperature};
use super::layer::{Layer, Pass};
use super::linear::Products;
use super::workspace::Activations;
use super::{Decoder, EmbeddingChange, NonFinite, PackedTokens, Tape, WeightFormat, Workspace};
use crate::error::{Error, Result};

impl Decoder {
    /// The language model's head, which a classifier lacks.
    pub(super) fn language_head(&self) -> Result<&Head> {
        let missing = || Error::Invalid("the model has no language-model head: it scores and does not write".into());
        self.head.as_ref().ok_or_else(missing)
    }

    /// What the products of a pass with weights in this format read.
    pub(super) fn products(&self, precision: Precision, format: WeightFormat) -> Products<'_> {
        let adapter = self.adapter.as_ref().filter(|adapter| adapter.on).map(|adapter| &adapter.values[..]);
        Products { precision, format, base: &self.base, adapter }
    }

    /// Runs the decoder over a batch and leaves the hidden states after the final norm in the workspace. With `keep`,
    /// leaves there too what [`Decoder::backward`] needs.
    ///
    /// # Errors
    /// Tokens outside the vocabulary, sequences longer than the context, weights that are not prepared, and the first
    /// value that is not finite.
    pub fn forward(&self, tokens: &PackedTokens, workspace: &mut Workspace, keep: bool) -> Result<()> {
        self.forward_with_embeddings(tokens, workspace, keep, None)
    }

    /// [`Decoder::forward`] with `change` applied to the input embedding of every row after it was looked up and
    /// scaled. Backward takes what `change` adds for a constant.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn forward_with_embeddings(
        &self,
        tokens: &PackedTokens,
        workspace: &mut Workspace,
        keep: bool,
        change: Option<EmbeddingChange<'_>>,
    ) -> Result<()> {
        tokens.check(self.config.vocab_size, self.config.max_positions)?;
        if let Some(device) = &self.device {
            return device.forward(self, tokens, workspace, keep, change);
        }
        workspace.positions = tokens.positions();
        let attend = |layer: &Layer, kept: &mut Activations| layer.attend(tokens.segments(), kept);
        self.run(tokens.ids(), WeightFormat::Full, workspace, keep, change, attend, None)
    }

    /// The stack over rows at `workspace.positions`; `change` sees every row's embedding first, `attend` turns a layer's queries,
    /// keys and values into its attention, and a tape takes in rows: for each pair, the first from here to the second there.
    #[allow(clippy::too_many_arguments, reason = "what forward and generation do differently")]
    pub(super) fn run(
        &self,
        ids: &[u32],
        format: WeightFormat,
        workspace: &mut Workspace,
        keep: bool,
        change: Option<EmbeddingChange<'_>>,
        mut attend: impl FnMut(&Layer, &mut Activations),
        mut tape: Option<(&mut Tape, &[(usize, usize)])>,
    ) -> Result<()> {
        let precision = self.ready()?;
        if ids.is_empty() {
            return Err(Error::Invalid("the batch is empty".into()));
        }
        let d = self.config.hidden_size;
        workspace.fit(&self.config, ids.len(), self.low_rank(), keep);
        let keeps = workspace.kept;
        let Workspace { positions, stream, layers: kept_layers, scratch, .. } = workspace;
        let embedding = &self.base[self.embedding.clone()];
        for (row, &id) in stream[0].chunks_exact_mut(d).zip(ids) {
            row.copy_from_slice(&embedding[id as usize * d..][..d]);
        }
        if self.config.embedding_scale != 1.0 {
            kernels::scale(&mut stream[0], self.config.embedding_scale);
        }
        if let Some(change) = change {
            stream[0].par_chunks_exact_mut(d).enumerate().for_each(|(row, embedding)| change(row, embedding));
        }
        for layer in &self.layers {
            let around = [keeps.input(layer.index), keeps.input(layer.index + 1)];
            let [input, output] = stream.get_disjoint_mut(around).expect("a layer's input and output are two entries");
            let kept = &mut kept_layers[keeps.activations(layer.index)];
            let pass = Pass { products: self.products(precision, format), positions, table: &self.tables[layer.rope] };
            layer.forward_qkv(pass, input, kept, scratch);
            attend(layer, kept);
            layer.forward_rest(pass, input, output, kept, scratch);
            if kernels::finite(output).is_some()
                && let Some(found) = layer.blame(input, kept, output)
            {
                return Err(found.into());
            }
            if let Some((tape, rows)) = &mut tape {
                tape.take_layer(layer.index, input, kept, rows);
            }
        }
        let norm = &self.base[self.final_norm.clone()];
        let (offset, eps) = (self.config.norm_weight_offset, self.config.eps);
        let input = &stream[keeps.input(self.layers.len())];
        kernels::rms_norm(input, norm, offset, eps, &mut workspace.hidden, &mut workspace.final_inverse_rms);
        if let Some((tape, rows)) = tape {
            tape.take_end(self.layers.len(), [input, &workspace.hidden, &workspace.final_inverse_rms], rows);
        }
        NonFinite::find(None, "final hidden state", &workspace.hidden, d).map_or(Ok(()), |found| Err(found.into()))
    }

    /// The log-probabilities of `targets`, in ascending order of row, under softmax(logits / temperature) of the last
    /// forward; with `want_entropy` also the entropies.
    ///
    /// # Errors
    /// Targets outside the batch or the vocabulary or out of order, a temperature that is not positive, and the first
    /// log-probability that is not finite.
    pub fn log_probs(
        &self,
        workspace: &mut Workspace,
        targets: &[Target],
        temperature: f32,
        want_entropy: bool,
    ) -> Result<LogProbs> {
        let head = self.language_head()?;
        head.check(targets, workspace.rows)?;
        check_temperature(temperature)?;
        if let Some(device) = &self.device {
            return device.log_probs(self, &workspace.hidden, targets, temperature, want_entropy);
        }
        let products = self.products(self.ready()?, WeightFormat::Full);
        head.log_probs(products, &workspace.hidden, targets, temperature, want_entropy, &mut workspace.head)
    }

    /// Hands the logits of `targets`, in ascending order of row, to `visit`: one chunk of rows at a time, from the last
    /// forward. Logits are never all in memory; what `visit` leaves in them is lost.
    ///
    /// # Errors
    /// Targets outside the batch or the vocabulary or out of order; within, the first error of `visit`, which ends the walk.
    pub fn visit_logits<E>(
        &self,
        workspace: &mut Workspace,
        targets: &[Target],
        visit: impl FnMut(Vec<LogitRow<'_>>) -> std::result::Result<(), E>,
    ) -> Result<std::result::Result<(), E>> {
        let head = self.language_head()?;
        head.check(targets, workspace.rows)?;
        let Workspace { hidden, head: scratch, .. } = workspace;
        if let Some(device) = &self.device {
            return device.visit(self, hidden, targets, scratch, visit);
        }
        let products = self.products(self.ready()?, WeightFormat::Full);
        Ok(head.visit(products, hidden, targets, scratch, visit))
    }
}
