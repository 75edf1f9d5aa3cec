//! Models in environments: what is played is what the environment says, and scores are its rewards.

use base::{Hint, Purpose, Random};
use data::{Prompt, RenderOptions, Renderer, Row, Source};
use envs::environment::text_game::Style;
use envs::environment::{EpisodeId, TextGameOptions, Trace, row};
use envs::verify::NumberOptions;
use envs::{EnvironmentConfig, RewardConfig, RewardKind, Score, Silent, Split, Status, Weighted};
use kernels::Precision;
use model::ModelConfig;
use model::chat::ChatTemplate;
use model::config::Family;
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use posttrain_eval::play::{PlayError, Played, World, play, scores};
use posttrain_eval::{
    Answerer, EvaluateError, EvaluateOptions, Strategy, TestTimeOptions, answer_at_test_time, evaluate_in,
};
use rollout::{ConversationOptions, Fidelity, Finish, Generator, LogitsContext, LogitsHook, Request, SamplingOptions};

/// Letters of commands only, and the end of a turn after each.
struct Commands;

impl LogitsHook for Commands {
    fn apply(&self, logits: &mut [f32], context: &LogitsContext<'_>) {
        let ends = context.completion.last().is_some_and(|last| b"nesutol".map(u32::from).contains(last));
        for (id, logit) in logits.iter_mut().enumerate() {
            let allowed = if ends { id == 257 } else { b"nesuto".contains(&(id.min(255) as u8)) && id < 256 };
            if !allowed {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

struct Setup {
    decoder: Decoder,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    environment: EnvironmentConfig,
    conversation: ConversationOptions,
    prompts: Vec<Prompt>,
}

fn setup() -> Setup {
    let mut decoder = Decoder::random(ModelConfig::tiny(Family::Llama, 259), 3).unwrap();
    decoder.prepare(Precision::F32);
    let (tokenizer, template) = (Tokenizer::bytes().unwrap(), ChatTemplate::chatml().unwrap());
    let options =
        TextGameOptions { rooms: [2, 4], doors: 1, max_turns: 10, style: Style::Brief, ..TextGameOptions::default() };
    let environment = EnvironmentConfig::TextGame(options);
    let mut world = environment.build().unwrap();
    let rows = (0..12).map(|index| {
        let columns = row(&mut *world, EpisodeId { seed: 4, split: Split::Train, index });
        Row { source: Source::new("games", index + 1), columns }
    });
    let samples = data::sample::parse(rows.collect()).unwrap();
    let options = RenderOptions::default();
    let prompts = Renderer::new(&tokenizer, Some(&template), 512, &options).prompts(&samples).unwrap().items;
    Setup {
        decoder,
        tokenizer,
        template,
        environment,
        conversation: ConversationOptions { max_turns: 20, max_turn_tokens: 3 },
        prompts,
    }
}

impl Setup {
    fn world(&self) -> World<'_> {
        World { environment: &self.environment, template: &self.template, conversation: &self.conversation }
    }

    fn play(&self, batch_size: usize) -> Vec<Played> {
        let sampling = SamplingOptions { max_new_tokens: 400, ..SamplingOptions::default() };
        let requests: Vec<Request> =
            self.prompts.iter().flat_map(|prompt| Request::samples(prompt.id, &prompt.ids, 2)).collect();
        let rows: Vec<&Prompt> = self.prompts.iter().flat_map(|prompt| [prompt, prompt]).collect();
        let random = Random::new(1, Purpose::Sampling);
        let generator = Generator { hook: Some(&Commands), ..Generator::new(&sampling, batch_size, random) };
        play(&generator, &self.decoder, &self.tokenizer, self.world(), &requests, &rows, |_| {}).unwrap()
    }
}

/// Without a judge, the environment's own reward chooses among the episodes of a problem.
#[test]
fn the_best_of_several_episodes_is_the_one_that_pays_most() {
    let setup = setup();
    let sampling = SamplingOptions { max_new_tokens: 400, ..SamplingOptions::default() };
    let options = TestTimeOptions { strategy: Strategy::BestOfN, samples: 4, sampling, seed: 1, ..Default::default() };
    let model = Answerer { decoder: &setup.decoder, tokenizer: &setup.tokenizer, world: Some(setup.world()) };
    let found = answer_at_test_time(model, &setup.prompts, None, &Silent, &options, |_, _| ()).unwrap();

    let requests: Vec<Request> =
        setup.prompts.iter().flat_map(|prompt| Request::samples(prompt.id, &prompt.ids, 4)).collect();
    let rows: Vec<&Prompt> = setup.prompts.iter().flat_map(|prompt| [prompt; 4]).collect();
    let generator = Generator::new(&options.sampling, 7, Random::new(1, Purpose::Sampling));
    let played = play(&generator, &setup.decoder, &setup.tokenizer, setup.world(), &requests, &rows, |_| {}).unwrap();
    for (sample, episodes) in found.evaluation.samples.iter().zip(played.chunks(4)) {
        let paid = |sample: usize| episodes[sample].trace.score().value;
        let most = (0..4).map(paid).fold(f64::NEG_INFINITY, f64::max);
        assert_eq!(sample.score.as_ref().unwrap().value, most);
        assert_eq!(paid(sample.sample as usize), most);
        assert_eq!(sample.length, episodes[sample.sample as usize].episode.completion.len());
    }
    let search = TestTimeOptions { strategy: Strategy::Mcts, ..options };
    let error = answer_at_test_time(model, &setup.prompts, None, &Silent, &search, |_, _| ()).unwrap_err().to_string();
    assert!(error.contains("expected best_of_n, majority or weighted_vote"), "{error}");
}

#[test]
fn a_played_episode_is_the_one_that_its_turns_lead_to() {
    let setup = setup();
    let played = setup.play(5);
    assert_eq!(played, setup.play(32));
    let mut world = setup.environment.build().unwrap();
    let mut won = 0;
    for (index, Played { episode, trace }) in played.iter().enumerate() {
        let prompt = &setup.prompts[index / 2];
        world.reset(EpisodeId { seed: 4, split: Split::Train, index: index as u64 / 2 });
        let mut again = Trace::default();
        let mut messages = prompt.messages.clone().unwrap();
        for turn in &episode.turns {
            let text = setup.tokenizer.decode(&episode.completion[turn.tokens.clone()]);
            let transition = world.step(&text);
            again.push(&transition);
            messages.push(model::chat::Message::assistant(&text));
            if !transition.done {
                messages.extend(transition.observations.iter().map(|text| model::chat::Message::user(text)));
            }
        }
        assert_eq!(again, *trace);
        assert!(trace.done && episode.finish == Finish::Stop);
        let transcript = episode.transcript.as_ref().unwrap();
        assert_eq!(transcript.fidelity, Fidelity::Tokens);
        assert_eq!(transcript.text, setup.tokenizer.decode_with_special(&episode.completion));
        let whole = setup.template.encode(&setup.tokenizer, &messages, None, false).unwrap();
        assert!(whole.starts_with(&[&episode.prompt[..], &episode.completion].concat()));
        won += usize::from(trace.score().status == Status::Ok);
    }
    assert!(won > 0 && won < played.len(), "{won} of {}", played.len());
}

#[test]
fn scores_are_the_rewards_and_what_a_further_reward_adds() {
    let setup = setup();
    let played = setup.play(8);
    let traces = || played.iter().map(|played| &played.trace);
    let alone = scores("text_game", traces(), vec![None; played.len()]);
    for (Played { trace, .. }, score) in played.iter().zip(&alone) {
        let score = score.as_ref().unwrap();
        assert_eq!((score.value, score.status), (trace.score().value, trace.score().status));
        assert_eq!(score.turns.len(), trace.turns.len());
        assert_eq!(score.parts, [("text_game".to_owned(), score.value)]);
    }
    let further = Score { parts: vec![("length".into(), -1.0)], ..Score::new(-2.0, Status::Wrong) };
    let both = scores("text_game", traces(), vec![Some(further); played.len()]);
    for (alone, both) in alone.iter().zip(both) {
        let (alone, both) = (alone.as_ref().unwrap(), both.unwrap());
        assert_eq!((both.value, both.status), (alone.value - 2.0, alone.status));
        assert_eq!(both.turns, alone.turns);
        assert_eq!(both.parts[1].0, "length");
    }
}

#[test]
fn a_model_is_measured_on_held_out_episodes() {
    let setup = setup();
    let options = EvaluateOptions {
        sampling: SamplingOptions { max_new_tokens: 60, temperature: 1.0, ..SamplingOptions::default() },
        samples: 2,
        ..EvaluateOptions::default()
    };
    let Setup { decoder, tokenizer, prompts, .. } = &setup;
    let found = evaluate_in(setup.world(), decoder, tokenizer, prompts, &Silent, &options, |_, _| {}).unwrap();
    assert_eq!(found.samples.len(), 24);
    assert_eq!(found.correct.len(), 12);
    assert!(found.samples.iter().all(|sample| sample.text.contains("<|im_start|>user")), "the world's part is shown");
    let empty = evaluate_in(setup.world(), decoder, tokenizer, &[], &Silent, &options, |_, _| {});
    assert!(matches!(empty, Err(EvaluateError::Empty { prompts: 0, samples: 2 })));

    let mut prompts = setup.prompts.clone();
    prompts[1].columns.remove("episode");
    let error = evaluate_in(setup.world(), decoder, tokenizer, &prompts, &Silent, &options, |_, _| {}).unwrap_err();
    assert!(matches!(error, EvaluateError::Play(PlayError::Row { .. })));
    assert_eq!(error.to_string(), "games, row 2: the row has no column \"episode\" with an episode's numbers");
    assert!(error.hint().unwrap().contains("[environment]"));
    let number = RewardConfig::new(RewardKind::Number(NumberOptions { column: "no".into(), ..Default::default() }));
    let reward = Weighted::from_configs(&[number]).unwrap();
    let prompts = &setup.prompts;
    let error = evaluate_in(setup.world(), decoder, tokenizer, prompts, &reward, &options, |_, _| {});
    assert!(error.unwrap_err().to_string().contains("has no column \"no\""));
}
