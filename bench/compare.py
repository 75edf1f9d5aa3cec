"""Runs both sides of a comparison alternately on this machine and writes bench/results/NAME.json.

    python bench/compare.py --python /path/to/venv/bin/python [--rounds 3] [CASE ...]

Each round runs ours, then theirs, each in a fresh process; the ratio is that of the medians over all repeats of all rounds.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# name: (our arguments, their script and arguments, target speed ratio, target memory ratio)
CASES = {
    "full-f32": (["train", "--precision", "f32"], ["train_step.py"], 1.1, None),
    "full-bf16": (["train", "--precision", "bf16"], ["train_step.py", "--autocast"], 1.1, None),
    "lora-bf16": (["train", "--lora", "--precision", "bf16"], ["train_step.py", "--lora", "--autocast"], 1.1, None),
    "generate-f32": (["generate", "--precision", "f32"], ["generate.py"], 2.5, None),
    "generate-bf16": (["generate", "--precision", "bf16"], ["generate.py", "--bf16"], 2.5, None),
}


def run(command):
    """The last JSON line a command prints."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine():
    model = "unknown"
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": model, "cores": os.cpu_count(), "memory_bytes": memory, "system": f"{platform.system()} {platform.machine()}"}


def summary(runs):
    rates = [rate for one in runs for rate in one["tokens_per_second"]]
    return {
        "tokens_per_second": {"median": statistics.median(rates), "min": min(rates), "max": max(rates), "all": rates},
        "peak_memory_bytes": statistics.median(one["peak_memory_bytes"] for one in runs),
        "versions": runs[0].get("versions", {}),
    }


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("cases", nargs="*", help="default: all")
    arguments.add_argument("--python", default=sys.executable, help="the Python with torch and transformers")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--repeats", type=int, default=2, help="measured repeats in each process")
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = arguments.parse_args()

    subprocess.run(["cargo", "build", "--release", "-p", "posttrain-model", "--example", "speed"], cwd=ROOT, check=True)
    ours = ROOT / "target/release/examples/speed"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    common = ["--threads", str(arguments.threads), "--repeats", str(arguments.repeats)]
    for name in arguments.cases or CASES:
        our_arguments, script, speed_target, memory_target = CASES[name]
        sides = {"ours": [], "peer": []}
        for _ in range(arguments.rounds):
            sides["ours"].append(run([str(ours), *our_arguments, *common]))
            sides["peer"].append(run([arguments.python, f"bench/peers/{script[0]}", *script[1:], *common]))
        result = {"case": name, **{side: summary(runs) for side, runs in sides.items()}}
        median = lambda side: result[side]["tokens_per_second"]["median"]
        result["speed_ratio"] = median("ours") / median("peer")
        result["memory_ratio"] = result["ours"]["peak_memory_bytes"] / result["peer"]["peak_memory_bytes"]
        result["targets"] = {"speed_ratio_at_least": speed_target, "memory_ratio_at_most": memory_target}
        result |= {"threads": arguments.threads, "rounds": arguments.rounds, "machine": machine(), "commit": commit}
        path = ROOT / "bench/results" / f"{name}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(
            f"{name:14} ours {median('ours'):7.0f} tok/s  peer {median('peer'):7.0f} tok/s  "
            f"{result['speed_ratio']:.2f}x (target {speed_target}x)  memory {result['memory_ratio']:.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
