//! The fused head on the device: one chunk of logits at a time, forward and backward.

use candle_core::{D, DType, Device, Result as CandleResult, Tensor};

use super::super::head::{LogProbs, Target, chunk_rows};
use super::super::not_prepared;
use super::super::parameters::Gradients;
use super::{Decoder, OnDevice, accumulate, product, product_type, to_host};
use crate::error::Result;

/// Statistics of a chunk of logits, one row a target.
struct Chunk {
    /// The log-probability of every token.
    log_p: Tensor,
    /// The targets as a column.
    ids: Tensor,
    /// Log-probabilities of the targets, as a column.
    chosen: Tensor,
    /// Entropies, as a column.
    entropy: Tensor,
}

impl Chunk {
    fn new(logits: &Tensor, targets: &[Target], temperature: f32) -> CandleResult<Self> {
        let logits = (logits / f64::from(temperature))?;
        let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
        let log_p = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)?;
        let ids: Vec<u32> = targets.iter().map(|target| target.token).collect();
        let ids = Tensor::from_vec(ids, (targets.len(), 1), logits.device())?;
        let chosen = log_p.gather(&ids, 1)?;
        let entropy = (log_p.exp()? * &log_p)?.sum_keepdim(D::Minus1)?.neg()?;
        Ok(Self { log_p, ids, chosen, entropy })
    }

    /// Appends what is asked for to what was found before.
    fn append_to(&self, found: &mut LogProbs, want_entropy: bool) -> CandleResult<()> {
        let chosen = to_host(&self.chosen)?;
        let most = to_host(&self.log_p.max_keepdim(D::Minus1)?)?;
        found.most_probable.extend(chosen.iter().zip(&most).map(|(chosen, most)| chosen >= most));
        found.log_prob.extend(chosen);
        if want_entropy {
            found.entropy.extend(to_host(&self.entropy)?);
        }
        Ok(())
    }

    /// The gradient of the logits, given those of log-probabilities and entropies as columns:
    /// `d_log_prob · (1[j = target] - p_j) - d_entropy · p_j · (log p_j + entropy)`, over the temperature.
    fn d_logits(&self, d_log_prob: &Tensor, d_entropy: Option<&Tensor>, temperature: f32) -> CandleResult<Tensor> {
        let p = self.log_p.exp()?;
        let mut slope = d_log_prob.broadcast_as(p.shape())?.contiguous()?;
        if let Some(d_entropy) = d_entropy {
            slope = (slope + self.log_p.broadcast_add(&self.entropy)?.broadcast_mul(d_entropy)?)?;
        }
        let d_logits = (p * slope)?.neg()?.scatter_add(&self.ids, d_log_prob, 1)?;
        d_logits / f64::from(temperature)
    }
}

/// The hidden states that predict a chunk of targets.
fn gather(hidden: &[f32], targets: &[Target], d: usize, device: &Device) -> CandleResult<Tensor> {
    let rows: Vec<f32> = targets.iter().flat_map(|target| &hidden[target.row * d..][..d]).copied().collect();
    Tensor::from_vec(rows, (targets.len(), d), device)
}

impl OnDevice {
    /// The hidden size, the type of products, and the head's weight.
    fn head(&self, decoder: &Decoder) -> Result<(usize, DType, &Tensor)> {
        let weights = self.ready(decoder)?;
        let head = decoder.language_head()?;
        let weight = weights.head.as_ref().ok_or_else(not_prepared)?;
        Ok((head.hidden, product_type(weights.precision), weight))
    }

    /// [`Decoder::logits`].
    pub fn logits(&self, decoder: &Decoder, hidden: &[f32], logits: &mut [f32]) -> Result<()> {
        let (d, of, weight) = self.head(decoder)?;
        let hidden = Tensor::from_slice(hidden, (hidden.len() / d, d), self.device())?;
        let product = product(of, &hidden, &weight.t()?)?;
        logits.copy_from_slice(&to_host(&product)?);
        Ok(())
    }

    /// [`Decoder::log_probs`].
    pub fn log_probs(
        &self,
        decoder: &Decoder,
        hidden: &[f32],
        targets: &[Target],
        temperature: f32,
        want_entropy: bool,
    ) -> Result<LogProbs> {
        let (d, of, weight) = self.head(decoder)?;
        let mut found = LogProbs::default();
        for targets in targets.chunks(chunk_rows(decoder.config.vocab_size)) {
            let hidden = gather(hidden, targets, d, self.device())?;
            let logits = product(of, &hidden, &weight.t()?)?;
            Chunk::new(&logits, targets, temperature)?.append_to(&mut found, want_entropy)?;
        }
        found.checked(targets)
    }

    /// The head's part of [`Decoder::backward`]: adds to the gradients of hidden states and, where it is trained, of the head.
    #[allow(clippy::too_many_arguments, reason = "the operands of a loss head and its two gradients")]
    pub fn backward_head(
        &self,
        decoder: &Decoder,
        hidden: &[f32],
        targets: &[Target],
        temperature: f32,
        (d_log_prob, d_entropy): (&[f32], Option<&[f32]>),
        d_hidden: &mut [f32],
        gradients: &mut Gradients,
    ) -> Result<LogProbs> {
        let (d, of, weight) = self.head(decoder)?;
        let trains_base = decoder.adapter.is_none();
        let mut found = LogProbs::default();
        let mut d_weight: Option<Tensor> = None;
        let rows = chunk_rows(decoder.config.vocab_size);
        for (index, targets) in targets.chunks(rows).enumerate() {
            let here = index * rows..index * rows + targets.len();
            let column = |values: &[f32]| Tensor::from_slice(&values[here.clone()], (targets.len(), 1), self.device());
            let hidden = gather(hidden, targets, d, self.device())?;
            let chunk = Chunk::new(&product(of, &hidden, &weight.t()?)?, targets, temperature)?;
            chunk.append_to(&mut found, true)?;
            let d_logits =
                chunk.d_logits(&column(d_log_prob)?, d_entropy.map(column).transpose()?.as_ref(), temperature)?;
            let d_rows = to_host(&product(of, &d_logits, weight)?)?;
            for (target, gradient) in targets.iter().zip(d_rows.chunks_exact(d)) {
                kernels::add(&mut d_hidden[target.row * d..][..d], gradient);
            }
            if trains_base {
                let here = product(of, &d_logits.t()?, &hidden)?.to_dtype(DType::F32)?;
                d_weight = Some(match d_weight {
                    Some(sum) => (sum + here)?,
                    None => here,
                });
            }
        }
        if let Some(d_weight) = d_weight {
            accumulate(gradients, &decoder.language_head()?.weight, &d_weight)?;
        }
        found.checked(targets)
    }
}
