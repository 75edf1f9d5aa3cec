//! `posttrain merge`: a LoRA adapter folded into the weights of its base, checked by what it does to the logits; and averages of weights.

use std::path::Path;

use model::decoder::{PackedTokens, Workspace};
use model::weights::safetensors::{self, Dtype};
use model::{Decoder, save};

use crate::cli::Merge;
use crate::failure::Failure;
use crate::opened::{Opened, Opener};
use crate::terminal::print;

/// Logits of so many tokens are compared.
const PROBE_TOKENS: u32 = 64;

/// Runs the command.
pub fn run(arguments: &Merge, opener: Opener) -> Result<(), Failure> {
    if arguments.out.exists() {
        return Err(Failure::new(format!("{} exists already", arguments.out.display()))
            .hint("choose another folder with --out"));
    }
    let names: Vec<String> = arguments.runs.iter().map(|run| run.display().to_string()).collect();
    match &names[..] {
        names if arguments.average => average(names, &arguments.shares, &arguments.out, opener),
        [name] => merge(name, &arguments.out, opener),
        _ => {
            let failure = Failure::usage(format!("expected one run to merge, got {}", names.len()));
            Err(failure.hint("`--average` averages the weights of several models"))
        }
    }
}

fn merge(name: &str, out: &Path, opener: Opener) -> Result<(), Failure> {
    let mut model = opener.open(name, 0)?;
    if model.decoder.adapter_config().is_none() {
        let failure = Failure::new(format!("{name} has no LoRA adapter: there is nothing to merge"));
        return Err(failure.hint("give the folder of a run with `[lora]`, or one of its checkpoints"));
    }
    let with_adapter = probe(&mut model.decoder)?;
    model.decoder.merge_adapter();
    write(&model, out)?;
    // What counts is what a reader of the written files will compute.
    let tensors = safetensors::read(out)?;
    let mut merged = Decoder::new(model.decoder.config().clone(), tensors)?;
    let difference = largest_difference(&with_adapter, &probe(&mut merged)?);
    let size = with_adapter.iter().fold(0f32, |size, logit| size.max(logit.abs()));
    print(format!("{}\nlargest logit difference: {difference:.2e}, where logits reach {size:.1}\n", out.display()))?;
    if difference > 1e-3 * size {
        let failure =
            Failure::new(format!("the merged model differs: {difference:.2e} is more than rounding explains"));
        return Err(failure.hint("keep using the adapter; please report this"));
    }
    Ok(())
}

/// Writes the average of several models, with the tokenizer of the first.
fn average(names: &[String], shares: &[f64], out: &Path, opener: Opener) -> Result<(), Failure> {
    let mut models = Vec::with_capacity(names.len());
    for name in names {
        let mut model = opener.open(name, 0)?;
        model.decoder.merge_adapter();
        models.push(model);
    }
    let mut first = models.remove(0);
    let others: Vec<Decoder> = models.into_iter().map(|model| model.decoder).collect();
    let equal = vec![1.0; names.len()];
    first.decoder.average(&others, if shares.is_empty() { &equal } else { shares })?;
    write(&first, out)?;
    print(format!("{}\n", out.display()))
}

fn write(model: &Opened, out: &Path) -> Result<(), Failure> {
    train::directory::write_folder::<Failure>(out, |folder| {
        let Opened { decoder, tokenizer, template, .. } = model;
        save::model(folder, decoder.config(), decoder.views(), Dtype::F32, tokenizer, template.as_ref())?;
        Ok(())
    })
}

/// Logits, or the scores of a model that writes no tokens, in f32 after a spread of tokens of the vocabulary.
fn probe(decoder: &mut Decoder) -> Result<Vec<f32>, Failure> {
    decoder.prepare(kernels::Precision::F32);
    let vocabulary = decoder.config().vocab_size as u32;
    let ids: Vec<u32> = (0..PROBE_TOKENS).map(|i| (u64::from(i) * 7919 % u64::from(vocabulary)) as u32).collect();
    let mut tokens = PackedTokens::new();
    tokens.push(&ids, None)?;
    let mut workspace = Workspace::new();
    decoder.forward(&tokens, &mut workspace, false)?;
    if !decoder.config().has_language_head() {
        return Ok(decoder.scores(&workspace, &Vec::from_iter(0..ids.len()))?);
    }
    let mut logits = vec![0.0; ids.len() * vocabulary as usize];
    decoder.logits(&workspace.hidden()[..ids.len() * decoder.config().hidden_size], &mut logits)?;
    Ok(logits)
}

fn largest_difference(left: &[f32], right: &[f32]) -> f32 {
    left.iter().zip(right).fold(0.0, |largest, (left, right)| largest.max((left - right).abs()))
}
