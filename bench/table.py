"""Prints docs/performance.md from bench/results/*.json.

    python3 bench/table.py > docs/performance.md
"""

import json
import pathlib

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
CASES = {
    "full-f32": ("full fine-tuning step, f32", "float32"),
    "full-bf16": ("full fine-tuning step, bf16", "autocast"),
    "lora-bf16": ("LoRA step (r = 16), bf16", "autocast"),
    "generate-f32": ("generate 16 x 128 tokens, f32", "`generate`, float32"),
    "generate-bf16": ("generate 16 x 128 tokens, bf16", "`generate`, bfloat16"),
}
results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in CASES if (RESULTS / f"{name}.json").exists()}
any_result = next(iter(results.values()))
machine, versions = any_result["machine"], any_result["peer"]["versions"]

print("# Performance\n")
print("Made by `bench/table.py` from `bench/results/*.json`; [the work of each case](../bench/README.md). Both sides ran alternately on one machine:")
print(f"{machine['cores']} cores of an {machine['cpu']}, {machine['memory_bytes'] / 2**30:.0f} GiB; torch {versions['torch']}, transformers {versions['transformers']}.")
print("Rates are medians in tokens per second; they swing with the machine, the ratio less so.\n")
print("| case | posttrain | PyTorch | ratio | peak memory | of PyTorch's |")
print("| --- | --- | --- | --- | --- | --- |")
for name, result in results.items():
    work, peer = CASES[name]
    ours, theirs = result["ours"], result["peer"]
    print(
        f"| {work} | {ours['tokens_per_second']['median']:.0f} | {theirs['tokens_per_second']['median']:.0f} ({peer}) "
        f"| {result['speed_ratio']:.2f} | {ours['peak_memory_bytes'] / 2**30:.1f} GiB | {result['memory_ratio']:.2f} |"
    )
