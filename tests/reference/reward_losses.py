"""Reference values for the losses of reward models, on fixed numbers.

    python tests/reference/reward_losses.py > tests/reference/reward_losses.json

`pairs` calls TRL's own `RewardTrainer.compute_loss` with a stand-in for the trainer; `log_exp` is OpenRLHF's form of the same loss.
`classified` is the loss transformers gives a `ForTokenClassification` model, which is what TRL's `PRMTrainer` minimises; `labelled` and
`rankings` are torch's functions. Gradients are torch's.
"""

import json
from collections import defaultdict
from types import SimpleNamespace

import torch
import transformers
import trl
from torch.nn import functional as F
from transformers.loss.loss_utils import ForTokenClassification
from trl.trainer.reward_trainer import RewardTrainer

torch.set_default_dtype(torch.float64)


def wave(count, phase, scale):
    """Fixed numbers without structure, so that no random generator has to be trusted."""
    return scale * torch.sin(12.9898 * torch.arange(count, dtype=torch.float64) + phase)


def pairs(center, margin):
    scores = wave(12, 0.4, 3.0).requires_grad_()
    margins = wave(6, 2.0, 1.0).abs() if margin else None
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {"attention_mask": torch.ones(12, 3), **({"margin": margins} if margin else {})}

    def model(**_):
        return SimpleNamespace(logits=scores[:, None])

    model.training = True
    loss = RewardTrainer.compute_loss(trainer, model, inputs)
    loss.backward()
    metrics = {key: value[-1] for key, value in trainer._metrics["train"].items() if key != "num_tokens"}
    chosen, rejected = scores.detach().chunk(2)
    return dict(
        center=center or 0.0, margins=[0.0] * 6 if margins is None else margins.tolist(),
        chosen=chosen.tolist(), rejected=rejected.tolist(), loss=loss.item(),
        gradient=scores.grad.tolist(), metrics=metrics,
        log_exp=torch.log(1 + torch.exp(rejected - chosen)).mean().item(),
    )


def labelled(name):
    scores = wave(7, 1.1, 2.5).requires_grad_()
    labels = torch.tensor([1.0, 0.0, 0.25, 1.0, 0.0, 0.7, 0.0])
    if name == "mse":
        labels = labels * 4 - 1
        loss = F.mse_loss(scores, labels)
    else:
        loss = F.binary_cross_entropy_with_logits(scores, labels)
    loss.backward()
    return dict(name=name, scores=scores.tolist(), labels=labels.tolist(), loss=loss.item(), gradient=scores.grad.tolist())


def classified():
    outputs = wave(15, 0.2, 2.0).reshape(5, 3).requires_grad_()
    classes = [2, 0, 1, 1, 2]
    # Steps among tokens without a label.
    rows = torch.zeros(1, 9, 3)
    labels = torch.full((1, 9), -100)
    places = [1, 2, 5, 7, 8]
    labels[0, places] = torch.tensor(classes)
    loss = ForTokenClassification(rows.index_copy(1, torch.tensor(places), outputs[None]), labels, SimpleNamespace(num_labels=3))
    loss.backward()
    accuracy = (outputs.argmax(-1) == torch.tensor(classes)).double().mean().item()
    return dict(
        outputs=outputs.tolist(), classes=classes, loss=loss.item(), accuracy=accuracy,
        gradient=outputs.grad.flatten().tolist(),
    )


def rankings():
    scores = wave(6, 0.9, 1.5).requires_grad_()
    lengths = [4, 2]
    total = 0.0
    for ranking in scores.split(lengths):
        for place in range(len(ranking)):
            total = total - ranking[place:].log_softmax(0)[0]
    loss = total / len(lengths)
    loss.backward()
    return dict(scores=scores.tolist(), lengths=lengths, loss=loss.item(), gradient=scores.grad.tolist())


print(json.dumps(dict(
    trl=trl.__version__, transformers=transformers.__version__, torch=torch.__version__,
    pairs=[pairs(center, margin) for center in (None, 0.01, 0.3) for margin in (False, True)],
    labelled=[labelled("bce"), labelled("mse")],
    classified=classified(),
    rankings=rankings(),
)))
