"""Reference values for the preference objectives, computed by TRL on fixed tensors.

    pip install trl==1.16.0 && pip download trl==0.24.0 --no-deps && unzip -q trl-0.24.0-*.whl -d OLD
    python tests/reference/trl_preference.py OLD > tests/reference/trl_preference.json

`DPOTrainer`, `CPOTrainer`, `ORPOTrainer`, `TPOTrainer` and `KTOTrainer` of TRL 1.16 are called with a stand-in for the
trainer, and a model that hands them the log-probs; the gradients are torch's. BCO, XPO and Nash-MD are no longer part of
TRL 1.16: their loss functions are taken from the source of TRL 0.24, which need not be importable.
"""

import ast
import json
import sys
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import trl
import trl.experimental.tpo.tpo_trainer
import trl.trainer.dpo_trainer
import trl.trainer.kto_trainer
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.experimental.tpo.tpo_trainer import TPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

torch.set_default_dtype(torch.float64)
T = 5
CHOSEN, REJECTED, GOLD = [5, 2, 3, 1, 4], [3, 4, 1, 5, 2], [2, 5, 3, 4, 1]
P = len(CHOSEN)
for module in (trl.trainer.dpo_trainer, trl.trainer.kto_trainer):
    module.is_peft_model = lambda model: False
    module.disable_gradient_checkpointing = lambda *args: nullcontext()
ACCELERATOR = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


def old(file, cls, name):
    """A method of a class, or a data class, in the source of TRL 0.24."""
    tree = ast.parse((Path(sys.argv[1]) / "trl" / "trainer" / file).read_text())
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls)
    if name:
        node = next(item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == name)
        node.returns = None
        for argument in node.args.args:
            argument.annotation = None
        node.decorator_list = []
    scope = dict(torch=torch, F=F, dataclass=dataclass, Accelerator=object)
    exec(ast.unparse(node), scope)
    return scope[name or cls]


def wave(rows, phase, scale):
    """Fixed numbers without structure, so that no random generator has to be trusted."""
    i = torch.arange(rows * T, dtype=torch.get_default_dtype())
    return (scale * torch.sin(12.9898 * i + phase)).reshape(rows, T)


def mask_of(lengths):
    return (torch.arange(T)[None, :] < torch.tensor(lengths)[:, None]).long()


def flat(x, lengths, groups):
    """Values by pair, then chosen, rejected (and gold), then token; rows come as all chosen, all rejected, all gold."""
    rows = [row[:length] for row, length in zip(x.tolist(), lengths)]
    return [value for pair in range(P) for group in range(groups) for value in rows[group * P + pair]]


def policy(rows, lengths, level=-1.2, scale=1.0, dtype=torch.float64):
    leaf = (level + wave(rows, 0.3, scale)).to(dtype).requires_grad_()
    return leaf, leaf * mask_of(lengths)


def case(loss, leaf, lengths, groups, **more):
    loss.backward()
    return dict(loss=loss.item(), log_probs=flat(leaf, lengths, groups), gradient=flat(leaf.grad, lengths, groups), **more)


def dpo(loss_type, weights=None, score="reverse_kl", alpha=0.5, smoothing=0.0, beta=0.1, ld_alpha=None, weighting=False,
        drift=1.0, dtype=torch.float64):
    lengths = CHOSEN + REJECTED
    mask = mask_of(lengths)
    leaf, log_probs = policy(2 * P, lengths, dtype=dtype)
    reference = (leaf.detach() + wave(2 * P, 1.1, drift).to(dtype)) * mask
    log_sum_sq = (-0.9 + wave(2 * P, 2.2, 0.4)).to(dtype) * mask
    output = SimpleNamespace(
        log_probs=log_probs, log_sum_sq_probs=log_sum_sq, entropy=log_probs.detach(), mean_logits=log_probs.detach(),
        is_top1=mask.bool(), aux_loss=None,
    )
    loss_type = [loss_type] if isinstance(loss_type, str) else loss_type
    model = lambda **kwargs: output
    model.training = True
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=ACCELERATOR, aux_loss_enabled=False, ld_alpha=ld_alpha,
        precompute_ref_logps=False, ref_model=lambda **kwargs: SimpleNamespace(log_probs=reference),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05), f_divergence_type=score,
        f_alpha_divergence_coef=alpha, loss_types=loss_type, loss_weights=weights or [1.0] * len(loss_type), beta=beta,
        label_smoothing=smoothing, use_weighting=weighting, _metrics={"train": defaultdict(list)},
        _total_train_tokens=0, _tp_size=1,
    )
    prompt_and = lambda x: torch.cat([torch.zeros(2 * P, 1, dtype=x.dtype), x], dim=1)
    inputs = dict(
        input_ids=prompt_and(mask), attention_mask=torch.ones(2 * P, T + 1, dtype=torch.long),
        completion_mask=prompt_and(mask),
    )
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    names = ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"]
    return case(
        loss, leaf, lengths, 2,
        loss_type=loss_type, loss_weights=weights or [], score=score, score_alpha=alpha, label_smoothing=smoothing,
        beta=beta, ld_alpha=ld_alpha, use_weighting=weighting, single_precision=dtype == torch.float32,
        reference_log_probs=flat(reference, lengths, 2),
        sharpened_log_probs=flat((2 * log_probs - log_sum_sq).detach(), lengths, 2),
        metrics={name: trainer._metrics["train"][name][0] for name in names},
    )


def cpo(loss_type, beta, gamma=0.5, cpo_alpha=0.0, alpha=0.0, smoothing=0.0):
    lengths = CHOSEN + REJECTED
    leaf, log_probs = policy(2 * P, lengths)
    mean = loss_type in ("ipo", "simpo")
    sums = log_probs.sum(1) / (torch.tensor(lengths) if mean else 1)
    trainer = SimpleNamespace(
        alpha=alpha, beta=beta, loss_type=loss_type, simpo_gamma=gamma, label_smoothing=smoothing, accelerator=ACCELERATOR
    )
    losses, chosen, rejected = CPOTrainer.cpo_loss(trainer, *sums.chunk(2))
    loss = losses.mean() - cpo_alpha * log_probs[:P].sum() / sum(CHOSEN)
    return case(
        loss, leaf, lengths, 2, loss_type=loss_type, beta=beta, gamma=gamma if loss_type == "simpo" else 0.0,
        cpo_alpha=cpo_alpha, alpha=alpha, label_smoothing=smoothing, mean=mean,
        metrics={"rewards/chosen": chosen.mean().item(), "rewards/rejected": rejected.mean().item()} if alpha == 0 else {},
    )


def orpo(beta):
    lengths = CHOSEN + REJECTED
    leaf, log_probs = policy(2 * P, lengths)
    means = log_probs.sum(1) / torch.tensor(lengths)
    trainer = SimpleNamespace(beta=beta, accelerator=ACCELERATOR)
    losses, _, _, ratio, odds = ORPOTrainer.odds_ratio_loss(trainer, *means.chunk(2))
    loss = -log_probs[:P].sum() / sum(CHOSEN) - losses.mean()
    return case(
        loss, leaf, lengths, 2, beta=beta, metrics={"log_odds_ratio": ratio.item(), "log_odds_chosen": odds.item()}
    )


def tpo(loss_type, tpo_alpha, beta, gamma=0.5):
    lengths = CHOSEN + REJECTED + GOLD
    mask = mask_of(lengths)
    # Two tokens, of which the first has the given log-prob.
    leaf, log_probs = policy(3 * P, lengths, level=-1.6)
    kept = torch.where(mask.bool(), leaf, torch.tensor(-1.0))
    logits = torch.stack([kept - torch.log1p(-kept.exp()), torch.zeros_like(kept)], dim=-1)
    logits = torch.cat([logits, torch.zeros(3 * P, 1, 2)], dim=1)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=ACCELERATOR, tpo_alpha=tpo_alpha, loss_type=loss_type, beta=beta,
        label_smoothing=0.0, tpo_l_gamma=gamma, _metrics={"train": defaultdict(list)}, _total_train_tokens=0,
        _tp_size=1,
    )
    prompt_and = lambda x: torch.cat([torch.zeros(3 * P, 1, dtype=x.dtype), x], dim=1)
    inputs = dict(
        input_ids=torch.zeros(3 * P, T + 1, dtype=torch.long), attention_mask=torch.ones(3 * P, T + 1, dtype=torch.long),
        completion_mask=prompt_and(mask),
    )
    model = lambda **kwargs: SimpleNamespace(logits=logits)
    loss = TPOTrainer._compute_loss(trainer, model, inputs, False)
    return case(
        loss, leaf, lengths, 3, loss_type=loss_type, tpo_alpha=tpo_alpha, beta=beta,
        gamma=gamma if loss_type == "tpo-l" else 0.0, mean=loss_type in ("ipo", "tpo-l"),
    )


# Unpaired: sequences in the order good, bad, good, bad, bad, and for KTO one mismatched completion for each.
LABELS = [True, False, True, False, False]


def kto(loss_type, desirable=1.0, undesirable=1.0, drift=1.0):
    mask, kl_mask = mask_of(CHOSEN), mask_of(REJECTED)
    leaf, log_probs = policy(P, CHOSEN)
    reference = (leaf.detach() + wave(P, 1.1, 1.0)) * mask
    kl_log_probs = (-1.4 + wave(P, 0.7, 1.0)) * kl_mask
    kl_reference = (kl_log_probs - drift * (0.3 + wave(P, 2.9, 0.5))) * kl_mask
    outputs = iter([kl_log_probs, log_probs] if loss_type == "kto" else [log_probs])
    references = iter([kl_reference, reference] if loss_type == "kto" else [reference])
    output = lambda values: SimpleNamespace(
        log_probs=values, entropy=values.detach(), mean_logits=values.detach(), aux_loss=None
    )
    model = lambda **kwargs: output(next(outputs))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=ACCELERATOR, calculate_KL=loss_type == "kto",
        aux_loss_enabled=False, precompute_ref_logps=False, ref_model=lambda **kwargs: output(next(references)),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), loss_type=loss_type, beta=0.1,
        desirable_weight=desirable, undesirable_weight=undesirable, _metrics={"train": defaultdict(list)},
        _total_train_tokens=0, _tp_size=1,
    )
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    prompt_and = lambda x: torch.cat([torch.zeros(P, 1, dtype=x.dtype), x], dim=1)
    ones = torch.ones(P, T + 1, dtype=torch.long)
    inputs = dict(
        input_ids=prompt_and(mask), attention_mask=ones, completion_mask=prompt_and(mask), label=torch.tensor(LABELS),
        KL_input_ids=prompt_and(kl_mask), KL_attention_mask=ones, KL_completion_mask=prompt_and(kl_mask),
    )
    loss = KTOTrainer._compute_loss(trainer, model, inputs, False)
    loss.backward()
    rows = lambda x, lengths: [row[:length] for row, length in zip(x.tolist(), lengths)]
    names = ["kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"]
    if loss_type != "kto":
        names.remove("kl")
    return dict(
        loss_type=loss_type, beta=0.1, desirable_weight=desirable, undesirable_weight=undesirable, labels=LABELS,
        loss=loss.item(), log_probs=rows(leaf, CHOSEN), gradient=rows(leaf.grad, CHOSEN),
        reference_log_probs=rows(reference, CHOSEN), kl_log_probs=rows(kl_log_probs, REJECTED),
        kl_reference_log_probs=rows(kl_reference, REJECTED),
        metrics={name: trainer._metrics["train"][name][0] for name in names},
    )


def bco(steps):
    """Several steps, because the baseline runs on."""
    moments = old("utils.py", "RunningMoments", None)
    loss_of = old("bco_trainer.py", "BCOTrainer", "bco_loss")
    running = moments(accelerator=SimpleNamespace(use_distributed=False))
    trainer = SimpleNamespace(beta=0.1, running=running, match_underlying_distribution=False)
    found = []
    for step in range(steps):
        lengths = CHOSEN
        leaf = (-1.2 + wave(P, 0.3 + step, 1.0)).requires_grad_()
        log_probs = leaf * mask_of(lengths)
        reference = (leaf.detach() + wave(P, 1.1 + step, 1.0)) * mask_of(lengths)
        good = torch.tensor(LABELS)
        sums, reference_sums = log_probs.sum(1), reference.sum(1)
        losses, chosen, rejected, delta = loss_of(
            trainer, sums[good], sums[~good], reference_sums[good], reference_sums[~good], None, None
        )
        loss = losses.mean()
        loss.backward()
        rows = lambda x: [row[:length] for row, length in zip(x.tolist(), lengths)]
        found.append(dict(
            beta=0.1, labels=LABELS, loss=loss.item(), log_probs=rows(leaf), gradient=rows(leaf.grad),
            reference_log_probs=rows(reference),
            metrics={
                "delta": float(delta), "rewards/chosen": chosen.mean().item(), "rewards/rejected": rejected.mean().item()
            },
        ))
    return found


def xpo(alpha):
    """The policy's completions are the chosen rows' lengths, the reference's the rejected ones'."""
    lengths = CHOSEN + REJECTED
    leaf, log_probs = policy(2 * P, lengths)
    reference = (leaf.detach() + wave(2 * P, 1.1, 1.0)) * mask_of(lengths)
    wins = torch.tensor([True, False, True, True, False])
    trainer = SimpleNamespace(beta=0.1, alpha=alpha, args=SimpleNamespace(loss_type="sigmoid"))
    loss, _, _ = old("xpo_trainer.py", "XPOTrainer", "_compute_losses")(
        trainer, log_probs[:P], log_probs[P:], reference[P:], reference[:P], wins
    )
    return case(
        loss, leaf, lengths, 2, alpha=alpha, beta=0.1, policy_wins=wins.tolist(),
        reference_log_probs=flat(reference, lengths, 2),
    )


def nash_md(beta):
    leaf, log_probs = policy(P, CHOSEN)
    reference = (leaf.detach() + wave(P, 1.1, 1.0)) * mask_of(CHOSEN)
    probability = torch.tensor([1.0, 0.0, 0.75, 0.5, 0.125])
    loss, score, kl = old("nash_md_trainer.py", "NashMDTrainer", "_compute_losses")(
        SimpleNamespace(beta=beta), log_probs, reference, probability
    )
    rows = lambda x: [value for row, length in zip(x.tolist(), CHOSEN) for value in row[:length]]
    loss.backward()
    return dict(
        beta=beta, probability=probability.tolist(), lengths=CHOSEN, loss=loss.item(), log_probs=rows(leaf),
        gradient=rows(leaf.grad), reference_log_probs=rows(reference),
        metrics={"objective/kl": kl.mean().item(), "loss/score": score.mean().item()},
    )


print(json.dumps(dict(
    trl=trl.__version__, chosen=CHOSEN, rejected=REJECTED, gold=GOLD,
    dpo=[
        dpo(name) for name in (
            "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
            "discopop", "sft", "sigmoid_norm",
        )
    ] + [
        dpo("exo_pair", smoothing=1e-3), dpo("robust", smoothing=0.1), dpo("aot", smoothing=0.2),
        dpo("sigmoid", beta=0.5, drift=3.0), dpo("hinge", beta=0.7), dpo("ipo", beta=0.7),
        dpo(["sigmoid", "bco_pair", "sft"], weights=[0.8, 0.2, 1.0]), dpo(["sigmoid", "sigmoid_norm"]),
        dpo("sigmoid", ld_alpha=0.0), dpo("sigmoid", ld_alpha=0.4), dpo("sigmoid_norm", ld_alpha=0.4),
        dpo("sigmoid", weighting=True), dpo("apo_zero", weighting=True),
        dpo("sigmoid", score="forward_kl"), dpo("ipo", score="forward_kl"), dpo("sigmoid", score="js_divergence"),
        dpo("hinge", score="js_divergence"),
        dpo("sigmoid", score="alpha_divergence", alpha=0.5, dtype=torch.float32),
        dpo("sigmoid_norm", score="alpha_divergence", alpha=2.0, dtype=torch.float32),
        dpo("sigmoid", score="alpha_divergence", alpha=1.0, dtype=torch.float32),
    ],
    cpo=[
        cpo("sigmoid", 0.1, cpo_alpha=1.0), cpo("sigmoid", 0.1, smoothing=0.1), cpo("hinge", 0.1), cpo("ipo", 0.1),
        cpo("simpo", 2.0, gamma=1.0), cpo("simpo", 2.5, gamma=0.25, alpha=0.25), cpo("simpo", 2.0, gamma=0.5, cpo_alpha=0.5),
    ],
    orpo=[orpo(0.1), orpo(1.0)],
    tpo=[tpo("sigmoid", 1.0, 0.01), tpo("tpo-l", 0.5, 2.0), tpo("ipo", 1.0, 0.5), tpo("hinge", 0.25, 0.1)],
    kto=[kto("kto"), kto("kto", desirable=1.5, undesirable=0.5), kto("kto", drift=-1.0), kto("apo_zero_unpaired")],
    bco=bco(3), xpo=[xpo(1e-2), xpo(0.5)], nash_md=[nash_md(0.1), nash_md(0.0)],
), indent=1))
