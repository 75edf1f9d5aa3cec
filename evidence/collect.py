"""Gathers the summaries of finished runs of one recipe, one a seed, into evidence/NAME.json.

    posttrain train recipes/quickstart.toml --set seed=1 --output runs/quickstart-1     # and 0, and 2
    python3 evidence/collect.py quickstart runs/quickstart-0 runs/quickstart-1 runs/quickstart-2
"""

import json
import pathlib
import statistics
import sys

name, *runs = sys.argv[1:]
summaries = [json.loads((pathlib.Path(run) / "summary.json").read_text()) for run in runs]


def accuracy(evaluation):
    (measure,) = [m for m in evaluation["measures"] if m["name"] == "accuracy"]
    return {key: measure[key] for key in ("value", "low", "high", "items")}


seeds = [
    {
        "seed": s["seed"],
        "config_sha256": s["config_sha256"],
        "before": accuracy(s["before"]),
        "after": accuracy(s["after"]),
        "change": s["change"],
        "steps": s["steps"],
        "num_tokens": s["num_tokens"],
        **{
            name: s["last_step"][key]
            for name, key in [("sampling_logp_difference_max", "sampling/sampling_logp_difference/max")]
            if key in s["last_step"]
        },
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
    "recipe": f"recipes/{name}.toml",
    "program": summaries[0]["program"],
    "base_model": summaries[0]["base_model"],
    "base_model_sha256": summaries[0]["base_model_sha256"],
    "seeds": seeds,
    "gain": {"mean": statistics.mean(gains), "min": min(gains), "max": max(gains)},
}
path = pathlib.Path(__file__).with_name(f"{name}.json")
path.write_text(json.dumps(evidence, indent=2) + "\n")
print(f"{path}: gain {evidence['gain']['mean']:+.3f} ({min(gains):+.3f} to {max(gains):+.3f}) over {len(seeds)} seeds")
