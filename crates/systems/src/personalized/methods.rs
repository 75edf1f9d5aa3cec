//! Eight ways to personalise a reward model, over frozen embeddings of answers.
//!
//! With `φ(x, y)` the embedding and `r` a network with one hidden layer, trained by Bradley and Terry's `-log σ(r(y_c) - r(y_r))`:
//!
//! | | learns | judges |
//! | --- | --- | --- |
//! | [`Vanilla`] | one `r(φ)` from everybody | all alike |
//! | [`Individual`] | nothing | by an `r_u(φ)` trained on the user's pairs alone |
//! | [`Conditional`] | `r(φ, u)`, `u` one of so many | a new user as nobody |
//! | [`Prlhf`] | `r(φ, e_0 + o_u)`: `α l(e_0 + o_u) + (1 - α) l(e_0)` | a new user by an `o` fitted to the user's pairs, all else frozen |
//! | [`Vpl`] | an encoder of pairs `-> N(μ, σ²)` and `r(φ, z)`: `l + β KL(N(μ, σ²) ‖ N(0, 1))` | with `z = μ` of the user's pairs |
//! | [`Gpo`] | a transformer over points (difference of embeddings, choice), users being tasks | with the user's pairs as context |
//! | [`Retrieval`] | nothing | by the choices on the pairs with the most similar prompts |
//! | [`Nearest`] | an `r_v(φ)` for each user | by that of the other user who agrees most with the user's pairs |
//! | [`FineTuned`] | one `r(φ)` from everybody | after training on with the user's pairs |
//!
//! [`Vpl`] and [`Gpo`] read a user's pairs, and who chose what is little beside all that pairs have in common. So both see every pair both ways round. The
//! encoder of [`Vpl`] pools `h(chosen, rejected) - h(rejected, chosen)`: what would be the same whatever was chosen cancels, and opposite users are opposite
//! points. Without that, everybody is the same point in a corner of [-1, 1] within a hundred steps. In [`Gpo`] a choice is a vector of its own, of the size of
//! what a pair is projected to, and not one of 257 inputs; and every layer normalises what it reads.

use base::Random;
use candle_core::{D, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::network::{Linear, Reward, Weights, negative_log_sigmoid, normalised, rows, softmax};
use crate::error::Result;

/// How networks are trained; the same for all methods.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkOptions {
    /// Hidden units.
    #[schemars(range(min = 1))]
    pub hidden: usize,
    /// Steps on everybody's pairs.
    #[schemars(range(min = 1))]
    pub steps: u64,
    /// Most steps on one user's pairs.
    #[schemars(range(min = 1))]
    pub user_steps: u64,
    /// Most passes over one user's pairs.
    #[schemars(range(min = 1))]
    pub user_epochs: u64,
    /// Steps of methods that learn from whole users: VPL and GPO.
    #[schemars(range(min = 1))]
    pub meta_steps: u64,
    /// Their learning rate.
    pub meta_learning_rate: f64,
    /// Steps in which it rises to that.
    pub meta_warmup_steps: u64,
    /// Pairs of a step.
    #[schemars(range(min = 1))]
    pub batch_size: usize,
    /// AdamW's learning rate.
    pub learning_rate: f64,
    /// AdamW's decay.
    pub weight_decay: f64,
    /// P-RLHF: numbers that describe a user.
    #[schemars(range(min = 1))]
    pub user_size: usize,
    /// P-RLHF: weight of the loss with the user known.
    #[schemars(range(min = 0, max = 1))]
    pub alpha: f64,
    /// VPL: weight of the divergence from the prior at its largest.
    pub beta: f64,
    /// VPL: pairs that say who a user is.
    #[schemars(range(min = 1))]
    pub contexts: usize,
    /// VPL: users of a step.
    #[schemars(range(min = 1))]
    pub users_per_step: u32,
    /// Pairs that are retrieved.
    #[schemars(range(min = 1))]
    pub retrieved: usize,
}

impl NetworkOptions {
    /// The learning rate of a step of a method that learns from whole users.
    fn meta_learning_rate(&self, step: u64) -> f64 {
        self.meta_learning_rate * ((step + 1) as f64 / self.meta_warmup_steps.max(1) as f64).min(1.0)
    }
}

/// Embeddings of pairs of answers.
pub struct Embedded {
    /// Two rows for each pair: the answer, and then the prompt.
    pub answers: Tensor,
    /// One row for each pair.
    pub prompts: Tensor,
}

impl Embedded {
    /// The difference of the answers of each pair, first minus second, without the prompt that they share.
    fn differences(&self) -> Result<Tensor> {
        let width = self.answers.dim(1)? - self.prompts.dim(1)?;
        let pairs = self.answers.narrow(1, 0, width)?.contiguous()?.reshape((self.answers.dim(0)? / 2, 2, width))?;
        Ok((pairs.narrow(1, 0, 1)? - pairs.narrow(1, 1, 1)?)?.squeeze(1)?)
    }
}

/// A user's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The pair, by number.
    pub pair: usize,
    /// Whether the first answer was chosen.
    pub first: bool,
}

impl Choice {
    fn chosen(self) -> u32 {
        2 * self.pair as u32 + u32::from(!self.first)
    }

    fn rejected(self) -> u32 {
        2 * self.pair as u32 + u32::from(self.first)
    }
}

/// What learns from, and what is asked about.
#[derive(Clone, Copy)]
pub struct Task<'a> {
    /// The pairs that users have judged.
    pub pool: &'a Embedded,
    /// The pairs that are asked about.
    pub probes: &'a Embedded,
    /// How networks are trained.
    pub options: &'a NetworkOptions,
    /// Names all draws.
    pub random: Random,
}

impl Task<'_> {
    fn width(&self) -> Result<usize> {
        Ok(self.pool.answers.dim(1)?)
    }

    /// Chosen and rejected answers.
    fn answers(&self, choices: &[Choice]) -> Result<[Tensor; 2]> {
        let of =
            |which: fn(Choice) -> u32| rows(&self.pool.answers, &choices.iter().map(|c| which(*c)).collect::<Vec<_>>());
        Ok([of(Choice::chosen)?, of(Choice::rejected)?])
    }

    /// A batch over everybody: users drawn alike, whatever they have judged.
    fn batch(&self, users: &[Vec<Choice>], step: u64) -> (Vec<u32>, Vec<Choice>) {
        let random = self.random.step(step as u32 + 1);
        let draw = |place: u32| {
            let user = random.at(2 * place).below(users.len() as u64) as usize;
            let choice = random.at(2 * place + 1).below(users[user].len() as u64) as usize;
            (user as u32, users[user][choice])
        };
        (0..self.options.batch_size as u32).map(draw).unzip()
    }

    /// Some of a user's choices.
    fn some(&self, choices: &[Choice], step: u64, sample: u32, count: usize) -> Vec<Choice> {
        let random = self.random.step(step as u32 + 1).sample(sample);
        (0..count as u32).map(|place| choices[random.at(place).below(choices.len() as u64) as usize]).collect()
    }

    /// Steps of training on one user.
    fn user_steps(&self, choices: &[Choice]) -> u64 {
        let passes = self.options.user_epochs * choices.len() as u64;
        passes.div_ceil(self.options.batch_size as u64).clamp(1, self.options.user_steps)
    }

    /// Trains a reward on one user.
    fn fit_user(&self, weights: &mut Weights, reward: &Reward, choices: &[Choice]) -> Result<()> {
        for step in 0..self.user_steps(choices) {
            let [chosen, rejected] = self.answers(&self.some(choices, step, 1, self.options.batch_size))?;
            let loss = negative_log_sigmoid(&(reward.forward(&chosen)? - reward.forward(&rejected)?)?)?;
            weights.step(&loss, self.options.learning_rate, self.options.weight_decay)?;
        }
        Ok(())
    }

    /// Trains a reward on everybody.
    fn fit_all(&self, weights: &mut Weights, reward: &Reward, users: &[Vec<Choice>]) -> Result<()> {
        for step in 0..self.options.steps {
            let [chosen, rejected] = self.answers(&self.batch(users, step).1)?;
            let loss = negative_log_sigmoid(&(reward.forward(&chosen)? - reward.forward(&rejected)?)?)?;
            weights.step(&loss, self.options.learning_rate, self.options.weight_decay)?;
        }
        Ok(())
    }

    /// The rewards of what is asked about, with the same further inputs for all of it.
    fn asked(&self, reward: &Reward, further: Option<&Tensor>) -> Result<Vec<f64>> {
        let answers = match further {
            Some(further) => with(&self.probes.answers, further)?,
            None => self.probes.answers.clone(),
        };
        margins(&reward.forward(&answers)?)
    }
}

/// Rows with the same further columns, or with those of their own.
fn with(of: &Tensor, further: &Tensor) -> Result<Tensor> {
    let (count, width) = (of.dim(0)?, further.dim(1)?);
    Ok(Tensor::cat(&[of, &further.broadcast_as((count, width))?.contiguous()?], 1)?)
}

/// By how much the first answer of each pair is worth more.
fn margins(rewards: &Tensor) -> Result<Vec<f64>> {
    let rewards = rewards.to_vec1::<f32>()?;
    Ok(rewards.chunks_exact(2).map(|pair| f64::from(pair[0]) - f64::from(pair[1])).collect())
}

/// A way to personalise.
pub trait Method {
    /// Learns from users, of whom each has made at least one choice.
    ///
    /// # Errors
    /// Tensors that do not fit.
    fn learn(&mut self, task: Task<'_>, users: &[Vec<Choice>]) -> Result<()>;

    /// By how much a user prefers the first answer of every pair that is asked about, given the user's choices. `user` is the number of
    /// one that was learnt from.
    ///
    /// # Errors
    /// Tensors that do not fit.
    fn judge(&mut self, task: Task<'_>, user: Option<usize>, choices: &[Choice]) -> Result<Vec<f64>>;
}

/// The method of this name.
pub fn method(name: &str) -> Option<Box<dyn Method>> {
    Some(match name {
        "vanilla" => Box::<Vanilla>::default(),
        "individual" => Box::new(Individual),
        "conditional" => Box::<Conditional>::default(),
        "p-rlhf" => Box::<Prlhf>::default(),
        "vpl" => Box::<Vpl>::default(),
        "gpo" => Box::<Gpo>::default(),
        "retrieval" => Box::new(Retrieval),
        "nearest-user" => Box::<Nearest>::default(),
        "fine-tuned" => Box::<FineTuned>::default(),
        _ => return None,
    })
}

/// One reward for everybody.
#[derive(Default)]
pub struct Vanilla(Option<Reward>);

impl Method for Vanilla {
    fn learn(&mut self, task: Task<'_>, users: &[Vec<Choice>]) -> Result<()> {
        let mut weights = Weights::new(task.random);
        let reward = Reward::new(&mut weights, task.width()?, task.options.hidden)?;
        task.fit_all(&mut weights, &reward, users)?;
        self.0 = Some(reward);
        Ok(())
    }

    fn judge(&mut self, task: Task<'_>, _user: Option<usize>, _choices: &[Choice]) -> Result<Vec<f64>> {
        self.0.as_ref().map_or_else(|| Ok(Vec::new()), |reward| task.asked(reward, None))
    }
}

/// A reward for each user, from nothing.
pub struct Individual;

impl Method for Individual {
    fn learn(&mut self, _task: Task<'_>, _users: &[Vec<Choice>]) -> Result<()> {
        Ok(())
    }

    fn judge(&mut self, task: Task<'_>, _user: Option<usize>, choices: &[Choice]) -> Result<Vec<f64>> {
        let mut weights = Weights::new(task.random);
        let reward = Reward::new(&mut weights, task.width()?, task.options.hidden)?;
        task.fit_user(&mut weights, &reward, choices)?;
        task.asked(&reward, None)
    }
}

/// A reward that is told the user's number.
#[derive(Default)]
pub struct Conditional {
    reward: Option<Reward>,
    users: usize,
}

impl Method for Conditional {
    fn learn(&mut self, task: Task<'_>, users: &[Vec<Choice>]) -> Result<()> {
        let mut weights = Weights::new(task.random);
        let reward = Reward::new(&mut weights, task.width()? + users.len(), task.options.hidden)?;
        let numbers = Tensor::eye(users.len(), candle_core::DType::F32, &Device::Cpu)?;
        for step in 0..task.options.steps {
            let (of_user, choices) = task.batch(users, step);
            let [chosen, rejected] = task.answers(&choices)?;
            let told = rows(&numbers, &of_user)?;
            let [chosen, rejected] = [with(&chosen, &told)?, with(&rejected, &told)?];
            let loss = negative_log_sigmoid(&(reward.forward(&chosen)? - reward.forward(&rejected)?)?)?;
            weights.step(&loss, task.options.learning_rate, task.options.weight_decay)?;
        }
        (self.reward, self.users) = (Some(reward), users.len());
        Ok(())
    }

    fn judge(&mut self, task: Task<'_>, user: Option<usize>, _choices: &[Choice]) -> Result<Vec<f64>> {
        let Some(reward) = &self.reward else { return Ok(Vec::new()) };
        let told: Vec<f32> = (0..self.users).map(|number| f32::from(u8::from(Some(number) == user))).collect();
        task.asked(reward, Some(&Tensor::from_vec(told, (1, self.users), &Device::Cpu)?))
    }
}

/// Personalised RLHF's user model: a generic user, and what is different about each.
#[derive(Default)]
pub struct Prlhf(Option<(Reward, Tensor, Tensor)>);

impl Method for Prlhf {
    fn learn(&mut self, task: Task<'_>, users: &[Vec<Choice>]) -> Result<()> {
        let options = task.options;
        let mut weights = Weights::new(task.random);
        let reward = Reward::new(&mut weights, task.width()? + options.user_size, options.hidden)?;
        let generic = weights.matrix(1, options.user_size, 0.5)?;
        let own = weights.matrix(users.len(), options.user_size, 0.5)?;
        for step in 0..options.steps {
            let (of_user, choices) = task.batch(users, step);
            let answers = task.answers(&choices)?;
            let described = rows(&own, &of_user)?.broadcast_add(&generic)?;
            let loss = |user: &Tensor| {
                let [chosen, rejected] = [with(&answers[0], user)?, with(&answers[1], user)?];
                Ok::<_, crate::Error>(negative_log_sigmoid(&(reward.forward(&chosen)? - reward.forward(&rejected)?)?)?)
            };
            let loss = ((loss(&described)? * options.alpha)? + (loss(&generic)? * (1.0 - options.alpha))?)?;
            weights.step(&loss, options.learning_rate, options.weight_decay)?;
        }
        self.0 = Some((reward, generic.detach(), own.detach()));
        Ok(())
    }

    fn judge(&mut self, task: Task<'_>, user: Option<usize>, choices: &[Choice]) -> Result<Vec<f64>> {
        let Some((reward, generic, own)) = &self.0 else { return Ok(Vec::new()) };
        let described = match user {
            Some(user) => (own.narrow(0, user, 1)? + generic)?,
            None => {
                let options = task.options;
                let mut weights = Weights::new(task.random);
                let offset = weights.matrix(1, options.user_size, 0.0)?;
                for step in 0..task.user_steps(choices) {
                    let [chosen, rejected] = task.answers(&task.some(choices, step, 1, options.batch_size))?;
                    let user = (&offset + generic)?;
                    let [chosen, rejected] = [with(&chosen, &user)?, with(&rejected, &user)?];
                    let loss = negative_log_sigmoid(&(reward.forward(&chosen)? - reward.forward(&rejected)?)?)?;
                    // A handful of numbers: they can move faster than weights.
                    weights.step(&loss, 10.0 * options.learning_rate, 0.0)?;
                }
                (offset.detach() + generic)?
            }
        };
        task.asked(reward, Some(&described))
    }
}

/// Variational preference learning: a user is a point that some of the user's pairs are encoded to.
#[derive(Default)]
pub struct Vpl(Option<VplNetwork>);

struct VplNetwork {
    pair: Linear,
    attention: [Linear; 3],
    mean: Linear,
    log_variance: Linear,
    reward: Reward,
}

impl VplNetwork {
    fn new(weights: &mut Weights, width: usize, options: &NetworkOptions) -> Result<Self> {
        let (hidden, size) = (options.hidden, options.user_size);
        Ok(Self {
            pair: weights.linear(2 * width, hidden)?,
            attention: [
                weights.linear(hidden, hidden)?,
                weights.linear(hidden, hidden)?,
                weights.linear(hidden, hidden)?,
            ],
            mean: weights.linear(hidden, size)?,
            log_variance: weights.linear(hidden, size)?,
            reward: Reward::new(weights, width + size, hidden)?,
        })
    }

    /// Mean and log-variance of the user who made these choices, `[1, size]` each, within [-1, 1].
    fn encode(&self, [chosen, rejected]: &[Tensor; 2]) -> Result<[Tensor; 2]> {
        let leaky = |x: Tensor| -> candle_core::Result<Tensor> { x.relu()? - (x.neg()?.relu()? * 0.2)? };
        let read = |a: &Tensor, b: &Tensor| leaky(self.pair.forward(&Tensor::cat(&[a, b], 1)?)?);
        // Less the same turned round: what says nothing about the user cancels.
        let pairs = (read(chosen, rejected)? - read(rejected, chosen)?)?;
        let [query, key, value] = &self.attention;
        let width = pairs.dim(1)? as f64;
        let logits = (query.forward(&pairs)?.matmul(&key.forward(&pairs)?.t()?)? / width.sqrt())?;
        let pooled = (softmax(&logits)?.matmul(&value.forward(&pairs)?)? + pairs)?.mean_keepdim(0)?;
        Ok([self.mean.forward(&pooled)?.tanh()?, self.log_variance.forward(&pooled)?.tanh()?])
    }

    /// The loss of one user's choices, some of which say who the user is, others what is to be said of the user; `beta` weighs the divergence.
    fn loss(&self, task: Task<'_>, [known, asked]: [&[Choice]; 2], beta: f64, noise: Random) -> Result<Tensor> {
        let [mean, log_variance] = self.encode(&task.answers(known)?)?;
        let size = task.options.user_size;
        let noise: Vec<f32> = (0..size as u32).map(|place| noise.normal(1 + place) as f32).collect();
        let noise = Tensor::from_vec(noise, (1, size), &Device::Cpu)?;
        let z = normalised(&(&mean + ((&log_variance * 0.5)?.exp()? * noise)?)?)?;
        let [chosen, rejected] = task.answers(asked)?;
        let [chosen, rejected] = [with(&chosen, &z)?, with(&rejected, &z)?];
        let preferred = negative_log_sigmoid(&(self.reward.forward(&chosen)? - self.reward.forward(&rejected)?)?)?;
        // KL(N(μ, σ²) ‖ N(0, 1)) = ½ Σ (μ² + σ² - log σ² - 1).
        let divergence = (((mean.sqr()? + log_variance.exp()?)? - &log_variance)? - 1.0)?.sum_all()?;
        Ok((preferred + (divergence * (0.5 * beta))?)?)
    }
}

impl Method for Vpl {
    fn learn(&mut self, task: Task<'_>, users: &[Vec<Choice>]) -> Result<()> {
        let options = task.options;
        let mut weights = Weights::new(task.random);
        let network = VplNetwork::new(&mut weights, task.width()?, options)?;
        for step in 0..options.meta_steps {
            // Four cosine cycles, each of which begins without the divergence.
            let phase = (4.0 * step as f64 / options.meta_steps as f64).fract();
            let beta = options.beta * 0.5 * (1.0 - (std::f64::consts::PI * phase).cos());
            let loss = |place: u32| {
                let random = task.random.step(step as u32 + 1).sample(place);
                let choices = &users[random.at(0).below(users.len() as u64) as usize];
                let some =
                    |part: u32, count| task.some(choices, step, 2 * (options.users_per_step + place) + part, count);
                network.loss(task, [&some(0, options.contexts), &some(1, options.batch_size)], beta, random)
            };
            let losses = (0..options.users_per_step).map(loss).collect::<Result<Vec<_>>>()?;
            weights.step(
                &Tensor::stack(&losses, 0)?.mean_all()?,
                options.meta_learning_rate(step),
                options.weight_decay,
            )?;
        }
        self.0 = Some(network);
        Ok(())
    }

    fn judge(&mut self, task: Task<'_>, _user: Option<usize>, choices: &[Choice]) -> Result<Vec<f64>> {
        let Some(network) = &self.0 else { return Ok(Vec::new()) };
        let contexts = &choices[..choices.len().min(8 * task.options.contexts)];
        let [mean, _] = network.encode(&task.answers(contexts)?)?;
        task.asked(&network.reward, Some(&normalised(&mean)?))
    }
}

/// Group preference optimisation: preferences are predicted in the context of others of the same user.
#[derive(Default)]
pub struct Gpo(Option<GpoNetwork>);

struct GpoNetwork {
    /// What a pair is projected by.
    pair: Linear,
    /// What is added to a pair whose first answer was chosen, and taken from one whose first was not, `[1, hidden]`.
    choice: Tensor,
    layers: Vec<GpoLayer>,
    output: Linear,
}

struct GpoLayer {
    attention: [Linear; 3],
    hidden: Linear,
    back: Linear,
}

/// Context points of a user: most that are drawn in training, and that are given later.
const MOST_CONTEXTS: usize = 100;

/// The points of a user's pairs: differences of answers, prompts, and choices where they are known.
struct Points {
    differences: Tensor,
    prompts: Tensor,
}

impl Points {
    fn of(embedded: &Embedded) -> Result<Self> {
        Ok(Self { differences: embedded.differences()?, prompts: embedded.prompts.clone() })
    }

    fn select(&self, numbers: &[u32]) -> Result<Self> {
        Ok(Self { differences: rows(&self.differences, numbers)?, prompts: rows(&self.prompts, numbers)? })
    }

    /// The points, and after them the same turned round.
    fn both_ways(&self) -> Result<Tensor> {
        let one = |sign: f64| Tensor::cat(&[&(&self.differences * sign)?, &self.prompts], 1);
        Ok(Tensor::cat(&[one(1.0)?, one(-1.0)?], 0)?)
    }

    /// The points as they are.
    fn one_way(&self) -> Result<Tensor> {
        Ok(Tensor::cat(&[&self.differences, &self.prompts], 1)?)
    }
}

impl GpoLayer {
    /// The layer for the stream of points that see `known` ones; with `own`, themselves as well.
    fn forward(&self, stream: &Tensor, known: &Tensor, own: bool) -> Result<Tensor> {
        let (points, known) = (&normalised(stream)?, &normalised(known)?);
        let [query, key, value] = &self.attention;
        let scale = (points.dim(1)? as f64).sqrt();
        let queries = query.forward(points)?;
        let mut logits = (queries.matmul(&key.forward(known)?.t()?)? / scale)?;
        if own {
            let to_itself = ((&queries * key.forward(points)?)?.sum_keepdim(D::Minus1)? / scale)?;
            logits = Tensor::cat(&[&logits, &to_itself], 1)?;
        }
        let shares = softmax(&logits)?;
        let count = known.dim(0)?;
        let mut seen = shares.narrow(1, 0, count)?.contiguous()?.matmul(&value.forward(known)?)?;
        if own {
            seen = (seen + value.forward(points)?.broadcast_mul(&shares.narrow(1, count, 1)?)?)?;
        }
        let stream = (stream + seen)?;
        Ok((&stream + self.back.forward(&self.hidden.forward(&normalised(&stream)?)?.silu()?)?)?)
    }
}

impl GpoNetwork {
    /// A network for points of this width.
    fn new(weights: &mut Weights, width: usize, hidden: usize) -> Result<Self> {
        let mut layer = || -> Result<GpoLayer> {
            Ok(GpoLayer {
                attention: [
                    weights.linear(hidden, hidden)?,
                    weights.linear(hidden, hidden)?,
                    weights.linear(hidden, hidden)?,
                ],
                hidden: weights.linear(hidden, 2 * hidden)?,
                back: weights.linear(2 * hidden, hidden)?,
            })
        };
        let layers = vec![layer()?, layer()?];
        let (pair, choice) = (weights.linear(width, hidden)?, weights.matrix(1, hidden, 1.0)?);
        Ok(Self { pair, choice, layers, output: weights.linear(hidden, 1)? })
    }

    /// The log-odds that the first answer of each target is preferred. Context points attend to each other, targets to context points and
    /// to themselves.
    fn forward(&self, contexts: &Points, choices: &[f32], targets: &Points) -> Result<Tensor> {
        // Turned round, a pair has the other choice, which says the same.
        let told: Vec<f32> = choices.iter().copied().chain(choices.iter().map(|choice| -choice)).collect();
        let told = Tensor::from_vec(told, (2 * choices.len(), 1), &Device::Cpu)?.matmul(&self.choice)?;
        let mut known = (self.pair.forward(&contexts.both_ways()?)? + told)?;
        let mut asked = self.pair.forward(&targets.one_way()?)?;
        for layer in &self.layers {
            let next = layer.forward(&known, &known, false)?;
            asked = layer.forward(&asked, &known, true)?;
            known = next;
        }
        Ok(self.output.forward(&asked)?.squeeze(1)?)
    }
}

/// 1 where the first answer was chosen, else -1.
fn signs(choices: &[Choice]) -> Vec<f32> {
    choices.iter().map(|choice| if choice.first { 1.0 } else { -1.0 }).collect()
}

fn numbers(choices: &[Choice]) -> Vec<u32> {
    choices.iter().map(|choice| choice.pair as u32).collect()
}

impl Method for Gpo {
    fn learn(&mut self, task: Task<'_>, users: &[Vec<Choice>]) -> Result<()> {
        let options = task.options;
        let mut weights = Weights::new(task.random);
        let network = GpoNetwork::new(&mut weights, task.width()?, options.hidden)?;
        let points = Points::of(task.pool)?;
        for step in 0..options.meta_steps {
            let random = task.random.step(step as u32 + 1).sample(7);
            let choices = &users[random.at(0).below(users.len() as u64) as usize];
            let known = 10 + random.at(1).below(MOST_CONTEXTS as u64 - 9) as usize;
            let (contexts, targets) =
                (task.some(choices, step, 1, known), task.some(choices, step, 2, options.batch_size));
            let [known, asked] = [&contexts, &targets].map(|choices| points.select(&numbers(choices)));
            let log_odds = network.forward(&known?, &signs(&contexts), &asked?)?;
            let signs = Tensor::from_vec(signs(&targets), targets.len(), &Device::Cpu)?;
            let loss = negative_log_sigmoid(&(log_odds * signs)?)?;
            weights.step(&loss, options.meta_learning_rate(step), options.weight_decay)?;
        }
        self.0 = Some(network);
        Ok(())
    }

    fn judge(&mut self, task: Task<'_>, _user: Option<usize>, choices: &[Choice]) -> Result<Vec<f64>> {
        let Some(network) = &self.0 else { return Ok(Vec::new()) };
        let contexts = &choices[..choices.len().min(MOST_CONTEXTS)];
        let known = Points::of(task.pool)?.select(&numbers(contexts))?;
        let log_odds = network.forward(&known, &signs(contexts), &Points::of(task.probes)?)?;
        Ok(log_odds.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
    }
}

/// A vote of the choices on the pairs with the most similar prompts: how much the difference of the answers points the way it then did.
pub struct Retrieval;

impl Method for Retrieval {
    fn learn(&mut self, _task: Task<'_>, _users: &[Vec<Choice>]) -> Result<()> {
        Ok(())
    }

    fn judge(&mut self, task: Task<'_>, _user: Option<usize>, choices: &[Choice]) -> Result<Vec<f64>> {
        let unit = |of: &Tensor| of.broadcast_div(&(of.sqr()?.sum_keepdim(D::Minus1)? + 1e-12)?.sqrt()?);
        let similar = |one: &Tensor, other: &Tensor| unit(one)?.matmul(&unit(other)?.t()?)?.to_vec2::<f32>();
        let prompts = similar(&task.probes.prompts, &rows(&task.pool.prompts, &numbers(choices))?)?;
        let past = rows(&task.pool.differences()?, &numbers(choices))?;
        let answers = similar(&task.probes.differences()?, &past)?;
        let signs = signs(choices);
        let vote = |(prompts, answers): (&Vec<f32>, &Vec<f32>)| {
            let mut order: Vec<usize> = (0..choices.len()).collect();
            order.sort_by(|a, b| prompts[*b].total_cmp(&prompts[*a]));
            let nearest = order.into_iter().take(task.options.retrieved);
            nearest.map(|index| f64::from(prompts[index] * answers[index] * signs[index])).sum()
        };
        Ok(prompts.iter().zip(&answers).map(vote).collect())
    }
}

/// The reward of the user who agrees most.
#[derive(Default)]
pub struct Nearest(Vec<(Vec<Choice>, Reward)>);

impl Method for Nearest {
    fn learn(&mut self, task: Task<'_>, users: &[Vec<Choice>]) -> Result<()> {
        self.0.clear();
        for choices in users {
            let mut weights = Weights::new(task.random);
            let reward = Reward::new(&mut weights, task.width()?, task.options.hidden)?;
            task.fit_user(&mut weights, &reward, choices)?;
            self.0.push((choices.clone(), reward));
        }
        Ok(())
    }

    fn judge(&mut self, task: Task<'_>, user: Option<usize>, choices: &[Choice]) -> Result<Vec<f64>> {
        let own: std::collections::BTreeMap<usize, bool> =
            choices.iter().map(|choice| (choice.pair, choice.first)).collect();
        let agreement = |others: &[Choice]| {
            let both: Vec<bool> =
                others.iter().filter_map(|other| Some(*own.get(&other.pair)? == other.first)).collect();
            let same = both.iter().filter(|same| **same).count();
            if both.is_empty() { 0.0 } else { same as f64 / both.len() as f64 }
        };
        let others = self.0.iter().enumerate().filter(|(number, _)| Some(*number) != user);
        let valued = others.map(|(_, (choices, reward))| (agreement(choices), reward));
        let best = valued.reduce(|best, other| if other.0 > best.0 { other } else { best });
        best.map_or_else(|| Ok(Vec::new()), |(_, reward)| task.asked(reward, None))
    }
}

/// One reward for everybody, trained on for each user.
#[derive(Default)]
pub struct FineTuned(Option<(Weights, Reward, Vec<Tensor>)>);

impl Method for FineTuned {
    fn learn(&mut self, task: Task<'_>, users: &[Vec<Choice>]) -> Result<()> {
        let mut weights = Weights::new(task.random);
        let reward = Reward::new(&mut weights, task.width()?, task.options.hidden)?;
        task.fit_all(&mut weights, &reward, users)?;
        let values = weights.values()?;
        self.0 = Some((weights, reward, values));
        Ok(())
    }

    fn judge(&mut self, task: Task<'_>, _user: Option<usize>, choices: &[Choice]) -> Result<Vec<f64>> {
        let Some((weights, reward, values)) = &mut self.0 else { return Ok(Vec::new()) };
        weights.restore(values)?;
        task.fit_user(weights, reward, choices)?;
        task.asked(reward, None)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use base::Purpose;

    use super::*;

    fn options() -> NetworkOptions {
        NetworkOptions {
            hidden: 16,
            steps: 300,
            user_steps: 300,
            user_epochs: 50,
            meta_steps: 200,
            meta_learning_rate: 1e-2,
            meta_warmup_steps: 20,
            batch_size: 16,
            learning_rate: 1e-2,
            weight_decay: 0.0,
            user_size: 4,
            alpha: 0.5,
            beta: 1e-3,
            contexts: 8,
            users_per_step: 1,
            retrieved: 5,
        }
    }

    /// Pairs of answers of three numbers, all to one prompt, and what users want who value them so.
    fn world(wants: &[[f32; 3]]) -> (Embedded, Vec<Vec<Choice>>) {
        let random = Random::new(1, Purpose::Test);
        let values: Vec<f32> = (0..600).map(|place| random.normal(place) as f32).collect();
        let worth = |want: &[f32; 3], answer: usize| -> f32 { (0..3).map(|i| want[i] * values[3 * answer + i]).sum() };
        let choices = |want: &[f32; 3]| {
            (0..100).map(|pair| Choice { pair, first: worth(want, 2 * pair) > worth(want, 2 * pair + 1) }).collect()
        };
        let users = wants.iter().map(choices).collect();
        let prompts = |count: usize| Tensor::ones((count, 1), candle_core::DType::F32, &Device::Cpu).unwrap();
        let answers = Tensor::from_vec(values, (200, 3), &Device::Cpu).unwrap();
        (Embedded { answers: Tensor::cat(&[answers, prompts(200)], 1).unwrap(), prompts: prompts(100) }, users)
    }

    fn accuracy(margins: &[f64], choices: &[Choice]) -> f64 {
        let right = choices.iter().filter(|choice| (margins[choice.pair] > 0.0) == choice.first).count();
        right as f64 / choices.len() as f64
    }

    const OPPOSITE: [[f32; 3]; 4] = [[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.5], [0.0, -1.0, -0.5]];

    #[test]
    fn opposite_users_are_served_by_what_knows_them_and_by_nothing_else() {
        let (pool, users) = world(&OPPOSITE);
        let options = options();
        let task = Task { pool: &pool, probes: &pool, options: &options, random: Random::new(2, Purpose::Test) };
        let of = |name: &str| {
            let mut method = method(name).unwrap();
            method.learn(task, &users).unwrap();
            let own = (0..4).map(|user| accuracy(&method.judge(task, Some(user), &users[user]).unwrap(), &users[user]));
            own.sum::<f64>() / 4.0
        };
        assert!((of("vanilla") - 0.5).abs() < 1e-12, "exact opposites: what one gains the other loses");
        for name in ["individual", "conditional", "p-rlhf", "fine-tuned", "gpo", "vpl"] {
            assert!(of(name) > 0.75, "{name}: {}", of(name));
        }
        assert!(of("nearest-user") < 0.6, "the nearest of the others wants something else: {}", of("nearest-user"));
    }

    #[test]
    fn a_new_user_is_served_by_the_one_who_agrees() {
        let (pool, users) = world(&OPPOSITE);
        let options = options();
        let task = Task { pool: &pool, probes: &pool, options: &options, random: Random::new(2, Purpose::Test) };
        for name in ["nearest-user", "p-rlhf", "gpo", "vpl"] {
            let mut method = method(name).unwrap();
            method.learn(task, &users).unwrap();
            let found = accuracy(&method.judge(task, None, &users[1][..30]).unwrap(), &users[1]);
            assert!(found > 0.7, "{name}: {found}");
        }
    }

    #[test]
    fn the_order_of_contexts_does_not_matter_and_targets_do_not_see_each_other() {
        let (pool, users) = world(&OPPOSITE[..1]);
        let mut weights = Weights::new(Random::new(3, Purpose::Test));
        let network = GpoNetwork::new(&mut weights, 4, 8).unwrap();
        let points = Points::of(&pool).unwrap();
        let contexts = &users[0][..6];
        let predict = |contexts: &[Choice], targets: &[u32]| {
            let known = points.select(&numbers(contexts)).unwrap();
            let log_odds = network.forward(&known, &signs(contexts), &points.select(targets).unwrap()).unwrap();
            log_odds.to_vec1::<f32>().unwrap()
        };
        let close = |a: f32, b: f32| assert!((a - b).abs() < 1e-5, "{a} {b}");
        let all = predict(contexts, &[10, 11, 12]);
        let turned: Vec<Choice> = contexts.iter().rev().copied().collect();
        all.iter().zip(predict(&turned, &[10, 11, 12])).for_each(|(a, b)| close(*a, b));
        close(all[1], predict(contexts, &[11])[0]);
        let other: Vec<Choice> = contexts.iter().map(|choice| Choice { first: !choice.first, ..*choice }).collect();
        assert!((all[1] - predict(&other, &[11])[0]).abs() > 1e-4, "choices are listened to");
    }

    /// What users have in common must not drown what tells them apart.
    #[test]
    fn users_who_mostly_agree_are_told_apart() {
        let (pool, users) = world(&[[1.0, 0.7, 0.0], [1.0, -0.7, 0.0], [1.0, 0.0, 0.7], [1.0, 0.0, -0.7]]);
        let options = options();
        let task = Task { pool: &pool, probes: &pool, options: &options, random: Random::new(2, Purpose::Test) };
        let of = |name: &str, whose: fn(usize) -> usize| {
            let mut method = method(name).unwrap();
            method.learn(task, &users).unwrap();
            let judged = |user: usize| method.judge(task, None, &users[whose(user)]).unwrap();
            (0..4).map(judged).zip(&users).map(|(margins, choices)| accuracy(&margins, choices)).sum::<f64>() / 4.0
        };
        let shared = of("vanilla", |user| user);
        for name in ["vpl", "gpo"] {
            let (own, anothers) = (of(name, |user| user), of(name, |user| (user + 1) % 4));
            assert!(own > shared + 0.05 && own > anothers + 0.05, "{name}: {own}, {anothers}, shared {shared}");
        }
    }

    #[test]
    fn opposite_choices_are_opposite_points() {
        let (pool, users) = world(&OPPOSITE[..1]);
        let options = options();
        let task = Task { pool: &pool, probes: &pool, options: &options, random: Random::new(2, Purpose::Test) };
        let network = VplNetwork::new(&mut Weights::new(task.random), 4, &options).unwrap();
        let [chosen, rejected] = task.answers(&users[0][..8]).unwrap();
        let mean = |of: &[Tensor; 2]| network.encode(of).unwrap()[0].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (one, other) = (mean(&[chosen.clone(), rejected.clone()]), mean(&[rejected, chosen]));
        assert!(one.iter().zip(&other).all(|(a, b)| (a + b).abs() < 1e-6), "{one:?} {other:?}");
        assert!(one.iter().any(|a| a.abs() > 1e-3));
    }

    #[test]
    fn retrieval_votes_with_what_was_chosen() {
        let (pool, users) = world(&[[1.0, 0.0, 0.0]]);
        let options = NetworkOptions { retrieved: 100, ..options() };
        let task = Task { pool: &pool, probes: &pool, options: &options, random: Random::new(2, Purpose::Test) };
        let found = accuracy(&Retrieval.judge(task, None, &users[0]).unwrap(), &users[0]);
        assert!(found > 0.9, "all prompts are alike, and all pairs are asked: {found}");
    }
}
