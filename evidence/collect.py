"""Gathers the summaries of finished runs of one recipe, one a seed, into evidence/NAME.json.

    posttrain train recipes/quickstart.toml --set seed=1 --output runs/quickstart-1     # and 0, and 2
    python3 evidence/collect.py quickstart runs/quickstart-0 runs/quickstart-1 runs/quickstart-2

A recipe that is not recipes/NAME.toml is given as NAME=PATH. KEY=FILE.json behind the runs adds what another command measured of them
(`posttrain eval calibration --json`, say) under that key.
"""

import json
import pathlib
import statistics
import sys

name, *runs = sys.argv[1:]
name, _, recipe = name.partition("=")
measured = [run.split("=", 1) for run in runs if run.endswith(".json")]
runs = [run for run in runs if not run.endswith(".json")]
summaries = [json.loads((pathlib.Path(run) / "summary.json").read_text()) for run in runs]


def measures(evaluation):
    """The accuracy itself, and other measures by name."""
    by_name = {m["name"]: {key: m[key] for key in ("value", "low", "high", "items")} for m in evaluation["measures"]}
    others = {name: measure for name, measure in by_name.items() if name.startswith("preference_")}
    return by_name["accuracy"] | others


def optional(name, numbers, key):
    return {name: numbers[key]} if key in numbers else {}


seeds = [
    {
        "seed": s["seed"],
        "config_sha256": s["config_sha256"],
        "before": measures(s["before"]),
        "after": measures(s["after"]),
        "change": s["change"],
        "steps": s["steps"],
        "num_tokens": s["num_tokens"],
        **optional("sampling_logp_difference_max", s["last_step"], "sampling/sampling_logp_difference/max"),
        "wall_seconds": s["timing"]["seconds"],
        "peak_memory_bytes": s["timing"]["peak_memory_bytes"],
    }
    for s in summaries
]
# Without a paired test (a reward model that starts with nothing but ties), the gain is that of the accuracies.
gains = [
    seed["change"]["difference"] if seed["change"] else seed["after"]["value"] - seed["before"]["value"] for seed in seeds
]
evidence = {
    "recipe": recipe or f"recipes/{name}.toml",
    "program": summaries[0]["program"],
    "base_model": summaries[0]["base_model"],
    "base_model_sha256": summaries[0]["base_model_sha256"],
    "seeds": seeds,
    "gain": {"mean": statistics.mean(gains), "min": min(gains), "max": max(gains)},
    **{key: json.loads(pathlib.Path(path).read_text()) for key, path in measured},
}
path = pathlib.Path(__file__).with_name(f"{name}.json")
path.write_text(json.dumps(evidence, indent=2) + "\n")
print(f"{path}: gain {evidence['gain']['mean']:+.3f} ({min(gains):+.3f} to {max(gains):+.3f}) over {len(seeds)} seeds")
