"""Linear probes: how good a linear classifier of a tower's features is, by the number of labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from examples.common.towers import ImageTower, embed

PENALTIES = [10.0**p for p in range(-4, 3)]  # of a ridge, relative to the features' mean square


class Labels(NamedTuple):
    """Pictures of one kind and their labels, as features of one tower or another."""

    train: tuple[torch.Tensor, torch.Tensor]  # (N, ...), int64 (N,)
    validation: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]

    def seen_by(self, tower: nn.Module | None) -> Labels:
        parts = ((features(tower, images), labels) for images, labels in self)
        return Labels(*parts)


def features(tower: ImageTower | None, images: torch.Tensor) -> torch.Tensor:
    """(N, D): the last map of a tower, averaged over quarters of the picture; or pixels, 8 x 8."""
    if tower is None:
        return F.avg_pool2d(images.float() / 255, 4).flatten(1)
    last = embed(tower, images, "features")
    return F.avg_pool2d(last.view(len(images), -1, 4, 4), 2).flatten(1)


def ridges(x: torch.Tensor, y: torch.Tensor, classes: int) -> list:
    """Linear classifiers (weight (D, classes), bias (classes,)), one for each of PENALTIES.

    Least squares on one-hot labels with a squared penalty: in closed form, by one decomposition.
    """
    mean = x.mean(0)
    x = (x - mean).double()
    target = F.one_hot(y, classes).double()
    share = target.mean(0)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    rotated = u.T @ (target - share)  # (min(N, D), classes)
    level = s.square().sum() / len(s)
    found = []
    for penalty in PENALTIES:
        weight = (vt.T * (s / (s.square() + penalty * level + 1e-12))) @ rotated
        weight = weight.float()
        found.append((weight, share.float() - mean @ weight))
    return found


def accuracy(classifier, x: torch.Tensor, y: torch.Tensor) -> float:
    weight, bias = classifier
    return ((x @ weight + bias).argmax(1) == y).float().mean().item()


def few(labels: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of `count` labels of each class, or of all that it has."""
    order = torch.randperm(len(labels), generator=generator)
    rank = torch.empty_like(order)
    shuffled = labels[order]
    for label in labels.unique():
        own = (shuffled == label).nonzero().flatten()
        rank[own] = torch.arange(len(own))
    return order[rank < count]


def curve(known: Labels, classes: int, counts: list[int], seed: int) -> list[tuple[int, float]]:
    """(number of labels, test accuracy) for each number of labels of a class; the penalty of each
    is the best on validation."""
    found = []
    for count in counts:
        rows = few(known.train[1], count, torch.Generator().manual_seed(seed))
        made = ridges(known.train[0][rows], known.train[1][rows], classes)
        best = max(made, key=lambda one: accuracy(one, *known.validation))
        found.append((len(rows), accuracy(best, *known.test)))
    return found
