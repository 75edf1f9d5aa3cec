"""Rewards answers of odd length: about half of them, so that every group of the comparison has advantages."""

import json
import sys

for line in sys.stdin:
    request = json.loads(line)
    print(json.dumps({"id": request["id"], "value": float(len(request["completion"]) % 2)}), flush=True)
