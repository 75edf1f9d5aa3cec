"""One training step: forward, cross-entropy, backward, clipping, AdamW; 8 sequences of 256 tokens.

Full fine-tuning or LoRA (r = 16 on every projection, written out: PEFT computes the same), float32 or autocast to bfloat16.
"""

import contextlib
import math

import torch
from torch import nn

import common

SEQUENCES, LENGTH, RANK = 8, 256, 16


class LoraLinear(nn.Module):
    """y = W x + (alpha / r) B A x, with W frozen."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.empty(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.scale = alpha / rank

    def forward(self, x):
        return self.base(x) + nn.functional.linear(nn.functional.linear(x, self.a), self.b) * self.scale


def attach_lora(model):
    model.requires_grad_(False)
    for layer in model.model.layers:
        for block, names in (
            (layer.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj")),
            (layer.mlp, ("gate_proj", "up_proj", "down_proj")),
        ):
            for name in names:
                setattr(block, name, LoraLinear(getattr(block, name), RANK, 2 * RANK))


def main():
    arguments = common.arguments()
    arguments.add_argument("--lora", action="store_true")
    arguments.add_argument("--autocast", action="store_true")
    arguments = arguments.parse_args()
    common.setup(arguments.threads)

    model = common.model()
    if arguments.lora:
        attach_lora(model)
    model.to(arguments.device)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    ids = torch.randint(0, common.SHAPE["vocab_size"], (SEQUENCES, LENGTH), device=arguments.device)
    cast = torch.autocast(torch.device(arguments.device).type, torch.bfloat16) if arguments.autocast else contextlib.nullcontext()

    def step():
        with cast:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    common.report(tokens_per_second=common.measure(step, SEQUENCES * LENGTH, arguments.repeats))


if __name__ == "__main__":
    main()
