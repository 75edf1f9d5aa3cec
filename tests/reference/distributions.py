"""Reference values for the losses of whole distributions: distillation, unlearning, forms of supervised fine-tuning.

    pip install trl==1.16.0 && python tests/reference/distributions.py > tests/reference/distributions.json

`divergences` calls TRL's `GKDTrainer.generalized_jsd_loss` (its beta 0 is forward KL, its beta 1 reverse KL); the skewed
divergences are torch's `kl_div` against the mixture. `smoothed` is transformers' `LabelSmoother`. `dft` repeats TRL's line for
`loss_type="dft"`, `eaft` the paper's formula. `unlearning` computes NPO, SimNPO and CE-U from their definitions. `minillm` differentiates
the paper's objective on fixed samples. All gradients are torch's, with respect to the logits.
"""

import json

import torch
import torch.nn.functional as F
import trl
from transformers.trainer_pt_utils import LabelSmoother
from trl.experimental.gkd.gkd_trainer import GKDTrainer

torch.set_default_dtype(torch.float64)
N, V = 5, 31
LENGTHS = [3, 2]


def wave(phase, scale):
    """Fixed numbers without structure, exact in f32, so that no random generator has to be trusted."""
    i = torch.arange(N * V, dtype=torch.float64)
    return (scale * torch.sin(12.9898 * i + phase)).float().double().reshape(N, V)


STUDENT, TEACHER, SECOND = wave(0.3, 2.5), wave(1.7, 3.0), wave(4.1, 2.0)
TOKENS = torch.arange(N) * 7 % V
WEIGHTS = torch.tensor([0.2, 0.2, 0.1, 0.3, 0.05])


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0].flatten().tolist()


def case(per_row, logits, **more):
    """Values of rows, and the gradient of their weighted sum."""
    return dict(rows=per_row.tolist(), gradient=gradient((WEIGHTS * per_row).sum(), logits), **more)


def divergence(kind, parameter, temperature):
    logits = STUDENT.clone().requires_grad_()
    p, q = (logits / temperature).log_softmax(-1), (TEACHER / temperature).log_softmax(-1)
    if kind in ("skew_kl", "skew_reverse_kl"):
        first, other = (q, p) if kind == "skew_kl" else (p, q)
        mixture = (parameter * first.exp() + (1 - parameter) * other.exp()).log()
        rows = F.kl_div(mixture, first, reduction="none", log_target=True).sum(-1)
    else:
        beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(kind, parameter)
        rows = torch.stack([
            GKDTrainer.generalized_jsd_loss(logits[i:i + 1, None], TEACHER[i:i + 1, None], beta=beta,
                                            temperature=temperature, reduction="sum")
            for i in range(N)
        ])
    return case(rows, logits, divergence=kind, parameter=parameter, temperature=temperature)


def mixture(mixing, shares):
    """Reverse KL to two teachers."""
    logits = STUDENT.clone().requires_grad_()
    p, teachers = logits.log_softmax(-1), [TEACHER, SECOND]
    kl = lambda q: (p.exp() * (p - q)).sum(-1)
    if mixing == "losses":
        rows = sum(s * kl(t.log_softmax(-1)) for s, t in zip(shares, teachers))
    elif mixing == "logits":
        rows = kl(sum(s * t for s, t in zip(shares, teachers)).log_softmax(-1))
    else:
        rows = kl(sum(s * t.softmax(-1) for s, t in zip(shares, teachers)).log())
    return case(rows, logits, mixing=mixing, shares=shares)


def minillm(gamma, normalise):
    """Equation 6 of arXiv 2306.08543 without clipping, with length normalisation of equation 9: TOKENS are the samples."""
    logits = STUDENT.clone().requires_grad_()
    p, q = logits.log_softmax(-1), TEACHER.log_softmax(-1)
    pick = lambda x: x.gather(-1, TOKENS[:, None])[:, 0]
    rewards = (pick(q) - pick(p)).detach()
    returns, start = torch.zeros(N), 0
    for length in LENGTHS:
        for t in range(length):
            later = [(gamma ** (i - t - 1), rewards[start + i]) for i in range(t + 1, length)]
            total = sum((g * r for g, r in later), torch.tensor(0.0))
            count = sum(g for g, _ in later)
            returns[start + t] = gamma * (total / count if normalise and count else total)
        start += length
    rows = (p.exp() * (p - q)).sum(-1) - returns * pick(p)
    return case(rows, logits, gamma=gamma, normalise=normalise, rewards=rewards.tolist(), returns=returns.tolist())


def smoothed(epsilon):
    logits = STUDENT.clone().requires_grad_()
    smoother = LabelSmoother(epsilon=epsilon)
    rows = torch.stack([
        smoother({"logits": logits[None, i:i + 1]}, TOKENS[None, i:i + 1])
        for i in range(N)
    ])
    return case(rows, logits, epsilon=epsilon)


def dft():
    logits = STUDENT.clone().requires_grad_()
    log_probs = logits.log_softmax(-1).gather(-1, TOKENS[:, None])[:, 0]
    return case(-log_probs * log_probs.exp().detach(), logits)


def eaft(alpha):
    logits = STUDENT.clone().requires_grad_()
    top = logits.detach().topk(20, dim=-1).values.softmax(-1)
    weight = (-(top * top.log()).sum(-1) / torch.tensor(20.0).log()) ** alpha
    log_probs = logits.log_softmax(-1).gather(-1, TOKENS[:, None])[:, 0]
    return case(-log_probs * weight, logits, alpha=alpha)


def ce_u():
    """The soft-label cross-entropy of the definition; its constant part is the entropy of the target."""
    logits = STUDENT.clone().requires_grad_()
    target = logits.detach().scatter(-1, TOKENS[:, None], -torch.inf).softmax(-1)
    rows = F.cross_entropy(logits, target, reduction="none")
    entropy = torch.special.entr(target).sum(-1)
    return case(rows, logits, entropy=entropy.tolist())


def unlearning(kind, beta, margin):
    log_probs = (-1.5 + WEIGHTS.sin() * 3).requires_grad_()
    reference = -1.2 + WEIGHTS.cos()
    sums = lambda x: torch.stack([part.sum() for part in x.split(LENGTHS)])
    lengths = torch.tensor(LENGTHS)
    if kind == "npo":
        rows = -2 / beta * F.logsigmoid(-beta * (sums(log_probs) - sums(reference)))
    else:
        rows = -2 / beta * F.logsigmoid(-beta * sums(log_probs) / lengths - margin)
    loss = rows.sum() / 4
    return dict(kind=kind, beta=beta, margin=margin, log_probs=log_probs.tolist(), reference=reference.tolist(), rows=4,
                loss=loss.item(), gradient=torch.autograd.grad(loss, log_probs)[0].tolist())


print(json.dumps(dict(
    trl=trl.__version__, vocabulary=V, lengths=LENGTHS, tokens=TOKENS.tolist(), weights=WEIGHTS.tolist(),
    student=STUDENT.flatten().tolist(), teacher=TEACHER.flatten().tolist(), second=SECOND.flatten().tolist(),
    divergences=[
        divergence(kind, parameter, temperature)
        for kind, parameter in (("forward_kl", 0.0), ("reverse_kl", 0.0), ("jensen_shannon", 0.5), ("jensen_shannon", 0.2),
                                ("skew_kl", 0.1), ("skew_reverse_kl", 0.1), ("skew_kl", 0.6), ("skew_reverse_kl", 0.6))
        for temperature in (1.0, 0.7)
    ],
    mixtures=[mixture("losses", [0.25, 0.75]), mixture("probabilities", [0.25, 0.75]), mixture("logits", [1.75, -0.75])],
    minillm=[minillm(1.0, True), minillm(1.0, False), minillm(0.9, True), minillm(0.0, True)],
    smoothed=[smoothed(0.1), smoothed(0.4)], dft=dft(), eaft=[eaft(1.0), eaft(2.0)],
    ce_u=ce_u(), unlearning=[unlearning("npo", 0.1, 0.0), unlearning("npo", 1.0, 0.0), unlearning("simnpo", 2.5, 0.7)],
), indent=1))
