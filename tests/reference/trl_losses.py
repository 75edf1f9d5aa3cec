"""Reference values for the objectives, computed by TRL 1.16.0 on fixed tensors.

    pip install trl==1.16.0 && python tests/reference/trl_losses.py > tests/reference/trl_losses.json

`grpo` calls TRL's own `GRPOTrainer._compute_loss` with a stand-in for the trainer that hands it the log-probs; the
gradients are torch's. With `mismatch`, the tokens were sampled by other weights. TRL computes advantages inside its generation step, where they cannot be called on their own;
`advantages` repeats those lines with TRL's own `nanstd`. `policy` does the same for every other loss type, for GMPO and for RLOO; each case
names the options of this project that mean the same (shares of tokens are chosen so that no threshold, which TRL rounds to f32, is a token's own
entropy). `sft` is transformers' `ForCausalLMLoss` with TRL's global
number of items.
"""

import json
from collections import defaultdict
from types import SimpleNamespace

import torch
import trl
from transformers.loss.loss_utils import ForCausalLMLoss
from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.utils import nanstd

torch.set_default_dtype(torch.float64)
B, T, MAX_COMPLETION = 4, 6, 8
LENGTHS = [6, 2, 4, 1]


def wave(phase, scale):
    """Fixed numbers without structure, so that no random generator has to be trusted."""
    i = torch.arange(B * T, dtype=torch.float64)
    return (scale * torch.sin(12.9898 * i + phase)).reshape(B, T)


MASK = (torch.arange(T)[None, :] < torch.tensor(LENGTHS)[:, None]).long()


def flat(x):
    return [value for row, length in zip(x.tolist(), LENGTHS) for value in row[:length]]


def grpo(loss_type, beta, epsilon_high, drift, accumulation=1, mismatch=None):
    log_probs = (-1.5 + wave(0.0, 1.2)).requires_grad_()
    old = log_probs.detach() + wave(1.5, drift)
    reference = log_probs.detach() + wave(2.0, 0.7)
    entropy = 1.0 + wave(3.0, 0.5).abs()
    advantages = torch.tensor([1.25, -0.5, 0.0, -0.75])
    epsilon_high = epsilon_high or 0.2
    # TRL computes the ratio inside its generation step, where it cannot be called on its own; these are its lines for
    # `vllm_importance_sampling_mode="token_truncate"`.
    sampling = old + wave(4.0, mismatch or 0.0)
    ratio = torch.clamp(torch.exp((old - sampling) * MASK), max=2.0)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (log_probs, entropy, None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=epsilon_high,
        loss_type=loss_type,
        use_vllm=mismatch is not None,
        vllm_importance_sampling_correction=True,
        max_completion_length=MAX_COMPLETION,
        current_gradient_accumulation_steps=accumulation,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(B, T, dtype=torch.long)
    inputs = dict(
        prompt_ids=ids, prompt_mask=torch.ones_like(ids), completion_ids=ids, completion_mask=MASK,
        advantages=advantages, old_per_token_logps=old, ref_per_token_logps=reference,
        num_items_in_batch=MASK.sum(), importance_sampling_ratio=ratio,
    )
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    return dict(
        loss_type=loss_type, beta=beta, epsilon=0.2, epsilon_high=epsilon_high,
        log_probs=flat(log_probs), old_log_probs=flat(old), reference_log_probs=flat(reference), entropy=flat(entropy),
        advantages=advantages.tolist(), lengths=LENGTHS, max_completion_length=MAX_COMPLETION,
        sampling_log_probs=None if mismatch is None else flat(sampling), ratio=flat(ratio),
        loss=loss.item(), gradient=flat(log_probs.grad),
        metrics={name: values[0] for name, values in trainer._metrics["train"].items()},
    )


def sampling_ratio(old, sampling, mode, least, most):
    """TRL's lines for `vllm_importance_sampling_mode`, from inside its generation step."""
    difference = (old - sampling) * MASK
    if mode.startswith("sequence"):
        difference = difference.sum(dim=-1, keepdim=True)
    ratio = torch.exp(difference)
    if mode.endswith("truncate"):
        return torch.clamp(ratio, min=least, max=most)
    outside = (ratio < (least or 0.0)) | (ratio > most)
    return ratio.masked_fill(outside, 0.0)


def policy(options, trainer=GRPOTrainer, loss_type="dapo", drift=0.9, epsilon=(0.2, 0.2), correction=None, **settings):
    """A loss of TRL's and the `options` of this project that mean the same."""
    log_probs = (-1.5 + wave(0.0, 1.2)).requires_grad_()
    old = log_probs.detach() + wave(1.5, drift)
    reference = log_probs.detach() + wave(2.0, 0.7)
    entropy = (1.0 + wave(3.0, 0.5).abs()).requires_grad_()
    advantages = torch.tensor([1.25, -0.5, 0.0, -0.75])
    sampling = old + wave(4.0, 0.6)
    ids = torch.zeros(B, T, dtype=torch.long)
    inputs = dict(
        prompt_ids=ids, prompt_mask=torch.ones_like(ids), completion_ids=ids, completion_mask=MASK,
        advantages=advantages, old_per_token_logps=old, ref_per_token_logps=reference,
        old_logps=(old * MASK).sum(1), num_items_in_batch=MASK.sum(),
    )
    ratio = None
    if correction is not None:
        ratio = inputs["importance_sampling_ratio"] = sampling_ratio(old, sampling, *correction)
        inputs["sampling_per_token_logps"] = sampling
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (log_probs, entropy, None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=0.0, epsilon_low=epsilon[0], epsilon_high=epsilon[1],
        loss_type=loss_type, use_vllm=correction is not None, vllm_importance_sampling_correction=True,
        max_completion_length=MAX_COMPLETION, current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled="entropy_coef" in settings, use_adaptive_entropy=False,
        args=SimpleNamespace(
            use_bias_correction_kl=settings.pop("use_bias_correction_kl", False), delta=settings.pop("delta", None),
            steps_per_generation=1, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
            vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
        ),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True,
            pad_across_processes=lambda x, dim, pad_index: x,
        ),
        _metrics={"train": defaultdict(list)},
    )
    for name, value in settings.items():
        setattr(stand_in, name, value)
    for name in ("get_off_policy_mask", "get_gamma_weights"):
        setattr(stand_in, name, getattr(GRPOTrainer, name))
    stand_in.get_high_entropy_mask = lambda *args: GRPOTrainer.get_high_entropy_mask(stand_in, *args)
    loss = trainer._compute_loss(stand_in, stand_in.model, inputs)
    loss.backward()
    return dict(
        options=options, log_probs=flat(log_probs), old_log_probs=flat(old), reference_log_probs=flat(reference),
        entropy=flat(entropy), advantages=advantages.tolist(), lengths=LENGTHS, max_completion_length=MAX_COMPLETION,
        sampling_log_probs=None if correction is None else flat(sampling),
        loss=loss.item(), gradient=flat(log_probs.grad),
        entropy_gradient=None if entropy.grad is None else flat(entropy.grad),
        metrics={name: values[0] for name, values in stand_in._metrics["train"].items()},
    )


def policies():
    sequence = dict(importance_sampling_level="sequence")
    corrections = [
        ("token_truncate", 0.75, 1.5), ("token_mask", None, 1.5), ("token_mask", 0.75, 1.5),
        ("sequence_truncate", None, 1.5), ("sequence_mask", 0.5, 1.5),
    ]
    correct = lambda mode, least, most: dict(
        importance_sampling_mode=mode, importance_sampling_clip_min=least, importance_sampling_clip_max=most
    )
    return [
        policy(dict(aggregation="sequence", **sequence), loss_type="grpo", **sequence),
        policy(dict(aggregation="sequence_sum", **sequence), loss_type="luspo", **sequence),
        policy(dict(aggregation="token"), loss_type="bnpo"),
        policy(dict(delta=1.6), delta=1.6),
        policy(dict(delta=1.6, epsilon_high=0.28, aggregation="sequence"), loss_type="grpo", epsilon=(0.2, 0.28), delta=1.6),
        policy(dict(clip="cispo", epsilon_high=1.4), loss_type="cispo", epsilon=(0.2, 1.4)),
        policy(dict(clip="sapo", aggregation="sequence"), loss_type="sapo"),
        policy(dict(clip="vespo"), loss_type="vespo", drift=0.3),
    ] + [
        policy(dict(clip="vespo", **correct(*correction)), loss_type="vespo", drift=0.3, correction=correction)
        for correction in (corrections[0], corrections[3], corrections[4])
    ] + [
        policy(dict(clip="gmpo", aggregation="sequence", epsilon=0.4, epsilon_high=0.4), trainer=GMPOTrainer, epsilon=(0.4, 0.4)),
        policy(
            dict(clip="gmpo", aggregation="sequence", epsilon=0.4, epsilon_high=0.4, beta=0.1), trainer=GMPOTrainer,
            epsilon=(0.4, 0.4), beta=0.1,
        ),
        policy(
            dict(importance_sampling_level="sequence_product", aggregation="sequence"), trainer=RLOOTrainer, drift=0.15,
        ),
        policy(dict(top_entropy_quantile=0.4), top_entropy_quantile=0.4),
        policy(dict(off_policy_mask_threshold=0.05), off_policy_mask_threshold=0.05),
        policy(dict(beta=0.1, use_bias_correction_kl=True), beta=0.1, use_bias_correction_kl=True),
        policy(
            dict(beta=0.1, use_bias_correction_kl=True, aggregation="sequence", **sequence), loss_type="grpo", beta=0.1,
            use_bias_correction_kl=True, **sequence,
        ),
        policy(
            dict(beta=0.1, top_entropy_quantile=0.45, off_policy_mask_threshold=0.05, **correct(*corrections[1])),
            beta=0.1, top_entropy_quantile=0.45, off_policy_mask_threshold=0.05, correction=corrections[1],
        ),
        policy(dict(entropy_coef=0.3), entropy_coef=0.3),
        policy(dict(entropy_coef=0.3, aggregation="sequence", beta=0.1), loss_type="grpo", entropy_coef=0.3, beta=0.1),
        policy(dict(entropy_coef=0.3, clip="cispo", epsilon_high=1.4), loss_type="cispo", epsilon=(0.2, 1.4), entropy_coef=0.3),
        policy(dict(entropy_coef=0.3, top_entropy_quantile=0.4), entropy_coef=0.3, top_entropy_quantile=0.4),
    ] + [policy(correct(*correction), correction=correction) for correction in corrections]


def advantages(rewards, group):
    rewards = torch.tensor(rewards)
    grouped = rewards.view(-1, group)
    mean = torch.nanmean(grouped, dim=1).repeat_interleave(group)
    std = nanstd(grouped, dim=1).repeat_interleave(group)
    counts = (~torch.isnan(grouped)).sum(dim=1, keepdim=True)
    leave_one_out = rewards - ((torch.nansum(grouped, dim=1, keepdim=True) - grouped) / (counts - 1)).view(-1)
    values = dict(
        group_mean_std=(rewards - mean) / (std + 1e-4),
        group_mean=rewards - mean,
        batch=(rewards - mean) / (nanstd(rewards) + 1e-4),
        leave_one_out=leave_one_out,
    )
    return dict(
        rewards=[None if r != r else r for r in rewards.tolist()], group=group,
        **{name: torch.nan_to_num(value, nan=0.0).tolist() for name, value in values.items()},
    )


def sft():
    vocabulary = 7
    logits = (2.0 * torch.sin(78.233 * torch.arange(B * T * vocabulary) + 0.5)).reshape(B, T, vocabulary)
    targets = (torch.arange(B * T) * 5 % vocabulary).reshape(B, T)
    labels = torch.where(MASK.bool(), targets, -100)
    # 3 further tokens belong to other micro-batches of the step.
    items = MASK.sum() + 3
    loss = ForCausalLMLoss(logits, None, vocabulary, num_items_in_batch=items, shift_labels=labels)
    log_probs = logits.log_softmax(-1)
    return dict(
        log_probs=flat(log_probs.gather(-1, targets[..., None])[..., 0]),
        entropy=flat(-(log_probs.exp() * log_probs).sum(-1)), correct=flat(logits.argmax(-1) == targets),
        lengths=LENGTHS, items=items.item(), loss=loss.item(),
    )


print(json.dumps(dict(
    trl=trl.__version__,
    grpo=[
        grpo(loss_type, beta, epsilon_high, drift)
        for loss_type in ("dapo", "grpo", "dr_grpo")
        for beta, epsilon_high, drift in ((0.0, None, 0.0), (0.0, 0.28, 0.9), (0.04, None, 0.9))
    ] + [
        grpo(loss_type, beta, None, drift, mismatch=1.4)
        for loss_type in ("dapo", "grpo", "dr_grpo")
        for beta, drift in ((0.0, 0.0), (0.04, 0.9))
    ],
    policy=policies(),
    advantages=[
        advantages([1.0, 0.0, 0.25, 1.0, 0.5, 0.5, 0.5, 0.5, -2.0, 3.0, 0.125, 7.5], 4),
        advantages([1.0, float("nan"), 0.25, 0.0, 2.0, float("nan"), 1.0, 4.0], 4),
    ],
    sft=sft(),
), indent=1))
