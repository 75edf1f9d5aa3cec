"""How cost grows: time and memory of a training step and of decoding, one size varied at a time. Writes bench/results/growth.json.

    python3 bench/growth.py [--prefix COMMAND] [AXIS ...]

Every point is a fresh process of crates/model/examples/speed.rs in bf16; `bench/table.py` makes the tables and plots.
"""

import argparse
import json
import os
import pathlib
import subprocess

import compare

ROOT = pathlib.Path(__file__).resolve().parent.parent
SPEED = ROOT / "target/release/examples/speed"
RESULT = ROOT / "bench/results/growth.json"

# A shape between a toy and SmolLM2-135M, small enough to be measured at every size.
SMALL = {"--layers": 8, "--hidden": 512, "--intermediate": 1408, "--heads": 8, "--kv-heads": 4, "--vocabulary": 8192}
# Name: what differs from SmolLM2-135M's shape.
MODELS = {
    "1M": {"--layers": 4, "--hidden": 128, "--intermediate": 384, "--heads": 2, "--kv-heads": 1, "--vocabulary": 1024},
    "5M": {"--layers": 6, "--hidden": 256, "--intermediate": 704, "--heads": 4, "--kv-heads": 2, "--vocabulary": 4096},
    "28M": SMALL,
    "135M": {},
}
QWEN = {"--layers": 24, "--hidden": 896, "--intermediate": 4864, "--heads": 14, "--kv-heads": 2, "--vocabulary": 151936}


def axes():
    """Name: (task, what is varied, its unit, the shape, [(value, flags)])."""
    train, decode = {"--repeats": 1}, {"--new": 32, "--repeats": 1}
    return {
        # The same number of tokens a step wherever possible, so that only the length differs.
        "length": ("train", "sequence length", "tokens", "28M", [
            (length, SMALL | train | {"--length": length, "--sequences": max(1, 4096 // length)})
            for length in (128, 256, 512, 1024, 2048, 4096, 8192)
        ]),
        "batch": ("train", "batch", "sequences of 256 tokens", "28M", [
            (batch, SMALL | train | {"--sequences": batch}) for batch in (1, 2, 4, 8, 16, 32)
        ]),
        "model": ("train", "model size", "weights", "each", [
            (name, shape | train | {"--sequences": 8}) for name, shape in MODELS.items()
        ]),
        "vocabulary": ("train", "vocabulary", "tokens", "28M", [
            (size, SMALL | train | {"--vocabulary": size}) for size in (1024, 4096, 16384, 49152, 151936)
        ]),
        "threads": ("train", "threads", "threads", "28M", [
            (threads, SMALL | train | {"--threads": threads}) for threads in range(1, os.cpu_count() + 1)
        ]),
        "decode-batch": ("decode", "sequences decoded together", "sequences", "135M", [
            (batch, decode | {"--sequences": batch}) for batch in (1, 2, 4, 8, 16, 32, 64)
        ]),
        "decode-context": ("decode", "context while decoding", "tokens", "28M, 8 sequences", [
            (context, SMALL | decode | {"--sequences": 8, "--prompt": context}) for context in (64, 256, 1024, 2048, 4096, 8000)
        ]),
        "decode-threads": ("decode", "threads while decoding", "threads", "135M, 16 sequences", [
            (threads, decode | {"--threads": threads}) for threads in range(1, os.cpu_count() + 1)
        ]),
    }  # fmt: skip


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("axes", nargs="*", metavar="AXIS", help=f"default: all of {', '.join(axes())}")
    arguments.add_argument("--prefix", default="", help="a command that runs each measured process")
    arguments.add_argument("--large", action="store_true", help="also the shape of Qwen2.5-0.5B (9 GiB)")
    arguments = arguments.parse_args()

    subprocess.run(["cargo", "build", "--release", "--quiet", "-p", "posttrain-model", "--example", "speed"], cwd=ROOT, check=True)
    known = axes()
    if arguments.large:
        known["model"][-1].append(("494M", QWEN | {"--repeats": 1}))
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"axes": {}}
    for name in arguments.axes or known:
        task, varied, unit, shape, values = known[name]
        points = []
        for value, flags in values:
            command = [*arguments.prefix.split(), SPEED, task, *(str(part) for pair in flags.items() for part in pair)]
            output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
            measured = json.loads(output.strip().splitlines()[-1])
            rates = sorted(measured["tokens_per_second"])
            points.append(
                {
                    "value": value,
                    "tokens_per_second": rates[len(rates) // 2],
                    "peak_memory_bytes": measured["peak_memory_bytes"],
                    "parameters": measured["parameters"],
                }
            )
            print(f"{name:16} {value!s:>8}  {points[-1]['tokens_per_second']:9.0f} tok/s  {measured['peak_memory_bytes'] / 2**20:7.0f} MiB", flush=True)
        result["axes"][name] = {"task": task, "varied": varied, "unit": unit, "shape": shape, "points": points}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
        result |= {"machine": compare.machine(), "commit": commit, "precision": "bf16"}
        RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
