"""Runs both sides of a comparison alternately on this machine and writes bench/results/CASE.json.

    python3 bench/compare.py [--python VENV/bin/python] [--device cuda] [--float32] [--rounds N] [CASE ...]

Every measurement is a fresh process, ours and the peer's in turn; the ratio is that of the medians over all of them. What a
case does stands in bench/README.md. Models and data that the cases share are made on the first run, in bench/work/.
With `--device cuda` both sides compute on the GPU, and results go to bench/results/cuda/. With `--float32` peers compute in float32 in
every case, as is best for them on a processor without instructions for bfloat16, and results go to bench/results/float32/.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time
from typing import Callable

BENCH = pathlib.Path(__file__).resolve().parent
ROOT = BENCH.parent
WORK = BENCH / "work"
POSTTRAIN = ROOT / "target/release/posttrain"
SPEED = ROOT / "target/release/examples/speed"

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
arguments.add_argument("--python", default=sys.executable, help="the Python with the packages of bench/requirements.txt")
arguments.add_argument("--rounds", type=int, help="processes of each side [default: the case's own]")
arguments.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N [default: cpu]")
arguments.add_argument("--float32", action="store_true", help="peers in float32, for processors without instructions for bfloat16")
arguments.add_argument("--threads", type=int, default=os.cpu_count())
arguments.add_argument("--prefix", default="", help="a command that runs each measured process, `nice -n -5` for example")
arguments.add_argument("--list", action="store_true", help="name the cases and stop")


# ---- One process ----


@dataclasses.dataclass
class Done:
    """A process that has ended."""

    stdout: str
    seconds: float
    peak_memory_bytes: int
    started: float


def run(command, stdin=None, watch=None):
    """Runs a command of either side; `watch` is called every millisecond while it runs."""
    threads = str(options.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    output = WORK / "stdout"
    with open(output, "wb") as out, open(WORK / "stderr", "wb") as errors:
        started = time.time()
        process = subprocess.Popen(
            [*options.prefix.split(), *map(str, command)],
            cwd=ROOT, env=environment, stdout=out, stderr=errors, stdin=open(stdin, "rb") if stdin else subprocess.DEVNULL,
        )  # fmt: skip
        while watch and process.poll() is None:
            watch()
            time.sleep(0.001)
        if not watch:
            process.wait()
        seconds = time.time() - started
    if process.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{(WORK / 'stderr').read_text()[-4000:]}")
    return Done(output.read_text(), seconds, 0, started)


def last_json(done):
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- The two sides: each function gives one process's measurements ----


def speed(*flags):
    """Our engine alone: crates/model/examples/speed.rs."""
    return lambda: last_json(run([SPEED, *flags, *both(), "--repeats", 2]))


def both():
    """Flags of every process of either side."""
    device = [] if options.device == "cpu" else ["--device", options.device]
    return ["--threads", options.threads, *device]


def peer(script, *flags):
    """A script that prints its measurements."""

    def measure():
        wanted = [flag for flag in flags if not (options.float32 and flag in ("--autocast", "--bf16"))]
        return last_json(run([options.python, BENCH / "peers" / script, *wanted, *both()]))

    return measure


def train(recipe, *assignments):
    """Our binary on a recipe, into a fresh folder. Returns the finished process and the lines of timing.jsonl."""
    folder = WORK / "run"
    shutil.rmtree(folder, ignore_errors=True)
    if options.device != "cpu":
        assignments = [*assignments, f"model.device='{options.device}'"]
    sets = [flag for assignment in assignments for flag in ("--set", assignment)]
    command = [POSTTRAIN, "train", BENCH / "recipes" / recipe, "--output", folder, "--quiet", "--threads", options.threads, *sets]
    timing = folder / "timing.jsonl"
    first = []

    def watch():
        if not first and timing.exists() and timing.stat().st_size:
            first.append(time.time())

    done = run(command, watch=watch)
    steps = [json.loads(line) for line in timing.read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return done, steps, first[0] - done.started, summary["timing"]["peak_memory_bytes"]


def our_step(recipe, *assignments):
    """Seconds of each step but the first, which warms up."""

    def measure():
        _, steps, _, memory = train(recipe, *assignments)
        # What is written after the last step is no step.
        trained = [step["step_time"] for step in steps if step["tokens"]]
        return {"seconds": trained[1:], "peak_memory_bytes": memory}

    return measure


def our_wall(recipe, *assignments):
    """Seconds of the whole process."""

    def measure():
        done, _, _, memory = train(recipe, *assignments)
        return {"seconds": [done.seconds], "peak_memory_bytes": memory}

    return measure


def our_start(recipe, *assignments):
    """Seconds from the start of the process to the start of the first step: the step's end, less its length."""

    def measure():
        _, steps, first_done, _ = train(recipe, *assignments)
        return {"seconds": [first_done - steps[0]["step_time"]]}

    return measure


def wall(inner):
    """Seconds of a peer's whole process."""

    def measure():
        started = time.time()
        result = inner()
        return result | {"seconds": [time.time() - started]}

    return measure


def start(inner):
    """Seconds to a peer's first step, whose beginning the peer reports."""

    def measure():
        started = time.time()
        result = inner()
        return {"seconds": [result["first_step_at"] - started], "versions": result["versions"]}

    return measure


def our_generate():
    flags = ["--model", WORK / "random", "--raw", "--temperature", 1, "--max-new-tokens", 64, "--precision", "bf16"]
    done = run([POSTTRAIN, "generate", *flags, "--quiet", *both()], stdin=WORK / "prompts16.jsonl")
    answers = done.stdout.strip().splitlines()
    assert len(answers) == 16 and all(json.loads(answer)["completions"][0] for answer in answers)
    return {"seconds": [done.seconds]}


# ---- The cases ----


@dataclasses.dataclass
class Case:
    """Both sides of one comparison."""

    ours: Callable
    peer: Callable
    # What is measured: a rate, of which more is better, or seconds, of which less is.
    unit: str
    speed_target: float
    memory_target: float | None = None
    rounds: int = 3
    # Whether bench/work/ is needed.
    shared: bool = True
    # Whether both sides can compute on a GPU.
    gpu: bool = True


GRPO = "grpo.toml"
MODEL = f"model.name='{WORK / 'model'}'"
CASES = {
    "full-f32": Case(speed("train", "--precision", "f32"), peer("train_step.py"), "tokens_per_second", 1.35, 0.6, shared=False),
    "full-bf16": Case(speed("train"), peer("train_step.py", "--autocast"), "tokens_per_second", 1.35, 0.6, shared=False),
    "lora-bf16": Case(speed("train", "--lora"), peer("train_step.py", "--lora", "--autocast"), "tokens_per_second", 1.5, 0.5, shared=False),
    "generate-f32": Case(speed("generate", "--precision", "f32"), peer("generate.py"), "tokens_per_second", 5.0, shared=False),
    "generate-bf16": Case(speed("generate"), peer("generate.py", "--bf16"), "tokens_per_second", 5.0, shared=False),
    "grpo": Case(our_step(GRPO, MODEL), peer("grpo.py", "--bf16"), "seconds", 6.0, 0.5, rounds=2),
    "grpo-reference": Case(
        our_step(GRPO, MODEL, "grpo.objective.beta=0.04"), peer("grpo.py", "--bf16", "--beta", "0.04"), "seconds", 6.0, 0.5, rounds=2
    ),
    "sft-e2e": Case(our_wall("sft.toml", MODEL), wall(peer("sft.py", "--autocast")), "seconds", 1.35, 0.6),
    "dpo-e2e": Case(our_wall("dpo.toml", MODEL), wall(peer("dpo.py", "--autocast")), "seconds", 1.35, 0.6),
    "start": Case(our_start("sft.toml", MODEL, "sft.training.max_steps=1"), start(peer("sft.py", "--autocast", "--steps", "1")), "seconds", 20.0),
    "generate-e2e": Case(our_generate, wall(peer("generate_file.py", "--bf16")), "seconds", 5.0),
    "decode-1-q8": Case(
        speed("decode", "--sequences", 1), peer("llama_cpp.py"), "weight_bytes_per_second", 1.0, gpu=False
    ),
    "decode-1-candle": Case(
        speed("decode", "--sequences", 1), lambda: last_json(run([CANDLE, WORK / "q8_0.gguf"])), "weight_bytes_per_second", 1.0, gpu=False
    ),
}  # fmt: skip
CANDLE = BENCH / "peers/candle/target/release/candle-decode"


def prepare(names):
    """Builds what is measured, and makes what the cases share."""
    cargo = ["cargo", "build", "--release", "--quiet"]
    features = [] if options.device == "cpu" else ["--features", "cuda"]
    subprocess.run([*cargo, "-p", "posttrain", *features], cwd=ROOT, check=True)
    subprocess.run([*cargo, "-p", "posttrain-model", *features, "--example", "speed"], cwd=ROOT, check=True)
    if "decode-1-candle" in names:
        subprocess.run(cargo, cwd=BENCH / "peers/candle", check=True)
    WORK.mkdir(exist_ok=True)
    # The version of what prepare.py makes.
    ready = WORK / "ready-2"
    if any(CASES[name].shared for name in names) and not ready.exists():
        # A step with learning rate 0 writes the named model as a Hugging Face folder, which both sides read.
        (WORK / "one.jsonl").write_text('{"prompt": "One", "completion": " two"}\n')
        recipe = ["--set", "model.name='smollm2-135m-instruct'", "--set", f"data.train=['{WORK / 'one.jsonl'}']"]
        recipe += ["--set", "sft.batch_size=1", "--set", "sft.training.max_steps=1", "--set", "sft.training.learning_rate=0"]
        folder = WORK / "export"
        subprocess.run(
            [POSTTRAIN, "train", BENCH / "recipes/sft.toml", "--output", folder, "--overwrite", "--quiet", *recipe],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        shutil.rmtree(WORK / "model", ignore_errors=True)
        (folder / "final").rename(WORK / "model")
        shutil.rmtree(folder)
        subprocess.run([options.python, BENCH / "peers/prepare.py", WORK], cwd=ROOT, check=True)
        ready.touch()


def machine():
    model = "unknown"
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": model, "cores": os.cpu_count(), "memory_bytes": memory, "system": f"{platform.system()} {platform.machine()}"}


def summary(unit, runs):
    values = [value for one in runs for value in one[unit]]
    result = {unit: {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}}
    for key, first in runs[0].items():
        if key == "peak_memory_bytes":
            result[key] = statistics.median(one[key] for one in runs)
        elif key != unit and isinstance(first, list):
            result[key] = statistics.median(value for one in runs for value in one[key])
    result["versions"] = runs[0].get("versions") or {"posttrain": version()}
    if "setting" in runs[0]:
        result["setting"] = runs[0]["setting"]
    return result


def version():
    return subprocess.run([POSTTRAIN, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1]


def compare(name, case, commit):
    sides = {"ours": [], "peer": []}
    rounds = options.rounds or case.rounds
    for _ in range(rounds):
        sides["ours"].append(case.ours())
        sides["peer"].append(case.peer())
    result = {"case": name, "unit": case.unit, **{side: summary(case.unit, runs) for side, runs in sides.items()}}
    ours, peer = (result[side][case.unit]["median"] for side in ("ours", "peer"))
    result["speed_ratio"] = peer / ours if case.unit == "seconds" else ours / peer
    memory = [result[side].get("peak_memory_bytes") for side in ("ours", "peer")]
    result["memory_ratio"] = memory[0] / memory[1] if all(memory) else None
    result["targets"] = {"speed_ratio_at_least": case.speed_target, "memory_ratio_at_most": case.memory_target}
    result |= {"threads": options.threads, "rounds": rounds, "device": options.device, "machine": machine(), "commit": commit}
    folder = BENCH / "results" / ("cuda" if options.device != "cpu" else "float32" if options.float32 else "")
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    line = f"{name:16} ours {ours:.4g}  peer {peer:.4g} {case.unit}  {result['speed_ratio']:.2f}x (target {case.speed_target}x)"
    if result["memory_ratio"]:
        line += f"  memory {result['memory_ratio']:.2f}" + (f" (target {case.memory_target})" if case.memory_target else "")
    print(line, flush=True)


def main():
    if options.list:
        return print("\n".join(CASES))
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        sys.exit(f"unknown case {unknown[0]}; there are: {', '.join(CASES)}")
    possible = [name for name, case in CASES.items() if case.gpu or options.device == "cpu"]
    names = options.cases or possible
    if impossible := [name for name in names if name not in possible]:
        sys.exit(f"{impossible[0]} is for processors alone")
    prepare(names)
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    for name in names:
        compare(name, CASES[name], git.stdout.strip())


if __name__ == "__main__":
    options = arguments.parse_args()
    main()
