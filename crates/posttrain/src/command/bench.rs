//! `posttrain bench`: how close does each phase come to what this machine could do?

use base::files;
use kernels::Precision;
use model::lora::LoraConfig;
use model::tokenizer::Tokenizer;
use model::{Decoder, ModelConfig};

use crate::cli::Bench;
use crate::failure::Failure;
use crate::opened::Opener;
use crate::report::bytes;
use crate::roofline::{Limit, Phase, Roofline, Sizes, measure};
use crate::terminal::print;

/// Rate inside products, relative to the matrix peak.
const PRODUCTS_OF_PEAK: f64 = 0.75;
/// Share of a training step that is inside products.
const PRODUCTS_OF_STEP: f64 = 0.80;
/// Share of its bound that decoding achieves.
const DECODE_OF_BOUND: f64 = 0.60;

/// Runs the command.
pub fn run(arguments: &Bench, opener: Opener) -> Result<(), Failure> {
    let (name, mut decoder, tokenizer) = match &arguments.model {
        Some(name) => {
            let model = opener.open(name, 0)?;
            (name.clone(), model.decoder, model.tokenizer)
        }
        None => {
            let decoder = Decoder::random(ModelConfig::smollm2_135m(), 0)?;
            ("SmolLM2-135M's shape".to_owned(), decoder, Tokenizer::bytes()?)
        }
    };
    if arguments.lora {
        if decoder.adapter_config().is_some() {
            let failure = Failure::new(format!("{name} has an adapter already, and it is what will be trained"));
            return Err(failure.hint("leave out --lora"));
        }
        decoder.attach_lora(&LoraConfig::default(), 0)?;
    }
    let sizes = Sizes {
        batch: arguments.batch as usize,
        length: arguments.length as usize,
        decode_batch: arguments.decode_batch as usize,
        prompt: arguments.prompt as usize,
        new_tokens: arguments.new_tokens as usize,
        repeats: arguments.repeats as usize,
    };
    let precision: Precision = arguments.precision.into();
    let roofline = measure(&mut decoder, &tokenizer, precision, sizes, |text| opener.terminal.note(text))?;
    if let Some(path) = &arguments.json {
        let mut json = serde_json::json!({ "model": name });
        let measured = serde_json::to_value(&roofline)
            .map_err(|error| Failure::new(format!("cannot write the result as JSON: {error}")))?;
        if let (Some(all), serde_json::Value::Object(measured)) = (json.as_object_mut(), measured) {
            all.extend(measured);
            all.insert(
                "targets".to_owned(),
                serde_json::json!({
                    "products_of_peak": PRODUCTS_OF_PEAK,
                    "products_of_step": PRODUCTS_OF_STEP,
                    "decode_of_bound": DECODE_OF_BOUND,
                }),
            );
        }
        files::write(path, format!("{json:#}\n").as_bytes())?;
    }
    print(render(&name, &roofline))
}

/// The result for people.
fn render(name: &str, roofline: &Roofline) -> String {
    let Roofline { sizes, machine, .. } = roofline;
    let trained = if roofline.lora { "LoRA adapter" } else { "all weights" };
    let mut text = format!(
        "model     {name}, {:.1} M weights, {trained} trained, {}\n",
        roofline.parameters as f64 / 1e6,
        roofline.precision
    );
    text += &format!(
        "machine   {} threads, {}: f32 {:.0} GFLOP/s, bf16 {:.0} GFLOP/s, memory {:.1} GB/s read, {:.1} GB/s changed in place\n",
        roofline.threads,
        roofline.kernels,
        machine.f32_peak / 1e9,
        machine.bf16_peak / 1e9,
        machine.read_bandwidth / 1e9,
        machine.update_bandwidth / 1e9
    );

    text += &format!("\nTraining step of {} x {} tokens\n{}", sizes.batch, sizes.length, header());
    for phase in &roofline.training {
        text += &line(phase);
    }
    let total = |value: fn(&Phase) -> f64| roofline.training.iter().map(value).sum::<f64>();
    let (seconds, bound) = (total(|phase| phase.seconds), total(|phase| phase.bound_seconds));
    text += &format!(
        "  {:10} {:>10} {:>12} {:>12} {:>10} {:>9.0} %   {:>7.0} % {:>10.0} % {:>12.0}\n",
        "step",
        time(seconds),
        giga(total(|phase| phase.product_operations + phase.attention_operations)),
        giga(total(|phase| phase.bytes.total())),
        "",
        100.0 * bound / seconds,
        100.0 * roofline.products_of_step,
        100.0 * total(|phase| phase.attention_seconds) / seconds,
        total(|phase| phase.product_operations) / total(|phase| phase.product_seconds) / 1e9,
    );
    text += &format!("  {:.0} tokens/s\n", roofline.training_tokens_per_second);

    text += &format!(
        "\nGeneration of {} x {} tokens after prompts of {}; decode is one token each\n{}",
        sizes.decode_batch,
        sizes.new_tokens,
        sizes.prompt,
        header()
    );
    for phase in &roofline.generation {
        text += &line(phase);
    }
    text += &format!("  {:.0} tokens/s\n", roofline.decode_tokens_per_second);

    text += "\n";
    for (what, measured, target) in [
        ("rate inside products, of the matrix peak", roofline.products_of_peak, PRODUCTS_OF_PEAK),
        ("products, of the training step", roofline.products_of_step, PRODUCTS_OF_STEP),
        ("decode, of its bound", roofline.decode_of_bound, DECODE_OF_BOUND),
    ] {
        let mark = if measured >= target { "✓" } else { "!" };
        text += &format!("{mark} {what:42} {:>3.0} %   target {:.0} %\n", 100.0 * measured, 100.0 * target);
    }
    if let Some(peak) = roofline.peak_memory_bytes {
        text += &format!("  peak memory {}\n", bytes(peak));
    }
    text
}

fn header() -> String {
    format!(
        "  {:10} {:>10} {:>12} {:>12} {:>10} {:>11}   {:>9} {:>12} {:>12}\n",
        "", "time", "GFLOP", "GB", "bound by", "of bound", "products", "attention", "GFLOP/s"
    )
}

fn line(phase: &Phase) -> String {
    let limit = match phase.limit {
        Limit::Compute => "compute",
        Limit::Memory => "memory",
    };
    let share = |seconds: f64| format!("{:.0} %", 100.0 * seconds / phase.seconds);
    let operations = phase.product_operations + phase.attention_operations;
    format!(
        "  {:10} {:>10} {:>12} {:>12} {:>10} {:>9.0} %   {:>9} {:>12} {:>12}\n",
        phase.name,
        time(phase.seconds),
        if operations > 0.0 { giga(operations) } else { String::new() },
        giga(phase.bytes.total()),
        limit,
        100.0 * phase.achieved(),
        if phase.product_operations > 0.0 { share(phase.product_seconds) } else { String::new() },
        if phase.attention_operations > 0.0 { share(phase.attention_seconds) } else { String::new() },
        phase.product_rate().map_or_else(String::new, |rate| format!("{:.0}", rate / 1e9)),
    )
}

fn giga(amount: f64) -> String {
    let amount = amount / 1e9;
    match amount {
        _ if amount >= 99.5 => format!("{amount:.0}"),
        _ if amount >= 0.0995 => format!("{amount:.2}"),
        _ => format!("{amount:.4}"),
    }
}

fn time(seconds: f64) -> String {
    match seconds {
        _ if seconds >= 0.9995 => format!("{seconds:.2} s"),
        _ if seconds >= 0.9995e-3 => format!("{:.1} ms", seconds * 1e3),
        _ => format!("{:.0} µs", seconds * 1e6),
    }
}
