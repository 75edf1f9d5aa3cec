//! What the audit finds in rows with planted faults, and that it leaves sound ones alone.

use std::path::Path;

use model::chat::ChatTemplate;
use model::tokenizer::Tokenizer;
use posttrain_data::RenderOptions;
use posttrain_data::audit::tokens::pieces;
use posttrain_data::audit::{Audit, Check, Rows, Setting, Severity, audit};
use posttrain_data::read::jsonl;
use posttrain_data::render::{LossTokens, Overlong, Use};
use proptest::prelude::*;
use serde_json::{Value, json};

/// An audit of rows with the byte-level tokenizer and ChatML, in a context of 200 tokens.
struct Auditor {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    rendering: RenderOptions,
    used: Vec<Use<'static>>,
    held_out: Vec<Use<'static>>,
}

impl Default for Auditor {
    fn default() -> Self {
        let (tokenizer, template) = (Tokenizer::bytes().unwrap(), ChatTemplate::chatml().unwrap());
        let (used, held_out) = (vec![Use::Learn], vec![Use::Answer]);
        Self { tokenizer, template, rendering: RenderOptions::default(), used, held_out }
    }
}

impl Auditor {
    fn audit(&self, train: &[Value], test: &[Value]) -> Audit {
        let lines = |rows: &[Value]| rows.iter().map(|row| format!("{row}\n")).collect::<String>();
        self.audit_lines(&lines(train), "", &lines(test))
    }

    fn audit_lines(&self, train: &str, forget: &str, test: &str) -> Audit {
        let read = |text: &str, name: &str| jsonl::parse_each(text.as_bytes(), Path::new(name)).collect();
        let (train, forget, test) =
            (read(train, "train.jsonl"), read(forget, "forget.jsonl"), read(test, "test.jsonl"));
        let rows = Rows { train, generated: Vec::new(), forget, test };
        let setting = Setting {
            tokenizer: &self.tokenizer,
            template: Some(&self.template),
            context: 200,
            answer: 20,
            held_out_answer: 50,
            rendering: &self.rendering,
            used: &self.used,
            held_out: &self.held_out,
        };
        audit(rows, setting, 2)
    }
}

/// The checks that found something, and where.
fn found(audit: &Audit) -> Vec<(Check, String)> {
    let place = |at: &Option<posttrain_data::Source>| at.as_ref().map_or(String::new(), ToString::to_string);
    audit.findings.iter().map(|finding| (finding.check, place(&finding.at))).collect()
}

fn at(check: Check, row: u64) -> (Check, String) {
    (check, format!("train.jsonl, row {row}"))
}

fn pair(prompt: &str, completion: &str) -> Value {
    json!({"prompt": prompt, "completion": completion})
}

#[test]
fn sound_rows_are_left_alone() {
    let conversation = |question: &str, answer: &str| json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]});
    let test = [json!({"prompt": "what else", "answer": "3"})];
    for train in [
        vec![pair("one", " 1"), pair("two", " 2")],
        vec![conversation("one", "1"), conversation("two", "2")],
        vec![json!({"text": "one two"}), json!({"text": "three"})],
        vec![json!({"prompt": "a", "chosen": "b", "rejected": "c"})],
        vec![json!({"prompt": "a", "completion": "b", "label": true})],
        vec![json!({"prompt": "a", "completions": ["b", "c"], "labels": [true, false]})],
        vec![json!({"input_ids": [1, 2, 257]})],
    ] {
        let audit = Auditor::default().audit(&train, &test);
        assert_eq!(found(&audit), [], "{train:?}");
        assert_eq!((audit.train, audit.test), (train.len(), 1));
    }
}

#[test]
fn every_bad_row_is_named_and_the_others_are_still_looked_at() {
    let lines = "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \n[1]\n\
                 {\"prompt\": \"a\", \"completion\": 3}\n{\"text\": \"c\"}\n{\"prompt\": \"d\", \"completion\": \"e\"}\n";
    let audit = Auditor::default().audit_lines(lines, "", "");
    assert_eq!(
        found(&audit),
        [
            at(Check::Unusable, 2),
            at(Check::Unusable, 3),
            at(Check::Unusable, 4),
            at(Check::MixedTypes, 5),
            at(Check::MixedColumn, 4)
        ]
    );
    assert_eq!(audit.findings[2].detail, "column completion: expected a string or a list of messages, got a number");
    assert_eq!((audit.count(Severity::Error), audit.count(Severity::Warning), audit.tokens.count), (4, 1, 2));
}

#[test]
fn the_mask_is_shown_in_pieces() {
    let row = json!({"messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "é"},
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "b", "weight": 0},
    ]});
    let auditor = Auditor::default();
    let audit = auditor.audit(&[row], &[]);
    let [specimen] = audit.specimens.as_slice() else { panic!("one row") };
    let shown = pieces(&auditor.tokenizer, &specimen.sequences[0]);
    let text = |learnt: bool| shown.iter().filter(|p| p.learnt == learnt).map(|p| p.text.as_str()).collect::<Vec<_>>();
    assert_eq!(text(true), ["é<|im_end|>"]);
    assert_eq!(text(false), ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"]);
    assert_eq!((audit.learnt.max, audit.given.max + audit.learnt.max), (3, audit.tokens.max));
}

#[test]
fn ends_that_are_not_learnt_are_errors() {
    let row = json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]});
    let template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}";
    let auditor = Auditor { template: ChatTemplate::new(template, "", "").unwrap(), ..Auditor::default() };
    let checks = [at(Check::MissingEos, 1), at(Check::NoGenerationPrompt, 1)];
    assert_eq!(found(&auditor.audit(std::slice::from_ref(&row), &[])), checks);
    let everything = RenderOptions { loss: LossTokens::All, ..RenderOptions::default() };
    assert_eq!(found(&Auditor { rendering: everything, ..Auditor::default() }.audit(&[row], &[])), []);
    // Tokens may be a piece of a longer text.
    let audit = Auditor::default().audit(&[json!({"input_ids": [1, 2, 3]})], &[]);
    assert_eq!((found(&audit), audit.count(Severity::Error)), (vec![at(Check::MissingEos, 1)], 0));
}

#[test]
fn nothing_to_learn_is_a_warning() {
    let audit = Auditor::default().audit(&[pair("a", "b"), json!({"prompt": "a", "completion": "b"})], &[]);
    assert_eq!(found(&audit), [at(Check::Duplicate, 2)]);
    let masked = json!({"input_ids": [1, 2], "labels": [-100, -100]});
    let audit = Auditor::default().audit(&[json!({"input_ids": [1, 257]}), masked], &[]);
    assert_eq!(found(&audit), [at(Check::NothingToLearn, 2)]);
    assert_eq!(audit.count(Severity::Error), 0);
}

#[test]
fn long_rows_are_told_by_what_happens_to_them() {
    let rows = [pair("a", "b"), pair("c", &"d".repeat(300)), pair(&"e".repeat(300), "f")];
    let with = |overlong| {
        let rendering = RenderOptions { overlong, ..RenderOptions::default() };
        Auditor { rendering, ..Auditor::default() }.audit(&rows, &[])
    };
    let dropped = with(Overlong::Drop);
    assert_eq!(found(&dropped), [at(Check::TooLong, 2), at(Check::TooLong, 3)]);
    assert_eq!((dropped.limit, dropped.tokens.max, dropped.count(Severity::Error)), (200, 302, 0));
    assert_eq!(found(&with(Overlong::Truncate)), [at(Check::TooLong, 3), at(Check::TruncatedCompletion, 2)]);
    assert_eq!(with(Overlong::Error).count(Severity::Error), 2);
    // An answer needs room behind a prompt.
    let prompts = Auditor { used: vec![Use::Answer], ..Auditor::default() };
    let audit = prompts.audit(&[json!({"prompt": "p".repeat(180)}), json!({"prompt": "q".repeat(181)})], &[]);
    assert_eq!(found(&audit), [at(Check::TooLong, 2)]);
}

#[test]
fn repeats_and_leaks_are_found_across_files() {
    let long = |name: &str| {
        format!("{name} walked down to the harbour in the early morning and counted all the ships that lay there")
    };
    let train =
        [pair(&long("Ann"), "7"), pair("x", "y"), pair(&long("Ann"), "7"), pair("X ", "y!"), pair(&long("Ben"), "8")];
    let test = [json!({"prompt": "x"}), json!({"prompt": long("Eve")}), json!({"prompt": "z"})];
    let audit = Auditor::default().audit(&train, &test);
    let test_row = |check, row: u64| (check, format!("test.jsonl, row {row}"));
    let expected = [test_row(Check::Leak, 1), test_row(Check::Overlap, 2), at(Check::Duplicate, 3)];
    assert_eq!(found(&audit), expected, "{:#?}", audit.findings);
    assert_eq!(audit.findings[0].detail, "train.jsonl, row 2 has the same prompt");
    assert_eq!(audit.count(Severity::Error), 1);
}

#[test]
fn pairs_of_equal_completions_are_found() {
    let rows = [
        json!({"prompt": "a", "chosen": "b", "rejected": "b"}),
        json!({"prompt": "a", "chosen": "b", "rejected": "c"}),
    ];
    assert_eq!(found(&Auditor::default().audit(&rows, &[])), [at(Check::EqualPair, 1)]);
}

#[test]
fn columns_are_counted_with_their_types() {
    let rows: Vec<Value> = (0..20)
        .map(|i| json!({"prompt": format!("p{i}"), "answer": if i == 7 { json!(7) } else { json!("7") }}))
        .collect();
    let mut rows = rows;
    rows[3].as_object_mut().unwrap().remove("answer");
    let audit = Auditor { used: vec![Use::Answer], ..Auditor::default() }.audit(&rows, &[]);
    assert_eq!(found(&audit), [at(Check::MixedColumn, 8), at(Check::MissingValue, 4)]);
    let answer = audit.columns.iter().find(|column| column.name == "answer").unwrap();
    let types: Vec<(&str, usize)> = answer.types.iter().map(|seen| (seen.name, seen.rows)).collect();
    assert_eq!((answer.rows, types), (19, vec![("a string", 18), ("a number", 1)]));
}

#[test]
fn rows_are_looked_at_as_they_are_used() {
    let rows = [pair("a", "b"), pair(&"c".repeat(190), "d")];
    let used = |used: &[Use<'static>]| {
        let audit = Auditor { used: used.to_vec(), ..Auditor::default() }.audit(&rows, &[]);
        (found(&audit), audit.findings.first().map(|finding| finding.detail.clone()).unwrap_or_default())
    };
    assert_eq!(used(&[Use::Learn]).0, []);
    // What is not a pair is not compared, and what has no score is not learnt.
    for (wrong, expected) in [
        (Use::Compare, "expected preference, got a prompt-completion row"),
        (Use::Judge, "expected unpaired preference or preference, got a prompt-completion row"),
        (Use::Score, "score: missing"),
        (Use::Steps("\n"), "expected stepwise supervision, got a prompt-completion row"),
    ] {
        let (found, detail) = used(&[wrong]);
        assert_eq!(found, [at(Check::Unusable, 1), at(Check::Unusable, 2)], "{wrong:?}");
        assert!(detail.ends_with(expected), "{detail}");
        assert_eq!(used(&[Use::Imitate, wrong]).0.len(), 2, "{wrong:?} in a later stage");
    }
    // Imitated it fits; answered in a later stage, there is no room behind the prompt.
    assert_eq!(used(&[Use::Imitate, Use::Answer]).0, [at(Check::TooLong, 2)]);
    let pairs = [json!({"prompt": "a", "chosen": "b", "rejected": "c".repeat(300)})];
    let audit = Auditor { held_out: vec![Use::Compare], ..Auditor::default() }.audit(&rows[..1], &pairs);
    assert!(found(&audit).contains(&(Check::TooLong, "test.jsonl, row 1".to_owned())), "{:?}", found(&audit));
}

#[test]
fn rows_to_forget_are_looked_at_too() {
    let audit =
        Auditor::default().audit_lines("", "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"c\"}\n[]\n", "");
    let row = |check, row: u64| (check, format!("forget.jsonl, row {row}"));
    assert_eq!(found(&audit), [row(Check::Unusable, 3), row(Check::MixedTypes, 2)]);
    assert_eq!((audit.train, audit.forget, audit.test), (0, 2, 0));
}

/// Everything that rows are used for.
const USES: [Use<'static>; 7] =
    [Use::Learn, Use::Answer, Use::Imitate, Use::Compare, Use::Judge, Use::Score, Use::Steps(" ")];

proptest! {
    #[test]
    fn no_lines_make_it_panic(lines in prop::collection::vec(line(), 0..8), used in prop::sample::subsequence(USES.to_vec(), 1..=USES.len())) {
        let auditor = Auditor { held_out: used.clone(), used, ..Auditor::default() };
        let text = lines.join("\n");
        let audit = auditor.audit_lines(&text, &text, &text);
        for sequence in audit.specimens.iter().flat_map(|specimen| &specimen.sequences) {
            let shown: String = pieces(&auditor.tokenizer, sequence).into_iter().map(|piece| piece.text).collect();
            prop_assert_eq!(shown, auditor.tokenizer.decode_with_special(&sequence.ids));
        }
    }
}

/// A row of one type or another, or none.
fn line() -> impl Strategy<Value = String> {
    ("[a-z<|>_é ]{0,12}", 0..9usize).prop_map(|(text, kind)| match kind {
        0 => json!({"text": text}).to_string(),
        1 => json!({"prompt": text, "completion": text}).to_string(),
        2 => json!({"prompt": text, "chosen": text, "rejected": "x"}).to_string(),
        3 => json!({"prompt": text, "completions": [text, "b"], "labels": [true, false]}).to_string(),
        4 => {
            json!({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}).to_string()
        }
        5 => json!({"input_ids": [1, 2, 300], "labels": [-100, 2, 5]}).to_string(),
        6 => json!({"prompt": [{"role": text, "content": null}]}).to_string(),
        7 => json!({"prompt": text, "completion": text, "label": 1}).to_string(),
        _ => text,
    })
}
