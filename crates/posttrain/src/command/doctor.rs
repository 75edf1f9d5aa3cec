//! `posttrain doctor`: is this machine fit, and what will be used?

use std::path::Path;
use std::process::Command;

use kernels::Isa;
use model::{DeviceName, hub};

use crate::failure::Failure;
use crate::report::bytes;
use crate::terminal::print;

/// One line of the examination.
struct Finding {
    what: &'static str,
    found: String,
    /// What to do about it, where something should be done.
    advice: Option<String>,
}

impl Finding {
    fn good(what: &'static str, found: impl Into<String>) -> Self {
        Self { what, found: found.into(), advice: None }
    }

    fn bad(what: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { what, found: found.into(), advice: Some(advice.into()) }
    }
}

/// Prints what was found; advice stands under the lines that need it.
pub fn run() -> Result<(), Failure> {
    let findings = [processor(), kernels(), threads(), gpu(), memory(), disk(), cache(), quickstart(), python()];
    let mut text = String::new();
    for Finding { what, found, advice } in &findings {
        let mark = if advice.is_some() { "!" } else { "✓" };
        text += &format!("{mark} {what:11} {found}\n");
        if let Some(advice) = advice {
            text += &format!("  hint: {advice}\n");
        }
    }
    print(text)
}

fn processor() -> Finding {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let name = name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned());
    Finding::good("processor", name)
}

fn kernels() -> Finding {
    let chosen = Isa::current();
    let available: Vec<String> = Isa::ALL.iter().filter(|isa| isa.available()).map(|isa| isa.to_string()).collect();
    let found = format!("{chosen} (available: {})", available.join(", "));
    match chosen {
        Isa::Portable => {
            Finding::bad("kernels", found, "the portable kernels are slow; expect several times the usual times")
        }
        _ => Finding::good("kernels", found),
    }
}

fn threads() -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Finding::good("threads", format!("{} of {cores}", rayon::current_num_threads()))
}

fn gpu() -> Finding {
    if !DeviceName::CUDA {
        return Finding::good("gpu", "not used: a build for processors (docs/gpu.md)");
    }
    match DeviceName::Cuda(0).open() {
        Ok(_) => Finding::good("gpu", "cuda answers: `model.device = \"cuda\"` trains and samples on it"),
        Err(error) => Finding::bad(
            "gpu",
            error.to_string(),
            "the driver and CUDA's libraries must be where the loader finds them: docs/gpu.md",
        ),
    }
}

/// The quickstart's peak with some room.
const MEMORY_WANTED: u64 = 4 << 30;
/// A model, a few checkpoints and a run.
const DISK_WANTED: u64 = 8 << 30;

fn memory() -> Finding {
    let Some(available) = available_memory() else { return Finding::good("memory", "unknown") };
    let found = format!("{} available", bytes(available));
    match available < MEMORY_WANTED {
        true => Finding::bad(
            "memory",
            found,
            "the quickstart wants about 4 GiB; close programs or lower micro_batch_tokens",
        ),
        false => Finding::good("memory", found),
    }
}

/// Memory that can be had without swapping, in bytes, where the system tells.
pub fn available_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

fn disk() -> Finding {
    let Some(free) = free_disk(Path::new(".")) else { return Finding::good("disk", "unknown") };
    let found = format!("{} free here", bytes(free));
    match free < DISK_WANTED {
        true => Finding::bad(
            "disk",
            found,
            "a checkpoint of full fine-tuning takes three times the model in f32; free some space",
        ),
        false => Finding::good("disk", found),
    }
}

/// Free bytes of the file system of `folder`, as `df` tells.
fn free_disk(folder: &Path) -> Option<u64> {
    let output = Command::new("df").args(["-Pk"]).arg(folder).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.lines().nth(1)?.split_whitespace().nth(3)?.parse::<u64>().ok()? << 10)
}

fn cache() -> Finding {
    match hub::cache_folder() {
        Ok(folder) => Finding::good("cache", folder.display().to_string()),
        Err(error) => Finding::bad("cache", error.to_string(), "set POSTTRAIN_CACHE to a folder for models"),
    }
}

fn quickstart() -> Finding {
    const NAME: &str = "smollm2-135m-instruct";
    match hub::cached(NAME) {
        Some(path) => Finding::good("model", format!("{NAME} at {}", path.display())),
        None => Finding::bad(
            "model",
            format!("{NAME} is not cached"),
            format!("`posttrain pull {NAME}` fetches it; so does the quickstart"),
        ),
    }
}

fn python() -> Finding {
    let version = Command::new("python3").args(["-m", "pip", "--version"]).output();
    match version {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            let words: Vec<&str> = text.split_whitespace().take(2).collect();
            Finding::good("python", format!("python3 with {}", words.join(" ")))
        }
        _ => Finding::bad(
            "python",
            "python3 with pip was not found",
            "only needed to fetch a model where the Hugging Face Hub cannot be reached",
        ),
    }
}
