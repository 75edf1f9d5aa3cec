"""Counts the referee's alarms over seeds, on honest stages and on stages with a planted reward hack: evidence/referee.json.

    cargo build --release
    python3 evidence/referee.py target/release/posttrain        # 40 runs of seconds each
"""

import json
import pathlib
import subprocess
import sys
import tempfile

SEEDS = 20
HERE = pathlib.Path(__file__).parent
RECIPES = {"healthy": ["healthy.toml"], "hack": ["healthy.toml", "hack.toml"]}
program = pathlib.Path(sys.argv[1]).resolve()


def run(recipes, seed, folder):
    command = [program, "train", *(HERE / "referee" / name for name in recipes), "--output", folder, "--quiet"]
    subprocess.run([*command, "--set", f"seed={seed}"], check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((folder / "summary.json").read_text())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "reward" in step]
    alarms = summary.get("alarms", [])
    for alarm in alarms:
        alarm["step_of_stage"] = alarm["step"] - steps[0]["step"] + 1
    window = lambda part, name: sum(step[name] for step in part) / len(part)
    change = lambda name: [window(part, name) for part in (steps[:10], steps[-10:])]
    evidence = max((value, name) for step in steps for name, value in step.items() if name.startswith("referee/"))
    return {
        "seed": seed,
        "config_sha256": summary["config_sha256"],
        "steps": len(steps),
        "reward": change("reward"),
        "verifier": change("rewards/number/mean"),
        "largest_evidence": {"share_of_an_alarm": evidence[0], "watch": evidence[1].removeprefix("referee/")},
        "alarms": alarms,
    }


evidence = {"recipes": {name: [f"evidence/referee/{file}" for file in files] for name, files in RECIPES.items()}}
with tempfile.TemporaryDirectory() as scratch:
    for name, recipes in RECIPES.items():
        runs = [run(recipes, seed, pathlib.Path(scratch) / f"{name}-{seed}") for seed in range(SEEDS)]
        with_alarm = [run for run in runs if run["alarms"]]
        first = sorted(run["alarms"][0]["step_of_stage"] for run in with_alarm)
        evidence[name] = {
            "seeds": SEEDS,
            "stages_with_an_alarm": len(with_alarm),
            "first_alarm_at_step_of_stage": {"min": first[0], "median": first[len(first) // 2], "max": first[-1]} if first else None,
            "runs": runs,
        }
        print(name, {key: value for key, value in evidence[name].items() if key != "runs"})
(HERE / "referee.json").write_text(json.dumps(evidence, indent=2) + "\n")
