"""Calling a pair a match where its cosine lies above a threshold, and what the probability says.

    pairs = of_scores(cosines, candidates=512)  # as among 512 candidates, of which one matches
    precision, recall, f1 = called(pairs, threshold=-logit_bias / logit_scale)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def log_odds(candidates: float) -> float:
    """log(1 / (B - 1)): one pair of a row matches, the B - 1 others do not."""
    return -math.log(candidates - 1)


class Cosines(NamedTuple):
    """Cosines of matching and of other pairs, and how many others a row has: B - 1.

    All N (N - 1) others are used, each weighed so that a row has as many as among B candidates.
    """

    match: Tensor  # (N,)
    other: Tensor  # (N (N - 1),)
    candidates: float

    @property
    def weight(self) -> float:
        """Of one other pair, where a match weighs 1."""
        return (self.candidates - 1) * len(self.match) / len(self.other)


def of_scores(scores: Tensor, candidates: float) -> Cosines:
    """From cosines (N, N) whose diagonal matches."""
    match = torch.eye(len(scores), dtype=torch.bool)
    return Cosines(scores[match], scores[~match], candidates)


def called(pairs: Cosines, threshold: float) -> tuple[float, float, float]:
    """Precision, recall and F1 of calling a match what is above the threshold."""
    right = (pairs.match > threshold).sum().item()
    wrong = (pairs.other > threshold).sum().item() * pairs.weight
    precision = right / (right + wrong) if right + wrong else 0.0
    found = right / len(pairs.match)
    return precision, found, 2 * right / (right + wrong + len(pairs.match))


def best_threshold(pairs: Cosines) -> float:
    """The cosine with the best F1: every one of a match is tried, from just below it."""
    tried = pairs.match.sort().values
    wrong = pairs.other.sort().values
    above = len(wrong) - torch.searchsorted(wrong, tried)  # other pairs at or above each
    right = len(tried) - torch.arange(len(tried))
    f1 = 2 * right / (right + above * pairs.weight + len(tried))
    return tried[f1.argmax()].item() - 1e-6


def calibration(pairs: Cosines, scale: float, bias: float, bins: int = 12) -> dict:
    """What sigmoid(t s + b) says beside what is: in bins of it, and over the calls.

    Returns "said" (matches a picture; there is 1), "claimed" (the mean probability of what is
    called a match, to be compared with the precision of the calls), "error" (how far what is said
    in a bin is from what is there, summed over the bins, matches a picture), "loss", and the points
    of the "curve".
    """
    p, q = (torch.sigmoid(scale * s.double() + bias) for s in (pairs.match, pairs.other))
    edges = torch.cat([torch.tensor([0.0]), torch.logspace(-5, 0, bins, dtype=torch.float64)])
    rows = len(pairs.match)
    curve, error = [], 0.0
    for low, high in zip(edges, edges[1:], strict=False):
        inside, outside = ((x > low) & (x <= high) for x in (p, q))
        all_pairs = inside.sum() + outside.sum() * pairs.weight
        said = (p[inside].sum() + q[outside].sum() * pairs.weight).item()
        error += abs(said - inside.sum().item()) / rows
        if said >= 3:  # of fewer matches a share says little
            curve.append([said / all_pairs.item(), (inside.sum() / all_pairs).item()])
    sure, unsure = (p > 0.5).sum().item(), (q > 0.5).sum().item() * pairs.weight
    claimed = (p[p > 0.5].sum() + q[q > 0.5].sum() * pairs.weight).item()
    loss = (F.softplus(-(scale * pairs.match + bias)).mean()
            + F.softplus(scale * pairs.other + bias).mean() * (pairs.candidates - 1))  # fmt: skip
    return {
        "said": (p.sum() + q.sum() * pairs.weight).item() / rows, "error": error,
        "claimed": claimed / (sure + unsure) if sure + unsure else None, "curve": curve,
        "loss": loss.item(),
    }  # fmt: skip


def fit(pairs: Cosines, steps: int = 40) -> tuple[float, float]:
    """t and b with the lowest loss where the cosines stay as they are: Newton's method, in float64.

    The loss is SigLIP's with B candidates, a convex function of the two.
    """
    z = torch.cat([pairs.match, pairs.other]).double()
    y = torch.cat([torch.ones(len(pairs.match)), torch.zeros(len(pairs.other))]).double()
    weight = torch.where(y == 1, 1.0, pairs.weight) / len(pairs.match)
    x = torch.stack([z, torch.ones_like(z)], 1)  # (P, 2)
    theta = torch.tensor([10.0, log_odds(pairs.candidates) - 10.0 * z.mean().item()]).double()

    def loss(theta: Tensor) -> Tensor:
        return (weight * F.softplus((1 - 2 * y) * (x @ theta))).sum()

    for _ in range(steps):
        p = torch.sigmoid(x @ theta)
        slope = x.T @ (weight * (p - y))
        curvature = x.T @ (x * (weight * p * (1 - p))[:, None])
        move = torch.linalg.solve(curvature + 1e-9 * torch.eye(2).double(), slope)
        size = 1.0
        while size > 1e-6 and loss(theta - size * move) > loss(theta):
            size /= 2
        theta = theta - size * move
        if (size * move).abs().max() < 1e-8:
            break
    return theta[0].item(), theta[1].item()


def ranked_right(scores: Tensor, right: Tensor) -> float:
    """The share of pairs of a right and a wrong one (bool (N,)) in which the right one has the
    higher score; equal scores count half. The area under the ROC curve."""
    ordered = scores[~right].sort().values
    below = torch.searchsorted(ordered, scores[right])
    until = torch.searchsorted(ordered, scores[right], right=True)
    return ((below + until).float().mean() / 2 / len(ordered)).item()
