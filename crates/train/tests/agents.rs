//! Training in an environment: a random model learns a small text adventure by trial and reward, and every run repeats.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use data::{Example, Prompt, RenderOptions, Renderer, Row, Source};
use envs::environment::text_game::Style;
use envs::environment::{self, EpisodeId, TextGameOptions};
use envs::{EnvironmentConfig, Silent, Split};
use eval::play::World;
use kernels::Precision;
use model::ModelConfig;
use model::chat::ChatTemplate;
use model::config::Family;
use model::decoder::Decoder;
use objectives::Credit;
use posttrain_train as train;
use rollout::{ConversationOptions, SamplingOptions};
use train::methods::policy::{Policy, PolicyOptions};
use train::methods::sft::{Sft, SftOptions};
use train::options::{RunOptions, TrainingOptions};
use train::{Method, Observer, Outcome, Provenance, Run};

use crate::common::{self, StopAt, assert_same, metrics, on_threads};

/// A game of two or three rooms in one-letter commands, of which a turn has one.
struct Game {
    environment: EnvironmentConfig,
    conversation: ConversationOptions,
    template: ChatTemplate,
    prompts: Vec<Prompt>,
    examples: Vec<Example>,
}

impl Game {
    fn new() -> Self {
        let options = TextGameOptions {
            rooms: [2, 3],
            doors: 0,
            contained: 0.3,
            max_turns: 6,
            progress: 0.5,
            style: Style::Brief,
            ..TextGameOptions::default()
        };
        let environment = EnvironmentConfig::TextGame(options);
        let mut world = environment.build().unwrap();
        let rows = (0..200).map(|index| {
            let episode = EpisodeId { seed: 0, split: Split::Train, index };
            let mut columns = environment::row(&mut *world, episode);
            columns.insert("completion".into(), environment::demonstration(&mut *world, episode));
            Row { source: Source::new("games", index + 1), columns }
        });
        let samples = data::sample::parse(rows.collect()).unwrap();
        let (tokenizer, template) = (common::tokenizer(), ChatTemplate::chatml().unwrap());
        let options = RenderOptions::default();
        let renderer = Renderer::new(&tokenizer, Some(&template), 512, &options);
        let (prompts, examples) =
            (renderer.prompts(&samples).unwrap().items, renderer.examples(&samples).unwrap().items);
        Self {
            environment,
            conversation: ConversationOptions { max_turns: 10, max_turn_tokens: 2 },
            template,
            prompts,
            examples,
        }
    }

    /// A few steps of imitation, then reinforcement.
    fn run(
        &self,
        folder: &Path,
        seed: u64,
        (sft, policy): (u64, u64),
        change: impl Fn(&mut PolicyOptions),
        (resume, observer, interrupt): (bool, &mut dyn Observer, &AtomicBool),
    ) -> Outcome {
        let training = |steps, learning_rate| TrainingOptions {
            max_steps: Some(steps),
            learning_rate,
            micro_batch_tokens: 1024,
            ..TrainingOptions::default()
        };
        let imitation = SftOptions { batch_size: 16, training: training(sft, 3e-3), ..SftOptions::default() };
        let mut options = PolicyOptions {
            prompts_per_step: 4,
            num_generations: 8,
            sampling: SamplingOptions { max_new_tokens: 250, ..SamplingOptions::default() },
            training: training(policy, 5e-4),
            ..PolicyOptions::default()
        };
        change(&mut options);
        let stages: Vec<Box<dyn Method>> = vec![
            Box::new(Sft::new(imitation, self.examples.clone()).unwrap()),
            Box::new(Policy::new(options, self.prompts.clone(), Box::new(Silent)).unwrap()),
        ];
        let tokenizer = common::tokenizer();
        let run = Run {
            directory: folder,
            options: RunOptions { save_steps: 2, save_total_limit: 2, ..RunOptions::default() },
            seed,
            precision: Precision::F32,
            decoder: Decoder::random(ModelConfig::tiny(Family::Llama, 259), seed).unwrap(),
            tokenizer: &tokenizer,
            referee: Default::default(),
            world: Some(World {
                environment: &self.environment,
                template: &self.template,
                conversation: &self.conversation,
            }),
            chat_template: Some(&self.template),
            stages,
            evaluator: None,
            observer,
            interrupt,
            provenance: Provenance { config: format!("seed = {seed}\n"), ..Provenance::default() },
        };
        if resume { run.resume().unwrap() } else { run.start().unwrap() }
    }

    fn finish(&self, folder: &Path, seed: u64, steps: (u64, u64), change: impl Fn(&mut PolicyOptions)) {
        let outcome = self.run(folder, seed, steps, change, (false, &mut (), &AtomicBool::new(false)));
        assert!(matches!(outcome, Outcome::Finished(_)));
    }
}

fn of(lines: &[serde_json::Map<String, serde_json::Value>], name: &str) -> Vec<f64> {
    lines.iter().filter_map(|line| line.get(name)?.as_f64()).collect()
}

#[test]
fn a_game_is_learnt_by_trial_and_reward() {
    let game = Game::new();
    for seed in 0..3 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        game.finish(&path, seed, (80, 60), |_| {});
        let lines = metrics(&path);
        // Of every step of reinforcement, none of imitation.
        let of = |name| {
            let values = of(&lines, name);
            assert_eq!(values.len(), 60, "{name}");
            values
        };
        let rewards = of("reward");
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let (before, after) = (mean(&rewards[..8]), mean(&rewards[52..]));
        assert!(after > before + 0.1, "seed {seed}: {before} to {after}");
        // The sampler and the trainer agree to the last bit in every turn.
        assert!(of("sampling/sampling_logp_difference/max").iter().all(|difference| *difference == 0.0));
        assert_eq!(of("rewards/text_game/mean"), rewards);
        assert!(of("turns/max").iter().all(|turns| (1.0..=6.0).contains(turns)));
        assert!(of("tools/call_frequency").iter().all(|calls| *calls == 0.0));
        assert!(of("rendering/other_text").iter().all(|share| (0.0..=1.0).contains(share)));
    }
}

#[test]
fn conversations_resume_and_split_to_the_same_bytes() {
    let game = Game::new();
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    let steps = (2, 3);
    let same = |options: &mut PolicyOptions| {
        options.objective.beta = 0.1;
        options.objective.credit = Credit::Turn;
    };
    on_threads(2, || game.finish(&whole, 5, steps, same));

    let stopped = folder.path().join("stopped");
    for step in 1..=4 {
        let stop = AtomicBool::new(false);
        let outcome = game.run(&stopped, 5, steps, same, (step > 1, &mut StopAt(step, &stop), &stop));
        assert_eq!(outcome, Outcome::Interrupted { step });
    }
    game.run(&stopped, 5, steps, same, (true, &mut (), &AtomicBool::new(false)));
    assert_same(&whole, &stopped, "interrupted in every step");

    for (micro_batch_tokens, decode_batch_size, threads) in [(1, 3, 1), (100_000, 64, 2)] {
        let cut = folder.path().join(format!("cut-{decode_batch_size}"));
        let change = |options: &mut PolicyOptions| {
            same(options);
            options.training.micro_batch_tokens = micro_batch_tokens;
            options.decode_batch_size = decode_batch_size;
        };
        on_threads(threads, || game.finish(&cut, 5, steps, change));
        assert_same(
            &whole,
            &cut,
            &format!("{micro_batch_tokens} tokens, {decode_batch_size} decoded, {threads} threads"),
        );
    }
}
