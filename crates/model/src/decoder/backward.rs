//! The backward pass: from gradients of the heads' outputs to gradients of the weights.

use super::head::{Ends, LogProbs, LogitRow, Target, check_temperature};
use super::layer::Pass;
use super::score::ScoreGradients;
use super::workspace::{Kept, resize};
use super::{Decoder, Gradients, NonFinite, PackedTokens, WeightFormat, Workspace, nothing_kept};
use crate::error::{Error, Result};

impl Decoder {
    /// The gradient of `Σ d_log_prob · log_prob + d_entropy · entropy`, added to `gradients`. The workspace must come from
    /// a [`Decoder::forward`] over the same tokens that kept its activations; it is used up.
    ///
    /// Returns the log-probabilities and entropies, which are computed again on the way: with gradients known beforehand, as
    /// in supervised training, no [`Decoder::log_probs`] is needed.
    ///
    /// # Errors
    /// As [`Decoder::log_probs`]; a workspace without activations; an adapter that is switched off; and the first gradient
    /// of an activation that is not finite.
    #[allow(clippy::too_many_arguments, reason = "the two gradients of one head, and where to put the result")]
    pub fn backward(
        &self,
        tokens: &PackedTokens,
        workspace: &mut Workspace,
        targets: &[Target],
        temperature: f32,
        d_log_prob: &[f32],
        d_entropy: Option<&[f32]>,
        gradients: &mut Gradients,
    ) -> Result<LogProbs> {
        let none = ScoreGradients { rows: &[], blocks: None, d_scores: &[] };
        self.backward_with_scores(tokens, workspace, targets, temperature, d_log_prob, d_entropy, none, gradients)
    }

    /// The gradient of `Σ d_scores · score`, added to `gradients`; otherwise as [`Decoder::backward`].
    ///
    /// # Errors
    /// As [`Decoder::scores`] and [`Decoder::backward`].
    pub fn backward_scores(
        &self,
        tokens: &PackedTokens,
        workspace: &mut Workspace,
        scores: ScoreGradients<'_>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        self.backward_heads(tokens, workspace, gradients, |workspace, d_hidden, gradients| {
            self.backward_score_head(workspace, scores, d_hidden, gradients)
        })
    }

    /// [`Decoder::backward`] and [`Decoder::backward_scores`] in one, for a body that two heads share.
    ///
    /// # Errors
    /// As both.
    #[allow(clippy::too_many_arguments, reason = "the gradients of two heads, and where to put the result")]
    pub fn backward_with_scores(
        &self,
        tokens: &PackedTokens,
        workspace: &mut Workspace,
        targets: &[Target],
        temperature: f32,
        d_log_prob: &[f32],
        d_entropy: Option<&[f32]>,
        scores: ScoreGradients<'_>,
        gradients: &mut Gradients,
    ) -> Result<LogProbs> {
        let head = self.language_head()?;
        head.check(targets, workspace.rows)?;
        check_temperature(temperature)?;
        if d_log_prob.len() != targets.len() || d_entropy.is_some_and(|d_entropy| d_entropy.len() != targets.len()) {
            return Err(Error::Invalid(format!("expected one gradient for each of {} targets", targets.len())));
        }
        self.backward_heads(tokens, workspace, gradients, |workspace, d_hidden, gradients| {
            let mut ends = Ends { hidden: &workspace.hidden, d_hidden: &mut *d_hidden, gradients: &mut *gradients };
            let scratch = &mut workspace.head;
            let found = match &self.device {
                Some(device) => device.backward_head(self, targets, temperature, (d_log_prob, d_entropy), &mut ends)?,
                None => {
                    let products = self.products(self.ready()?, WeightFormat::Full);
                    head.backward(products, tokens, targets, temperature, d_log_prob, d_entropy, &mut ends, scratch)?
                }
            };
            self.backward_score_head(workspace, scores, d_hidden, gradients)?;
            Ok(found)
        })
    }

    /// [`Decoder::backward`] for losses of whole distributions: `visit` receives the logits of `targets` one chunk of rows
    /// at a time, as [`Decoder::visit_logits`] would hand them, and replaces every one by the gradient of the loss with
    /// respect to it. The loss of a row may depend on that row and on constants alone, so that no split changes anything.
    ///
    /// # Errors
    /// As [`Decoder::backward`]; within, the first error of `visit`, after which `gradients` hold part of a sum.
    pub fn backward_logits<E>(
        &self,
        tokens: &PackedTokens,
        workspace: &mut Workspace,
        targets: &[Target],
        gradients: &mut Gradients,
        visit: impl FnMut(Vec<LogitRow<'_>>) -> std::result::Result<(), E>,
    ) -> Result<std::result::Result<(), E>> {
        let head = self.language_head()?;
        head.check(targets, workspace.rows)?;
        let mut failed = None;
        let done = self.backward_heads(tokens, workspace, gradients, |workspace, d_hidden, gradients| {
            let mut ends = Ends { hidden: &workspace.hidden, d_hidden, gradients };
            let visited = match &self.device {
                Some(device) => device.backward_visit(self, targets, &mut ends, &mut workspace.head, visit)?,
                None => {
                    let products = self.products(self.ready()?, WeightFormat::Full);
                    head.backward_visit(products, tokens, targets, &mut ends, &mut workspace.head, visit)
                }
            };
            visited.map_err(|error| {
                failed = Some(error);
                Error::Invalid("the loss of a chunk of logits failed".into())
            })
        });
        failed.map_or_else(|| done.map(Ok), |error| Ok(Err(error)))
    }

    /// Backward of the heads, which `heads` adds to the gradient of the hidden states, and then of what is below them.
    fn backward_heads<T>(
        &self,
        tokens: &PackedTokens,
        workspace: &mut Workspace,
        gradients: &mut Gradients,
        heads: impl FnOnce(&mut Workspace, &mut [f32], &mut Gradients) -> Result<T>,
    ) -> Result<T> {
        self.check_adapter_is_on()?;
        if self.only_packed {
            return Err(Error::Invalid("a decoder that was opened to generate cannot be trained".into()));
        }
        gradients.expect_logits(self.weights_id(), tokens);
        let mut d_hidden = std::mem::take(&mut workspace.d_hidden);
        d_hidden.clear();
        resize(&mut d_hidden, workspace.rows * self.config.hidden_size);
        let result = heads(workspace, &mut d_hidden, gradients).and_then(|found| {
            self.backward_hidden(tokens, workspace, &d_hidden, gradients)?;
            Ok(found)
        });
        workspace.d_hidden = d_hidden;
        result
    }

    /// The part of [`Decoder::backward`] below the head, from the gradient of [`Workspace::hidden`]: for heads other than
    /// the language model's.
    ///
    /// # Errors
    /// As [`Decoder::backward`].
    pub fn backward_hidden(
        &self,
        tokens: &PackedTokens,
        workspace: &mut Workspace,
        d_hidden: &[f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        self.check_adapter_is_on()?;
        if let Some(device) = &self.device {
            return device.backward_hidden(self, tokens, workspace, d_hidden, gradients);
        }
        let precision = self.ready()?;
        let d = self.config.hidden_size;
        if workspace.kept == Kept::Nothing || workspace.rows != tokens.rows() {
            return Err(nothing_kept());
        }
        // What the layers kept is about to be overwritten.
        let keeps = std::mem::take(&mut workspace.kept);
        workspace.fit_backward(&self.config, self.low_rank());
        let products = self.products(precision, WeightFormat::Full);
        let Workspace { positions, stream, layers: kept_layers, scratch, d_residual, final_inverse_rms, .. } =
            workspace;
        d_residual.fill(0.0);
        let norm = &self.base[self.final_norm.clone()];
        let d_norm = products.trains_base().then(|| gradients.range_mut(&self.final_norm));
        let offset = self.config.norm_weight_offset;
        let final_input = &stream[self.layers.len()];
        kernels::rms_norm_backward(final_input, norm, offset, final_inverse_rms, d_hidden, d_residual, d_norm);
        let lowest = self.lowest_trained();
        for layer in self.layers[lowest..].iter().rev() {
            let pass = Pass { products, positions, table: &self.tables[layer.rope] };
            let (input, kept) = (&stream[layer.index], &mut kept_layers[keeps.activations(layer.index)]);
            if keeps == Kept::Stream {
                layer.recompute(pass, tokens.segments(), input, kept, scratch);
            }
            let input_gradient = layer.index > lowest || products.trains_base();
            layer.backward(pass, tokens.segments(), input, d_residual, kept, scratch, input_gradient, gradients);
            let tensor = "gradient of the layer input";
            if let Some(found) = NonFinite::find(Some(layer.index), tensor, d_residual, d) {
                return Err(found.into());
            }
        }
        if products.trains_base() {
            for segment in tokens.segments() {
                for row in segment.start..segment.start + segment.len {
                    let gradient = &d_residual[row * d..][..d];
                    gradients.add_input_embedding(tokens.ids()[row], gradient, self.config.embedding_scale);
                }
            }
        }
        Ok(())
    }
}
