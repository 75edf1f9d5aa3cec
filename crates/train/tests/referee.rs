//! The referee: quiet where nothing goes wrong, and right about what does.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;

use base::{Purpose, Random};
use envs::{Answer, Reward, RewardError, Score, Status};
use posttrain_train as train;
use train::methods::policy::PolicyOptions;
use train::methods::sft::SftOptions;
use train::metrics::Metrics;
use train::options::{RunOptions, TrainingOptions};
use train::referee::{Action, Alarm, Referee, RefereeOptions, Watch};
use train::{Event, Observer, Outcome};

use crate::common::{Setup, assert_same, metrics};

const VERIFIER: &str = "rewards/gold/mean";

fn options() -> RefereeOptions {
    RefereeOptions { verifier: Some(VERIFIER.into()), ..Default::default() }
}

/// A made-up stage: what a healthy step of 64 answers logs, with noise.
struct Stage {
    run: u32,
    reward: fn(f64) -> f64,
    gold: fn(f64) -> f64,
    entropy: fn(f64) -> f64,
    zero: fn(f64) -> f64,
    length: fn(f64) -> f64,
    correlation: fn(f64) -> f64,
    kl: fn(f64) -> f64,
    difference: fn(f64) -> f64,
}

impl Stage {
    /// Rewards rise with the verifier, entropy falls to a third, answers become shorter.
    fn healthy(run: u32) -> Self {
        let learnt = |step: f64| 0.2 + 0.7 * (1.0 - (-step / 60.0).exp());
        Self {
            run,
            reward: learnt,
            gold: learnt,
            entropy: |step| 0.4 + 0.8 * (-step / 50.0).exp(),
            zero: |step| 0.2 + 0.5 * (1.0 - (-step / 60.0).exp()),
            length: |step| 40.0 - 10.0 * (1.0 - (-step / 60.0).exp()),
            correlation: |_| -0.1,
            kl: |step| 0.1 * (1.0 - (-step / 60.0).exp()),
            difference: |_| 0.0,
        }
    }

    fn step(&self, step: u32) -> Metrics {
        let noise =
            |position: u32, scale: f64| scale * Random::new(self.run.into(), Purpose::Test).step(step).normal(position);
        let mean = |position: u32, value: f64| {
            (value + noise(position, (value * (1.0 - value) / 64.0).max(0.0).sqrt())).clamp(0.0, 1.0)
        };
        let at = |value: fn(f64) -> f64| value(f64::from(step));
        let mut metrics = Metrics::new();
        metrics.set("step", f64::from(step));
        metrics.set("reward", at(self.reward) + noise(0, 0.06));
        metrics.set("reward_std", 0.4);
        metrics.set(VERIFIER, mean(1, at(self.gold)));
        metrics.set("status/ok", mean(1, at(self.gold)));
        metrics.set("entropy", (at(self.entropy) + noise(2, 0.05)).max(0.0));
        metrics.set("frac_reward_zero_std", mean(3, at(self.zero)));
        metrics.set("completions/mean_length", (at(self.length) + noise(4, 3.0)).max(0.0));
        metrics.set("completions/length_reward_correlation", (at(self.correlation) + noise(5, 0.2)).clamp(-1.0, 1.0));
        metrics.set("kl", (at(self.kl) + noise(6, 0.02)).max(0.0));
        metrics.set("sampling/sampling_logp_difference/mean", at(self.difference));
        metrics
    }

    fn alarms(&self, options: &RefereeOptions, steps: u32) -> Vec<Alarm> {
        let mut referee = Referee::new(options);
        (1..=steps).flat_map(|step| referee.see(&self.step(step)).1).collect()
    }
}

#[test]
fn healthy_stages_are_left_alone() {
    for options in [options(), RefereeOptions { verifier: None, ..options() }] {
        let alarms: Vec<Alarm> = (0..100).flat_map(|run| Stage::healthy(run).alarms(&options, 300)).collect();
        // One stage in a hundred may have one.
        assert!(alarms.len() <= 1, "{alarms:#?}");
    }
}

#[test]
fn every_fault_is_found_and_named() {
    let healthy = || Stage::healthy(1);
    let stuck: fn(f64) -> f64 = |_| 0.3;
    let faults: Vec<(Watch, Stage)> = vec![
        (
            Watch::Entropy,
            Stage { gold: stuck, reward: stuck, entropy: |step| if step > 100.0 { 0.01 } else { 0.5 }, ..healthy() },
        ),
        (
            Watch::Advantages,
            Stage { gold: stuck, reward: stuck, zero: |step| if step > 100.0 { 1.0 } else { 0.3 }, ..healthy() },
        ),
        (
            Watch::Length,
            Stage { gold: stuck, reward: stuck, length: |step| if step > 100.0 { 200.0 } else { 40.0 }, ..healthy() },
        ),
        (
            Watch::LengthReward,
            Stage {
                gold: stuck,
                reward: stuck,
                correlation: |step| if step > 100.0 { 0.95 } else { 0.0 },
                ..healthy()
            },
        ),
        (Watch::Drift, Stage { kl: |step| if step > 100.0 { 3.0 } else { 0.05 }, ..healthy() }),
        (Watch::Mismatch, Stage { difference: |step| if step > 100.0 { 0.5 } else { 0.0 }, ..healthy() }),
        (Watch::Verifier, Stage { gold: |step| if step > 100.0 { 0.1 } else { 0.6 }, ..healthy() }),
        (Watch::Reward, Stage { gold: stuck, reward: |step| if step > 100.0 { 3.0 } else { 0.3 }, ..healthy() }),
    ];
    for (watch, stage) in faults {
        // A share of 1 is little more than one of 0.9, a correlation of 0.95 than one of 0.6: it takes longer to be sure.
        let latest = match watch {
            Watch::Advantages => 270,
            Watch::LengthReward => 210,
            _ => 150,
        };
        let alarms = stage.alarms(&options(), latest);
        let [alarm] = alarms.as_slice() else { panic!("{watch:?}: {alarms:#?}") };
        assert_eq!(alarm.watch, watch);
        assert!((101..=u64::from(latest)).contains(&alarm.step), "{alarm}");
        assert!((90..=alarm.step).contains(&alarm.since), "{alarm}");
        assert!(alarm.odds >= alarm.needed && alarm.needed == 800.0, "{alarm}");
        let text = alarm.to_string();
        assert!(text.contains(&alarm.metric) && text.contains(&format!("step {}", alarm.step)), "{text}");
        println!("{text}");
    }
}

#[test]
fn better_answers_may_be_longer_and_solved_tasks_may_be_certain() {
    let better = Stage { length: |step| 40.0 + step, correlation: |_| 0.5, ..Stage::healthy(3) };
    assert_eq!(better.alarms(&options(), 300), []);
    let solved = Stage {
        gold: |step| (0.3 + step / 100.0).min(1.0),
        entropy: |step| (1.0 - step / 80.0).max(0.0),
        zero: |step| (step / 80.0).min(1.0),
        ..Stage::healthy(3)
    };
    assert_eq!(solved.alarms(&options(), 300), []);
}

#[test]
fn a_referee_who_is_off_says_nothing() {
    let fault = Stage { kl: |_| 9.0, ..Stage::healthy(0) };
    assert_eq!(fault.alarms(&RefereeOptions { action: Action::Off, ..options() }, 100), []);
}

/// Pays for length. Whether the answer is right is measured, and not paid.
struct PaidByLength;

impl Reward for PaidByLength {
    fn name(&self) -> &str {
        "length"
    }

    fn score(&self, answers: &[Answer<'_>]) -> Result<Vec<Option<Score>>, RewardError> {
        let score = |answer: &Answer<'_>| {
            let right = answer.columns["answer"] == answer.completion;
            let parts = vec![("gold".to_owned(), f64::from(u8::from(right)))];
            Some(Score { parts, ..Score::new(answer.completion_ids.len() as f64, Status::Ok) })
        };
        Ok(answers.iter().map(score).collect())
    }
}

/// Learns the task from examples, then is paid for length.
fn hacked(action: Action) -> Setup {
    Setup {
        sft: Some(SftOptions {
            batch_size: 25,
            training: TrainingOptions {
                max_steps: Some(40),
                learning_rate: 3e-3,
                warmup_ratio: 0.1,
                ..Default::default()
            },
            ..Default::default()
        }),
        grpo: Some(PolicyOptions {
            prompts_per_step: 8,
            num_generations: 8,
            sampling: rollout::SamplingOptions { max_new_tokens: 12, ..Default::default() },
            training: TrainingOptions { max_steps: Some(100), learning_rate: 1e-3, ..Default::default() },
            ..Default::default()
        }),
        options: RunOptions { save_steps: 10, eval_on_start: false, episode_steps: 0, ..Default::default() },
        referee: RefereeOptions { action, ..options() },
        reward: || Box::new(PaidByLength),
        evaluate: false,
        ..Setup::short()
    }
}

#[test]
fn a_planted_reward_hack_stops_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let setup = hacked(Action::Stop);
    let Outcome::Stopped { alarm } = setup.run(&run, false, &mut (), &AtomicBool::new(false)).unwrap() else {
        panic!("no alarm: {:#?}", metrics(&run).last())
    };
    println!("{alarm}");
    assert!(matches!(alarm.watch, Watch::Verifier | Watch::Reward | Watch::Length | Watch::LengthReward), "{alarm}");
    let ([reward, paid], [gold, fell]) = (alarm.reward.unwrap(), alarm.verifier.unwrap());
    assert!(paid > reward && fell <= gold, "{alarm}");
    assert!(alarm.step < 40 + 80, "{alarm}");
    // Everything is saved in the step of the alarm, and the evidence is in the metrics.
    assert!(run.join(format!("checkpoint-{}", alarm.step)).is_dir());
    let last = metrics(&run).pop().unwrap();
    assert_eq!(last["step"], alarm.step);
    assert!(last[&format!("referee/{}", alarm.watch.name())].as_f64().unwrap() >= 1.0);
}

/// Alarms that are certain: the policy leaves its reference by more than nothing.
fn certain(action: Action) -> Setup {
    let mut setup = Setup {
        options: RunOptions { save_steps: 2, save_total_limit: 2, ..Default::default() },
        evaluate: false,
        ..Setup::short()
    };
    setup.grpo.as_mut().unwrap().training.max_steps = Some(14);
    setup.referee = RefereeOptions {
        action,
        false_alarm_rate: 0.9,
        window: 2,
        kl_limit: 1e-9,
        max_rollbacks: 2,
        ..Default::default()
    };
    setup
}

/// Dies at the n-th event, and remembers where it went back to.
struct Witness {
    left: usize,
    back: Vec<u64>,
    alarms: Vec<u64>,
}

impl Observer for Witness {
    fn observe(&mut self, event: Event<'_>) {
        if let Event::GoneBack { step, .. } = event {
            self.back.push(step);
        }
        if let Event::Alarm { alarm } = event {
            self.alarms.push(alarm.step);
        }
        self.left -= 1;
        assert!(self.left > 0, "killed");
    }
}

impl Witness {
    fn after(left: usize) -> Self {
        Self { left, back: Vec::new(), alarms: Vec::new() }
    }
}

#[test]
fn going_back_is_deterministic_and_survives_being_killed_anywhere() {
    let setup = certain(Action::Rollback);
    let folder = tempfile::tempdir().unwrap();
    let (whole, died) = (folder.path().join("whole"), folder.path().join("died"));
    // To the end: after two rollbacks the third alarm stops the run, which is then taken up again.
    let finish = |run: &std::path::Path, lives: &mut dyn Iterator<Item = usize>| {
        let mut witnesses = Vec::new();
        for left in lives {
            let mut witness = Witness::after(left);
            let life = || setup.run(run, run.exists(), &mut witness, &AtomicBool::new(false));
            let end = catch_unwind(AssertUnwindSafe(life));
            witnesses.push(witness);
            if let Ok(outcome) = end
                && let Outcome::Finished(summary) = outcome.unwrap()
            {
                return (witnesses, summary);
            }
        }
        panic!("did not finish");
    };
    let (witnesses, summary) = finish(&whole, &mut std::iter::repeat_n(usize::MAX, 3));
    assert_eq!((witnesses.len(), witnesses[0].back.len(), summary.rollbacks), (2, 2, 2), "{:?}", witnesses[0].back);
    for (back, alarm) in witnesses[0].back.iter().zip(&witnesses[0].alarms) {
        assert!(*back > 3 && back < alarm && back % 2 == 0, "{back} before {alarm}");
    }
    let rates: Vec<f64> =
        metrics(&whole).iter().filter_map(|line| line.get("referee/learning_rate_factor")?.as_f64()).collect();
    assert_eq!(rates.last(), Some(&0.25));
    assert!(summary.alarms.len() >= 3, "{:?}", summary.alarms);

    let (witnesses, _) = finish(&died, &mut (1..).map(|life| 2 + 5 * life));
    assert!(witnesses.len() > 5, "{} lives are not much of a test", witnesses.len());
    assert_same(&whole, &died, "killed again and again");
}

#[test]
fn warning_changes_nothing_but_what_is_written_down() {
    let folder = tempfile::tempdir().unwrap();
    let run = |action| {
        let path = folder.path().join(format!("{action:?}"));
        (certain(action).finish(&path), path)
    };
    let ((warned, with), (silent, without)) = (run(Action::Warn), run(Action::Off));
    assert!(!warned.alarms.is_empty() && silent.alarms.is_empty());
    let weights = |path: &std::path::Path| std::fs::read(path.join("final/model.safetensors")).unwrap();
    assert!(weights(&with) == weights(&without));
    for (a, b) in metrics(&with).iter().zip(&metrics(&without)) {
        let mut a = a.clone();
        a.retain(|name, _| !name.starts_with("referee/"));
        assert_eq!(&a, b);
    }
}
