"""Reference values for the sampling filters, computed by transformers 5.23.0 on fixed logits.

    pip install transformers==5.23.0 torch && python tests/reference/hf_filters.py > tests/reference/hf_filters.json

Each case runs transformers' own logits warpers in the order of its `generate`: temperature, top-k, top-p, min-p.
"""

import json
import math

import torch
import transformers
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

N = 50


def logits(phase, scale, step):
    """Fixed numbers; `step` rounds them, so that several are equal."""
    values = [scale * math.sin(12.9898 * i + phase) for i in range(N)]
    return [round(value / step) * step if step else value for value in values]


def case(row, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    scores = torch.tensor([row], dtype=torch.float64)
    warpers = [TemperatureLogitsWarper(temperature)]
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0.0:
        warpers.append(MinPLogitsWarper(min_p))
    for warper in warpers:
        scores = warper(None, scores)
    return dict(
        logits=row, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        probabilities=scores.softmax(-1)[0].tolist(),
    )


distinct, ties = logits(0.3, 6.0, 0.0), logits(0.7, 5.0, 0.5)
print(json.dumps(dict(
    transformers=transformers.__version__,
    cases=[
        case(distinct),
        case(distinct, temperature=0.4),
        case(distinct, top_k=5),
        case(ties, top_k=5),
        case(ties, temperature=2.5, top_k=1),
        case(distinct, top_p=0.9),
        case(distinct, top_p=0.05),
        case(distinct, min_p=0.2),
        case(ties, temperature=0.7, min_p=0.05),
        case(distinct, temperature=1.7, top_k=20, top_p=0.8),
        case(distinct, temperature=1.7, top_k=20, top_p=0.8, min_p=0.5),
        case(distinct, temperature=3.0, top_p=0.99, min_p=0.1),
    ],
), indent=1))
