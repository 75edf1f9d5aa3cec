//! The generator on a real model, SmolLM2-135M-Instruct.

use std::sync::Arc;

use base::{Purpose, Random};
use kernels::Precision;
use model::chat::Message;
use model::decoder::Decoder;
use model::{hub, source};
use posttrain_rollout::{Finish, Generator, Request, SamplingOptions};

use crate::common;

const NAME: &str = "smollm2-135m-instruct";

#[test]
fn it_knows_paris_and_its_log_probs_are_the_trainers() {
    if hub::cached(NAME).is_none() {
        println!("skipped: {NAME} is not cached");
        return;
    }
    let loaded = source::load(NAME, &mut |_| {}).unwrap();
    let tokenizer = &loaded.tokenizer;
    let mut decoder = Decoder::new(loaded.config, loaded.weights.unwrap()).unwrap();
    let template = loaded.chat_template.unwrap();
    let ask = |question: &str| -> Arc<[u32]> {
        template.encode(tokenizer, &[Message::user(question)], None, true).unwrap().into()
    };
    let random = Random::new(1, Purpose::Sampling);

    decoder.prepare(Precision::F32);
    let paris: Vec<Request> = Request::samples(0, &ask("What is the capital of France?"), 1).collect();
    let greedy = SamplingOptions::greedy(32);
    let answer = &Generator::new(&greedy, 16, random).generate(&decoder, tokenizer, &paris, |_| {}).unwrap()[0];
    assert!(answer.text.contains("Paris"), "{:?}", answer.text);
    assert_eq!(answer.finish, Finish::Stop);

    let prompts = [ask("What is 7 + 5?"), ask("Name a colour that begins with the letter r.")];
    let requests: Vec<Request> = prompts
        .iter()
        .enumerate()
        .flat_map(|(id, prompt)| Request::samples(id as u32, prompt, 8).collect::<Vec<_>>())
        .collect();
    let options = SamplingOptions { temperature: 0.9, top_p: 0.98, max_new_tokens: 12, ..SamplingOptions::default() };
    for precision in [Precision::F32, Precision::Bf16] {
        decoder.prepare(precision);
        let together = Generator::new(&options, 16, random).generate(&decoder, tokenizer, &requests, |_| {}).unwrap();
        let alone = Generator::new(&options, 1, random).generate(&decoder, tokenizer, &requests[6..9], |_| {}).unwrap();
        assert_eq!(together[6..9], alone, "{precision:?}: alone as in a batch of 16");
        let trainer = common::trainer_log_probs(&decoder, &together, options.log_prob_temperature(), true);
        for (episode, trainer) in together.iter().zip(trainer) {
            assert_eq!(common::bits(&episode.log_probs), common::bits(&trainer), "{precision:?}");
        }
    }
}
