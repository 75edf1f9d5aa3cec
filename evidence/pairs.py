"""Turns judged answers into preference rows and scored rows, problems of one file never in the other.

    posttrain eval evidence/reward_model-answers.toml --answers answers.jsonl
    python3 evidence/pairs.py answers.jsonl pairs            # pairs/train.jsonl, pairs/test.jsonl, pairs/labels-*.jsonl, pairs/problems-test.jsonl

A pair is a right and a wrong answer to one problem; of each problem at most two, with answers that differ.
"""

import json
import pathlib
import sys

answers, out = sys.argv[1:]
problems = {}
for line in open(answers):
    row = json.loads(line)
    problems.setdefault(row["id"], []).append(row)

out = pathlib.Path(out)
out.mkdir(parents=True, exist_ok=True)
files = {name: [] for name in ("train", "test", "labels-train", "labels-test", "problems-test")}
for number, rows in enumerate(problems.values()):
    part = "test" if number % 4 == 3 else "train"
    prompt = [{"role": "user", "content": rows[0]["question"]}]
    if part == "test":
        files["problems-test"].append({"prompt": prompt, "answer": rows[0]["answer"]})
    distinct = {row["completion"]: row["solved"] for row in rows}
    right = [text for text, solved in distinct.items() if solved]
    wrong = [text for text, solved in distinct.items() if not solved]
    for chosen, rejected in list(zip(right, wrong))[:2]:
        files[part].append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    for text, solved in distinct.items():
        files[f"labels-{part}"].append({"prompt": prompt, "completion": text, "label": solved, "answer": rows[0]["answer"]})
for name, rows in files.items():
    (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{out / name}.jsonl: {len(rows)} rows")
