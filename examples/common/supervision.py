"""One image tower and its teachers: captions by contrast, the words of captions, or labels.

    model = TwoTowers(ImageTower(), TextTower(len(words)))
    TowerRun("CLIP", path, model, CONTRASTS["CLIP"]["fused"], batches, steps, settings)

    tagger = Classifier(ImageTower(), len(words), bias=-6)
    TowerRun("words", path, tagger, word_loss, batches, steps, settings)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import tilewise as tw
from benchmarks.baselines import eager_clip_loss, eager_sigmoid_loss
from examples.common.towers import PAD, UNKNOWN, ImageTower
from examples.common.training import Run, optimize, shift

LOSSES: dict[str, dict[str, Callable]] = {
    "SigLIP": {"fused": tw.sigmoid_loss, "eager": eager_sigmoid_loss},
    "CLIP": {"fused": tw.clip_loss, "eager": eager_clip_loss},
}


class Classifier(nn.Module):
    """An image tower with one logit for each word or class, in place of its own head.

    Args:
        bias: of all logits at first. Of many words a picture has few, which -6 says beforehand.
    """

    def __init__(self, image: ImageTower, outputs: int, bias: float = 0.0):
        super().__init__()
        self.image = image
        self.logits = nn.Linear(image.head.in_features, outputs)
        nn.init.constant_(self.logits.bias, bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits(self.image.features(images))

    def optimizer(self, tower_rate: float = 2e-3) -> torch.optim.AdamW:
        groups = [{"params": [*self.parameters()], "peak": tower_rate, "weight_decay": 0.1}]
        return torch.optim.AdamW(groups, betas=(0.9, 0.95))


# ---- losses of a model on pictures and their targets


def apply(loss: Callable, image, text, scale, bias) -> torch.Tensor:
    """One of the losses above on features and scalars; CLIP's has no bias."""
    biased = loss in LOSSES["SigLIP"].values()
    return loss(image, text, scale, bias) if biased else loss(image, text, scale)


def contrast(loss: Callable) -> Callable:
    """One of the losses above as one of two towers, pictures and tokens."""
    return lambda model, images, tokens: apply(loss, *model(images, tokens))


CONTRASTS = {
    kind: {name: contrast(loss) for name, loss in both.items()} for kind, both in LOSSES.items()
}


def bag_of_words(tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """float (N, vocabulary): 1 for each known word of a caption, of word indices (N, L)."""
    there = torch.zeros(len(tokens), vocabulary, device=tokens.device).scatter_(1, tokens, 1)
    there[:, [PAD, UNKNOWN]] = 0
    return there


def word_loss(model: nn.Module, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Every word of the vocabulary a yes/no question: whether it is in the caption."""
    logits = model(images)  # (B, vocabulary)
    there = bag_of_words(tokens, logits.shape[1])
    loss = F.binary_cross_entropy_with_logits(logits, there, reduction="sum")
    return loss / len(logits)


def label_loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(images), labels)


# ---- training


class RowBatches:
    """Batch `step` of a seeded run: `size` rows of two tensors, none twice in an epoch."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor, size: int, seed: int):
        self.inputs, self.targets, self.size, self.seed = inputs, targets, size, seed
        self.latest: tuple = (None, None)  # an epoch and its order

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, i = divmod(step, max(1, len(self.targets) // self.size))
        if self.latest[0] != epoch:
            order = torch.randperm(len(self.targets), generator=self.generator(2 * epoch))
            self.latest = epoch, order
        rows = self.latest[1][i * self.size : (i + 1) * self.size]
        return self.inputs[rows], self.targets[rows]

    def generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + number)


class LabelBatches(RowBatches):
    """Pictures, moved by up to a pixel, and labels (B,)."""

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = super().__call__(step)
        return shift(images, self.generator(2 * step + 1)), labels


class TowerRun(Run):
    """Trains a model by a loss of (model, images, targets).

    Args:
        batches: step -> (images, targets), as training.Batches.
        settings: what must be equal for a checkpoint to be taken up.
        rate: the highest learning rate of the towers.
    """

    def __init__(self, label: str, path: Path, model: nn.Module, loss: Callable,
                 batches: Callable, steps: int, settings: dict, rate: float = 2e-3,
                 device: str = "cpu"):  # fmt: skip
        model = model.to(device)
        settings = {**settings, "steps": steps, "rate": rate}
        super().__init__(label, path, model, model.optimizer(rate), steps, settings)
        self.loss, self.batches, self.device = loss, batches, device

    def before(self, step: int) -> None:
        self.images, self.targets = (x.to(self.device) for x in self.batches(step))

    def step(self, step: int) -> None:
        value = self.loss(self.model, self.images, self.targets)
        value.backward()
        optimize(self.optimizer, step, self.steps, warmup=max(1, min(20, self.steps // 8)))
        self.history["loss"].append(value.item())
