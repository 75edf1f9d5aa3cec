//! Reading and recognising rows.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use base::Hint;
use model::chat::Message;
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, Int64Type};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use posttrain_data::sample::Content;
use posttrain_data::{Error, Kind, Row, Sample, Source, Text, read, sample};
use proptest::prelude::*;
use serde_json::{Value, json};

fn row(columns: Value) -> Row {
    let Value::Object(columns) = columns else { panic!("an object") };
    Row { source: Source::new("train.jsonl", 7), columns }
}

fn parsed(columns: Value) -> Sample {
    sample::parse_row(row(columns)).unwrap()
}

fn refused(columns: Value) -> (String, String) {
    let error = sample::parse_row(row(columns)).unwrap_err();
    (error.to_string(), error.hint().unwrap_or_default())
}

fn plain(text: &str) -> Text {
    Text::Plain(text.into())
}

#[test]
fn rankings_without_an_order_are_refused() {
    let row = |completions: Value, ranking: Value| {
        refused(json!({"prompt": "q", "completions": completions, "ranking": ranking})).0
    };
    let tied = row(json!(["a", "b", "c"]), json!([1, 2, 1]));
    assert_eq!(tied, "train.jsonl, row 7, column ranking: completions 0 and 2 are equal");
    let short = row(json!(["a", "b"]), json!([1]));
    assert_eq!(short, "train.jsonl, row 7, column ranking: expected one for each of 2 completions, got 1");
    assert_eq!(row(json!(["a"]), json!([1])), "train.jsonl, row 7, column completions: expected two or more, got 1");
    let text = row(json!(["a", "b"]), json!([1, "second"]));
    assert_eq!(text, "train.jsonl, row 7, column ranking[1]: expected a number, got a string");
}

#[test]
fn every_row_type_is_recognised_plain_and_conversational() {
    let user = json!([{"role": "user", "content": "q"}]);
    let assistant = json!([{"role": "assistant", "content": "a"}]);
    let both = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
    for (columns, kind) in [
        (json!({"text": "t"}), Kind::LanguageModeling),
        (json!({"messages": both}), Kind::LanguageModeling),
        (json!({"prompt": "q", "completion": "a"}), Kind::PromptCompletion),
        (json!({"prompt": user, "completion": assistant}), Kind::PromptCompletion),
        (json!({"prompt": user, "completion": "a"}), Kind::PromptCompletion),
        (json!({"prompt": "q", "answer": 4}), Kind::PromptOnly),
        (json!({"prompt": user}), Kind::PromptOnly),
        (json!({"prompt": "q", "chosen": "a", "rejected": "b"}), Kind::Preference),
        (json!({"prompt": user, "chosen": assistant, "rejected": "b"}), Kind::Preference),
        (json!({"prompt": "q", "completion": "a", "label": true}), Kind::UnpairedPreference),
        (json!({"prompt": user, "completion": assistant, "label": 0}), Kind::UnpairedPreference),
        (json!({"prompt": "q", "completions": ["a", "b"], "labels": [true, false]}), Kind::Stepwise),
        (json!({"input_ids": [1, 2], "labels": [-100, 2]}), Kind::Tokens),
        (json!({"text": null, "prompt": "q", "completion": null}), Kind::PromptOnly),
        (json!({"instruction": "i", "input": "", "output": "o"}), Kind::PromptCompletion),
        (json!({"instruction": "i"}), Kind::PromptOnly),
        (
            json!({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
            Kind::LanguageModeling,
        ),
    ] {
        assert_eq!(parsed(columns.clone()).content.kind(), kind, "{columns}");
    }
}

#[test]
fn imported_formats_become_messages() {
    let alpaca = parsed(json!({
        "system": "s", "history": [["q1", "a1"]], "instruction": "i", "input": "x", "output": "o"
    }));
    let prompt = vec![Message::system("s"), Message::user("q1"), Message::assistant("a1"), Message::user("i\nx")];
    let completion = Text::Messages(vec![Message::assistant("o")]);
    assert_eq!(alpaca.content, Content::PromptCompletion { prompt: Text::Messages(prompt), completion });

    let share_gpt = parsed(json!({"system": "s", "conversations": [
        {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "observation", "value": "o"}
    ]}));
    let messages = vec![Message::system("s"), Message::user("q"), Message::assistant("a"), Message::new("tool", "o")];
    assert_eq!(share_gpt.content, Content::LanguageModeling(Text::Messages(messages)));

    let verl = parsed(json!({
        "prompt": [{"role": "user", "content": "q"}], "data_source": "gsm8k", "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "42"}, "extra_info": {"index": 3}
    }));
    assert_eq!(verl.columns["answer"], "42");
    assert_eq!(verl.columns["extra_info"]["index"], 3);

    let Content::Preference { prompt, chosen, rejected, reference: None } =
        parsed(json!({"chosen": "Q: 1+1? A: 2", "rejected": "Q: 1+1? A: 3"})).content
    else {
        panic!("a preference")
    };
    assert_eq!((prompt, chosen, rejected), (plain("Q: 1+1? A:"), plain(" 2"), plain(" 3")));

    let tools = parsed(json!({"messages": [{"role": "user", "content": "q"}], "tools": "[{\"name\": \"f\"}]"})).tools;
    assert_eq!(tools, Some(vec![json!({"name": "f"})]));
}

#[test]
fn errors_name_the_row_the_column_and_what_was_expected() {
    for (columns, expected, advice) in [
        (json!({"promt": "q"}), "train.jsonl, row 7: no column tells what the row is; its columns are promt", "prompt"),
        (json!({"question": 1}), "train.jsonl, row 7: no column tells", "expected one of text"),
        (json!({"text": 4}), "train.jsonl, row 7, column text: expected a string, got a number", ""),
        (json!({"messages": {}}), "train.jsonl, row 7, column messages: expected a list, got an object", ""),
        (json!({"messages": []}), "train.jsonl, row 7, column messages: expected messages, got an empty list", ""),
        (
            json!({"messages": [{"role": "user", "content": "q"}, {"role": 3}]}),
            "train.jsonl, row 7, column messages[1].role: expected a string, got a number",
            "",
        ),
        (
            json!({"messages": [{"from": "human", "value": "q"}]}),
            "train.jsonl, row 7, column messages[0].role: missing",
            "conversations",
        ),
        (
            json!({"messages": [{"role": "user", "content": "q", "weight": 0.5}]}),
            "train.jsonl, row 7, column messages[0].weight: expected true or false, got 0.5",
            "",
        ),
        (json!({"promt": "q", "completion": "a"}), "train.jsonl, row 7, column prompt: missing", "did you mean promt?"),
        (json!({"prompt": "q", "chosen": "a"}), "train.jsonl, row 7, column rejected: missing", ""),
        (
            json!({"prompt": "q", "completions": ["a"], "labels": [true, false]}),
            "train.jsonl, row 7, column labels: expected one for each of 1 completions, got 2",
            "",
        ),
        (
            json!({"input_ids": [1, 2], "labels": [-100, 3]}),
            "train.jsonl, row 7, column labels[1]: expected -100 or the token itself (2), got 3",
            "",
        ),
        (json!({"input_ids": [1, -2]}), "train.jsonl, row 7, column input_ids[1]: expected a token id, got -2", ""),
        (
            json!({"conversations": [{"from": "martian", "value": "q"}]}),
            "train.jsonl, row 7, column conversations[0].from: expected human, gpt, system or tool, got \"martian\"",
            "",
        ),
        (
            json!({"prompt": "q", "completion": "a", "label": "good"}),
            "train.jsonl, row 7, column label: expected true or false, got a string",
            "",
        ),
    ] {
        let (message, hint) = refused(columns);
        assert!(message.starts_with(expected), "{message}\nexpected {expected}");
        assert!(hint.contains(advice), "{message}: {hint}");
    }
}

#[test]
fn rows_of_two_types_are_refused() {
    let second = Row { source: Source::new("train.jsonl", 8), ..row(json!({"prompt": "q"})) };
    let error = sample::parse(vec![row(json!({"text": "t"})), second]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "train.jsonl, row 8: a prompt-only row among language modeling rows (train.jsonl, row 7 is the first)"
    );
}

#[test]
fn files_folders_and_patterns_are_read_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    std::fs::create_dir(folder.path().join("part")).unwrap();
    std::fs::write(path("part/b.jsonl"), "{\"n\": 2}\r\n\n  \n{\"n\": 3}").unwrap();
    std::fs::write(path("a.jsonl"), "\u{feff}{\"n\": 1}\n").unwrap();
    std::fs::write(path("list.json"), "[{\"n\": 4}, {\"n\": 5}]").unwrap();
    std::fs::write(path(".hidden.jsonl"), "broken").unwrap();
    let numbers = |patterns: &[String]| {
        let rows = read(patterns, &BTreeMap::new())?;
        Ok::<_, Error>(rows.iter().map(|row| (row.columns["n"].as_u64().unwrap(), row.source.row)).collect::<Vec<_>>())
    };
    assert_eq!(numbers(&[path("")]).unwrap(), [(1, 1), (2, 1), (3, 4)]);
    assert_eq!(numbers(&[path("part/*.jsonl"), path("a.jsonl")]).unwrap(), [(2, 1), (3, 4), (1, 1)]);
    assert_eq!(numbers(&[path("list.json")]).unwrap(), [(4, 1), (5, 2)]);
    assert!(matches!(numbers(&[path("*.parquet")]), Err(Error::NoFiles { .. })));
    assert!(matches!(numbers(&[path("missing.jsonl")]), Err(Error::File(_))));
    std::fs::write(path("empty.jsonl"), "\n\n").unwrap();
    assert!(matches!(numbers(&[path("empty.jsonl")]), Err(Error::Empty(_))));
    std::fs::write(path("notes.txt"), "x").unwrap();
    assert!(matches!(numbers(&[path("notes.txt")]), Err(Error::Format { .. })));

    let columns = BTreeMap::from([("prompt".to_owned(), "n".to_owned())]);
    assert_eq!(read(&[path("a.jsonl")], &columns).unwrap()[0].columns["prompt"], 1);
    let columns = BTreeMap::from([("prompt".to_owned(), "m".to_owned())]);
    assert_eq!(read(&[path("a.jsonl")], &columns).unwrap_err().hint().unwrap(), "did you mean n?");
    // Each column is taken from the row as it is in the file, so that two can change places.
    std::fs::write(path("pair.jsonl"), r#"{"chosen": "a", "rejected": "b"}"#).unwrap();
    let columns =
        [("chosen", "rejected"), ("rejected", "chosen")].map(|(name, from)| (name.to_owned(), from.to_owned()));
    let reversed = read(&[path("pair.jsonl")], &BTreeMap::from(columns)).unwrap();
    assert_eq!((&reversed[0].columns["chosen"], &reversed[0].columns["rejected"]), (&json!("b"), &json!("a")));
}

#[test]
fn broken_lines_are_named() {
    let parse = |text: &str| read::jsonl::parse(text.as_bytes(), Path::new("x.jsonl")).unwrap_err();
    let error = parse("{\"a\": 1}\n\n{\"a\": }\n");
    assert_eq!(error.to_string(), "x.jsonl, row 3: not valid JSON: expected value at character 7");
    let error = parse("{\"a\": 1}\n{\"a\": \"cut");
    assert!(error.to_string().starts_with("x.jsonl, row 2: not valid JSON: EOF while parsing a string"), "{error}");
    assert!(error.hint().unwrap().contains("cut short"));
    assert_eq!(parse("[1]").to_string(), "x.jsonl, row 1: expected an object, got a list");
    assert!(parse(&"[".repeat(100_000)).to_string().contains("recursion limit"));
}

/// A file of conversations with answers, as columnar data sets store them.
fn write_parquet(path: &Path) {
    let schema = "message rows {
        optional group messages (LIST) { repeated group list { optional group element {
            optional binary role (UTF8); optional binary content (UTF8); } } }
        optional int64 answer;
        required boolean hard;
    }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let file = std::fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let texts = |texts: &[&str]| texts.iter().map(|&text| ByteArray::from(text)).collect::<Vec<_>>();
    // Two rows: two messages, then one; the second answer is null.
    for values in [texts(&["system", "user", "user"]), texts(&["s", "q1", "q2"])] {
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, Some(&[4, 4, 4]), Some(&[0, 1, 0])).unwrap();
        column.close().unwrap();
    }
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<Int64Type>().write_batch(&[42], Some(&[1, 0]), None).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<BoolType>().write_batch(&[true, false], None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
}

#[test]
fn parquet_rows_are_those_of_json() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    write_parquet(&path);
    let rows = read::parquet::read(&path).unwrap();
    let columns: Vec<Value> = rows.iter().map(|row| row.columns.clone().into()).collect();
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    assert_eq!(
        columns,
        [
            json!({"messages": [message("system", "s"), message("user", "q1")], "answer": 42, "hard": true}),
            json!({"messages": [message("user", "q2")], "answer": null, "hard": false}),
        ]
    );
    assert_eq!(rows[1].source, Source::new(&path, 2));

    // Damage of any kind is an error or other values, never a panic.
    let whole = std::fs::read(&path).unwrap();
    for position in (0..whole.len()).step_by(7) {
        let mut flipped = whole.clone();
        flipped[position] ^= 0x55;
        for bytes in [&flipped, &whole[..position]] {
            std::fs::write(&path, bytes).unwrap();
            let _ = read::parquet::read(&path);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn damaged_lines_never_panic_and_name_the_row(
        position in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<bool>(), length in 1usize..6,
    ) {
        let line = r#"{"messages": [{"role": "user", "content": "é 🙂"}, {"role": "assistant", "content": "a"}], "n": [1, 2.5e3]}"#;
        let mut bytes = vec![line; length].join("\n").into_bytes();
        let position = position.index(bytes.len());
        let damaged = bytes[..position].iter().filter(|&&byte| byte == b'\n').count() + 1;
        if cut { bytes.truncate(position) } else { bytes[position] ^= 1 << bit }
        let was = bytes.get(position).copied();
        let rows = read::jsonl::parse(&bytes, Path::new("x.jsonl")).and_then(sample::parse);
        if let Err(error) = rows {
            let Error::Row { at, .. } = &error else { panic!("{error}") };
            // Damage to a line break, or one that makes one, moves the rows around it.
            let near = damaged as u64..=damaged as u64 + 1;
            prop_assert!(near.contains(&at.row), "{error}: damaged row {damaged}, byte {was:?}");
        }
    }

    #[test]
    fn any_bytes_are_rows_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read::jsonl::parse(&bytes, Path::new("x.jsonl"));
        let _ = read::jsonl::parse_json(&bytes, Path::new("x.json"));
    }
}
