#!/usr/bin/env python3
"""A reward as an external command: 1 when the completion is the row's answer, whatever its case and spacing.

Use it with:

    [[rewards]]
    type = "process"
    command = ["python3", "recipes/rewards/exact_match.py"]

The command reads one JSON object a line, {"id", "prompt", "completion", "columns"}, and writes one a line, {"id", "value"}
and, if it likes, "status" and "parts". It ends when its input ends.
"""

import json
import sys


def plain(text):
    return " ".join(text.lower().split()).rstrip(".")


def main():
    for line in sys.stdin:
        request = json.loads(line)
        answer = request["columns"].get("answer")
        if answer is None:
            # Not applicable: the row has no answer to compare with.
            reply = {"value": None}
        else:
            right = plain(request["completion"]) == plain(str(answer))
            reply = {"value": float(right), "status": "ok" if right else "wrong"}
        print(json.dumps({"id": request["id"], **reply}), flush=True)


if __name__ == "__main__":
    main()
