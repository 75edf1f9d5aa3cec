"""Reference values for the parts of policy gradients that TRL 1.16.0 does not have.

    pip install torch && python tests/reference/policy_losses.py > tests/reference/policy_losses.json

Everything is written token by token, straight from the papers' formulas; gradients are torch's. `losses`: GSPO-token (arXiv
2507.18071), DPPO (2602.04879), Clip-Cov and KL-Cov (2505.22617), the plain ratio, and the estimates of the divergence.
`advantages`: PPO with two lambdas and whitening, REINFORCE, REINFORCE++ (2501.03262) and its baseline form, ReMax (2310.10505),
RLOO (2402.14740) with the divergence in the reward. `values`: PPO's value loss.
"""

import json
import math

import torch

torch.set_default_dtype(torch.float64)
LENGTHS = [6, 2, 4, 1]
TOKENS = sum(LENGTHS)
ADVANTAGES = [1.25, -0.5, 0.4, -0.75]


def wave(phase, scale):
    return [scale * math.sin(12.9898 * i + phase) for i in range(TOKENS)]


def sequences(flat):
    """The values of each sequence."""
    parts, start = [], 0
    for length in LENGTHS:
        parts.append(flat[start : start + length])
        start += length
    return parts


def binary_kl(old, new):
    """Divergence of the choice "this token or another"."""
    return old * math.log(old / new) + (1 - old) * math.log((1 - old) / (1 - new))


def loss(options, surrogate, drift=0.5, reference=None, direction="reverse"):
    """The mean over tokens of minus a surrogate, and its gradient; `surrogate` sees the whole update."""
    log_probs = [torch.tensor(-1.0 + x, requires_grad=True) for x in wave(0.0, 0.9)]
    old = [x.item() + y for x, y in zip(log_probs, wave(1.5, drift))]
    rho = [x.item() + y for x, y in zip(log_probs, wave(2.0, 0.7))]
    draws = [0.5 + x for x in wave(5.0, 0.49)]
    advantages = [a for a, n in zip(ADVANTAGES, LENGTHS) for _ in range(n)]
    terms = surrogate(log_probs, old, advantages, draws)
    total = sum(-term for term in terms) / TOKENS
    if reference is not None:
        total = total + options["beta"] * sum(reference(d) for d in (r - x for r, x in zip(rho, log_probs))) / TOKENS
    total.backward()
    return dict(
        options=options, lengths=LENGTHS, log_probs=[x.item() for x in log_probs], old_log_probs=old,
        reference_log_probs=rho, advantages=ADVANTAGES, draws=draws, loss=total.item(),
        gradient=[0.0 if x.grad is None else x.grad.item() for x in log_probs],
    )


def plain(log_probs, old, advantages, draws):
    return [torch.exp(x - o) * a for x, o, a in zip(log_probs, old, advantages)]


def ppo_term(x, o, a, low=0.2, high=0.2):
    ratio = torch.exp(x - o)
    return torch.minimum(ratio * a, torch.clamp(ratio, 1 - low, 1 + high) * a)


def gspo_token(log_probs, old, advantages, draws):
    terms = []
    for new, before, paid in zip(sequences(log_probs), sequences(old), sequences(advantages)):
        shared = math.exp(sum(x.item() - o for x, o in zip(new, before)) / len(new))
        for x, a in zip(new, paid):
            ratio = shared * torch.exp(x - x.item())
            terms.append(torch.minimum(ratio * a, torch.clamp(ratio, 0.8, 1.2) * a))
    return terms


def dppo(distance, limit, most):
    def surrogate(log_probs, old, advantages, draws):
        terms = []
        for x, o, a in zip(log_probs, old, advantages):
            new, before = math.exp(x.item()), math.exp(o)
            leaving = (new - before) * a > 0 and distance(before, new) > limit
            terms.append((0.0 if leaving else min(new / before, most)) * a * x)
        return terms

    return surrogate


def covariances(log_probs, advantages):
    mean = sum(x.item() for x in log_probs) / TOKENS
    paid = sum(advantages) / TOKENS
    return [(a - paid) * (x.item() - mean) for x, a in zip(log_probs, advantages)]


def clip_cov(share, least, most):
    def surrogate(log_probs, old, advantages, draws):
        terms, free = [], []
        for t, (x, o, a) in enumerate(zip(log_probs, old, advantages)):
            terms.append(ppo_term(x, o, a))
            ratio = math.exp(x.item() - o)
            if not (ratio > 1.2 and a > 0 or ratio < 0.8 and a < 0) and least < covariances(log_probs, advantages)[t] < most:
                free.append(t)
        for t in sorted(free, key=lambda t: draws[t])[: max(1, int(share * TOKENS))]:
            terms[t] = terms[t] * 0.0
        return terms

    return surrogate


def kl_cov(share, penalty):
    def surrogate(log_probs, old, advantages, draws):
        terms = plain(log_probs, old, advantages, draws)
        order = sorted(range(TOKENS), key=lambda t: -covariances(log_probs, advantages)[t])
        for t in order[: max(1, int(share * TOKENS))]:
            terms[t] = terms[t] - penalty * abs(log_probs[t] - old[t])
        return terms

    return surrogate


def straight_through(value, gradient):
    return lambda d: value(d.detach()) + gradient(d) - gradient(d).detach()


def k1(d):
    return -d


def k2(d):
    return d * d / 2


def k3(d):
    return torch.exp(d) - d - 1


def losses():
    nothing = lambda log_probs, old, advantages, draws: [0.0 * x for x in log_probs]
    estimates = {
        ("k1", "reverse"): k1, ("k2", "reverse"): k2, ("k3", "reverse"): k3,
        ("k1+", "reverse"): straight_through(k1, k2), ("k3+", "reverse"): straight_through(k3, k2),
        ("k1", "forward"): lambda d: torch.exp(d) * d, ("k2", "forward"): k2,
        ("k3", "forward"): lambda d: torch.exp(d) * d - torch.exp(d) + 1,
        ("k1+", "forward"): straight_through(lambda d: torch.exp(d) * d, k2),
        ("k3+", "forward"): straight_through(lambda d: torch.exp(d) * d - torch.exp(d) + 1, k2),
    }
    return [
        loss(dict(clip="none"), plain),
        loss(dict(importance_sampling_level="sequence_token"), gspo_token),
        loss(dict(clip="dppo_tv", epsilon=0.05, delta=1.4), dppo(lambda old, new: abs(old - new), 0.05, 1.4)),
        loss(dict(clip="dppo_kl", epsilon=0.02, delta=20.0), dppo(binary_kl, 0.02, 20.0)),
        loss(dict(clip="clip_cov", cov_ratio=0.2, clip_cov_min=0.1, clip_cov_max=5.0), clip_cov(0.2, 0.1, 5.0)),
        loss(dict(clip="clip_cov", cov_ratio=1e-3, clip_cov_min=0.05, clip_cov_max=0.6), clip_cov(1e-3, 0.05, 0.6)),
        loss(dict(clip="kl_cov", cov_ratio=0.25, kl_cov_coef=0.7), kl_cov(0.25, 0.7)),
    ] + [
        loss(dict(clip="ppo", beta=0.3, kl=name, kl_direction=direction), lambda l, o, a, d: [ppo_term(*z) for z in zip(l, o, a)],
             reference=estimate)
        for (name, direction), estimate in estimates.items()
    ]


def whitened(values, shift=True):
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return [(v - mean) / math.sqrt(variance + 1e-8) + (0.0 if shift else mean) for v in values]


def gae(rewards, values, gamma, lam):
    """The sum over k of (gamma lam)^k times the later errors, term by term."""
    errors = [
        r + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t, r in enumerate(rewards)
    ]
    return [sum((gamma * lam) ** k * errors[t + k] for k in range(len(errors) - t)) for t in range(len(errors))]


SCORES = [1.0, -0.25, 0.5, 2.0]
GROUPS = [2, 2]
PENALTIES = [-0.1 * (1.0 + x) for x in wave(0.7, 1.0)]
VALUES = wave(2.5, 0.6)
GREEDY = [0.3, 1.5]


def token_rewards(scores):
    rewards = [list(part) for part in sequences(PENALTIES)]
    for own, score in zip(rewards, scores):
        own[-1] += score
    return rewards


def baseline(scores, kind):
    found = []
    for start in (0, 2):
        group = scores[start : start + 2]
        for i, own in enumerate(group):
            others = [r for j, r in enumerate(group) if j != i]
            found.append({
                "group_mean": sum(group) / 2, "leave_one_out": sum(others) / len(others), "greedy": GREEDY[start // 2],
                "none": 0.0,
            }[kind])
    return found


def ppo(options, gamma, lam, lam_value, whiten_rewards):
    rewards = [r for own in token_rewards(SCORES) for r in own]
    if whiten_rewards:
        rewards = whitened(rewards, shift=False)
    pairs = list(zip(sequences(rewards), sequences(VALUES)))
    advantages = [a for r, v in pairs for a in gae(r, v, gamma, lam)]
    returns = [a + x for r, v in pairs for a, x in zip(gae(r, v, gamma, lam_value), v)]
    return dict(options=options, tokens=whitened(advantages), returns=returns)


def by_token(options, kind, gamma):
    """Discounted rewards from each token on, minus a baseline of the scores."""
    tokens = []
    for own, b in zip(token_rewards(SCORES), baseline(SCORES, kind)):
        tokens += [sum(gamma**k * own[t + k] for k in range(len(own) - t)) - b for t in range(len(own))]
    return dict(options=options, tokens=whitened(tokens) if options.get("whiten_advantages") else tokens)


def by_sequence(options, kind):
    """The sum of a completion's rewards, minus a baseline of such sums."""
    sums = [sum(own) for own in token_rewards(SCORES)]
    advantages = [r - b for r, b in zip(sums, baseline(sums, kind))]
    tokens = [a for a, n in zip(advantages, LENGTHS) for _ in range(n)]
    return dict(options=options, tokens=whitened(tokens) if options.get("whiten_advantages") else tokens)


def advantages():
    none = dict(scale_rewards="none")
    return [
        ppo(dict(baseline="value", gamma=0.98, lam=0.9, whiten_advantages=True), 0.98, 0.9, 0.9, False),
        ppo(
            dict(baseline="value", lam=0.95, lam_value=1.0, whiten_rewards=True, whiten_advantages=True), 1.0, 0.95, 1.0, True,
        ),
        by_token(dict(baseline="none", credit="token", **none), "none", 1.0),
        by_token(dict(baseline="none", credit="token", gamma=0.9, whiten_advantages=True, **none), "none", 0.9),
        by_token(dict(baseline="greedy", credit="token", **none), "greedy", 1.0),
        by_sequence(dict(baseline="greedy", **none), "greedy"),
        by_sequence(dict(baseline="leave_one_out", **none), "leave_one_out"),
        by_sequence(dict(baseline="group_mean", whiten_advantages=True, **none), "group_mean"),
    ]


def values(clip):
    new = [torch.tensor(x, requires_grad=True) for x in wave(0.4, 0.8)]
    old = [x.item() + y for x, y in zip(new, wave(3.1, 0.4))]
    returns = wave(4.2, 1.0)
    losses = []
    for x, o, r in zip(new, old, returns):
        free = (x - r) ** 2
        held = (torch.clamp(x, o - clip, o + clip) - r) ** 2 if clip is not None else free
        losses.append(torch.maximum(free, held) / 2)
    total = sum(losses) / TOKENS
    total.backward()
    acted = sum(
        1 for x, o, r in zip(new, old, returns)
        if clip is not None and (min(max(x.item(), o - clip), o + clip) - r) ** 2 > (x.item() - r) ** 2
    )
    return dict(
        clip=clip, values=[x.item() for x in new], old_values=old, returns=returns, loss=total.item(),
        gradient=[x.grad.item() for x in new], held=acted / TOKENS,
    )


print(json.dumps(dict(
    torch=torch.__version__, losses=losses(),
    step=dict(scores=SCORES, groups=GROUPS, lengths=LENGTHS, penalties=PENALTIES, values=VALUES, greedy=GREEDY),
    advantages=advantages(), values=[values(None), values(0.2)],
), indent=1))
