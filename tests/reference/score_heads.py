"""Score heads as transformers computes them, and what it makes of a folder that posttrain wrote.

    python tests/reference/score_heads.py > tests/reference/score_heads.json   # heads on logits/llama and their scores
    python tests/reference/score_heads.py check FOLDER                        # a reward model's folder: transformers loads it

Needs torch and transformers. crates/model/tests/score_head.rs compares the engine with the file.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).parent
IDS = list(range(3, 27))


def rounded(tensor):
    return [rounded(row) for row in tensor] if tensor.dim() else float(f"{tensor.item():.8g}")


def scores(model):
    with torch.no_grad():
        return model(torch.tensor([IDS]), use_cache=False).logits[0]


def write():
    out = {"transformers": transformers.__version__, "ids": IDS}
    for key, auto, labels in [
        ("sequence", transformers.AutoModelForSequenceClassification, 1),
        ("token", transformers.AutoModelForTokenClassification, 3),
    ]:
        torch.manual_seed(11)
        model = auto.from_pretrained(HERE / "logits/llama", num_labels=labels, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.score.parameters():
                parameter.copy_(torch.randn_like(parameter).to(torch.bfloat16).float() * 0.25)
        bias = model.score.bias
        out[key] = {
            "weight": rounded(model.score.weight.detach()),
            "bias": [] if bias is None else rounded(bias.detach()),
            "scores": rounded(scores(model)),
        }
    print(json.dumps(out))


def check(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0])
    model, report = model.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    print(type(model).__name__, "labels", config.num_labels)
    print("missing", sorted(report["missing_keys"]), "unexpected", sorted(report["unexpected_keys"]))
    print("scores", scores(model.eval()).flatten().tolist()[-3:])


if __name__ == "__main__":
    if len(sys.argv) == 1:
        write()
    elif len(sys.argv) == 3 and sys.argv[1] == "check":
        check(sys.argv[2])
    else:
        sys.exit(__doc__)
