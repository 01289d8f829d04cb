"""Noise of a backend, how likely it is under its law, and whether neighbours are independent."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import tilewise as tw
from tilewise.reference import _philox

COLUMNS = 4096
BINS = 2**14
TAILS = [1e-3, 1e-4, 1e-5, 1e-6]
EULER, VARIANCE = 0.5772156649015329, math.pi**2 / 6  # mean and variance of a Gumbel variate


def gumbel(rows: int, cols: int, seed: int, row_offset: int) -> Tensor:
    """The backend's Gumbel noise in float64: (rows, cols).

    With equal logits, log y is the noise less a constant of its row, which the reference's noise
    of the first column tells.
    """
    logits = torch.zeros(1, 1).expand(rows, cols)
    noise = tw.gumbel_softmax(logits, seed=seed, row_offset=row_offset).double().log_()
    first = _philox.gumbel(torch.tensor(seed), rows, 1, row_offset)
    return noise.add_(first - noise[:, :1])


def gaussian(rows: int, cols: int, seed: int, row_offset: int) -> Tensor:
    """The backend's normal noise: a sample of mean 0 and variance 1."""
    zero = torch.zeros(1, 1).expand(rows, cols)
    return tw.gaussian_sample(zero, zero, seed=seed, row_offset=row_offset)[0].double()


def gumbel_uniforms(rows: int, cols: int, seed: int, row_offset: int = 0) -> Tensor:
    """The uniform variates that Gumbel noise was made of."""
    return gumbel(rows, cols, seed, row_offset).neg_().exp_().neg_().expm1_().neg_()


def gaussian_uniforms(rows: int, cols: int, seed: int, row_offset: int = 0) -> Tensor:
    """The uniform variates that pairs of normal noise were made of."""
    x, y = gaussian(rows, cols, seed, row_offset).unflatten(1, (-1, 2)).unbind(-1)
    angle = torch.atan2(y, x) / (2 * math.pi)
    first = torch.exp(-(x.square() + y.square()) / 2)
    return torch.stack([first, angle - angle.floor()], -1).flatten(1)


@dataclass
class Law:
    """A distribution: `probability` of a smaller draw and of a larger one, and moments.

    `powers` turns draws into one column for each moment, of the given means and variances.
    """

    draw: Callable[[int, int, int, int], Tensor]
    probability: Callable[[Tensor], tuple[Tensor, Tensor]]
    powers: Callable[[Tensor], list[Tensor]]
    means: list[float]
    variances: list[float]
    smallest: float = 0.0  # steps of the lower tail's probability


def gumbel_probability(g: Tensor) -> tuple[Tensor, Tensor]:
    exponential = torch.exp(-g)
    return torch.exp(-exponential), -torch.expm1(-exponential)


def gumbel_powers(g: Tensor) -> list[Tensor]:
    exponential = torch.exp(-g)
    return [g - EULER, (g - EULER).square(), exponential, exponential.square()]


LAWS = {
    "gumbel": Law(
        gumbel, gumbel_probability, gumbel_powers, [0, VARIANCE, 1, 2],
        [VARIANCE, 4.4 * VARIANCE**2, 1, 20],
        smallest=2.0**-24,  # of u near 1, where the losing tail is
    ),
    "gaussian": Law(
        gaussian, lambda x: (torch.special.ndtr(x), torch.special.ndtr(-x)),
        lambda x: [x, x.square(), x**3, x**4], [0, 1, 0, 3], [1, 2, 15, 96],
    ),
}


@dataclass
class Summary:
    """What is left of many draws: counts of probabilities, of tails, sums of powers."""

    law: Law
    draws: int
    finite: bool
    counts: Tensor  # (BINS,)
    tails: Tensor  # (len(TAILS), 2)
    sums: Tensor  # of powers

    def tail_probabilities(self) -> list[tuple[float, float]]:
        """Of the lower tail, which has steps, halfway between two of them; and of the upper one."""
        step = self.law.smallest
        return [((math.floor(p / step) + 0.5) * step if step else p, p) for p in TAILS]


def summarise(name: str, seed: int, draws: int, chunk: int = 2**22) -> Summary:
    """Rows follow each other as in a training run: by row_offset."""
    law = LAWS[name]
    summary = Summary(law, draws, True, torch.zeros(BINS, dtype=torch.int64),
                      torch.zeros(len(TAILS), 2, dtype=torch.int64),
                      torch.zeros(len(law.means), dtype=torch.float64))
    limits = torch.tensor(summary.tail_probabilities(), dtype=torch.float64)
    rows = min(chunk, draws) // COLUMNS
    for start in range(0, draws // COLUMNS, rows):
        noise = law.draw(rows, COLUMNS, seed, start)
        summary.finite &= bool(noise.isfinite().all())
        below, above = law.probability(noise)
        cells = (below * BINS).long().clamp_(0, BINS - 1).flatten()
        summary.counts += torch.bincount(cells, minlength=BINS)
        for i, (low, high) in enumerate(limits.tolist()):
            summary.tails[i] += torch.stack([(below < low).sum(), (above < high).sum()])
        summary.sums += torch.stack([power.sum() for power in law.powers(noise)])
    return summary


def normal_p(z: float) -> float:
    """How likely a standard normal variate is as far out as z."""
    return math.erfc(abs(z) / math.sqrt(2))


def poisson_p(count: int, expected: float) -> float:
    """Likewise a Poisson count, to both sides."""
    k, mean = (torch.tensor(float(v), dtype=torch.float64) for v in (count, expected))
    at_most = float(torch.special.gammaincc(k + 1, mean))
    at_least = float(torch.special.gammainc(k, mean)) if count else 1.0
    return min(1.0, 2 * min(at_most, at_least))


def chi_square_p(observed: Tensor, expected: Tensor, least: float = 10.0) -> float:
    """Of counts; cells where fewer than `least` are expected are taken together."""
    observed, expected = observed.double().flatten(), expected.double().flatten()
    if observed[expected == 0].any():
        return 0.0
    order = expected.argsort(descending=True)
    observed, expected = observed[order], expected[order]
    kept = max(int((expected >= least).sum()), 1)
    if 0 < float(expected[kept:].sum()) < least:
        kept -= 1  # too little even together: beside the rarest of the others
    cells = [torch.cat([x[:kept], x[kept:].sum()[None]]) for x in (observed, expected)]
    observed, expected = (x[cells[1] > 0] for x in cells)
    statistic = ((observed - expected).square() / expected).sum()
    degrees = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2)) if len(expected) > 1 else 1.0


def kolmogorov_smirnov_p(counts: Tensor) -> float:
    """Of equally likely cells in order: the largest difference of the distributions at an edge."""
    draws = int(counts.sum())
    edges = torch.arange(1, len(counts) + 1, dtype=torch.float64) / len(counts)
    distance = float((counts.cumsum(0) / draws - edges).abs().max())
    scaled = (math.sqrt(draws) + 0.12 + 0.11 / math.sqrt(draws)) * distance
    terms = ((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * sum(terms))) if scaled > 0.2 else 1.0


def law_p(summary: Summary) -> dict[str, float]:
    """Kolmogorov and Smirnov's test, and chi-square, which sees narrow gaps."""
    expected = torch.full((BINS,), summary.draws / BINS)
    return {
        "distance": kolmogorov_smirnov_p(summary.counts),
        "cells": chi_square_p(summary.counts, expected),
    }


def tail_p(summary: Summary) -> dict[str, float]:
    """The number of draws beyond each quantile, to both sides."""
    probabilities = summary.tail_probabilities()
    return {
        f"{side} {p:.0e}": poisson_p(int(counts[i]), summary.draws * pair[i])
        for p, pair, counts in zip(TAILS, probabilities, summary.tails, strict=True)
        for i, side in enumerate(("below", "above"))
    }


def moment_p(summary: Summary) -> dict[str, float]:
    law, n = summary.law, summary.draws
    return {
        f"moment {i}": normal_p((float(total) - n * mean) / math.sqrt(n * variance))
        for i, (total, mean, variance) in enumerate(
            zip(summary.sums, law.means, law.variances, strict=True)
        )
    }


def neighbours(seed: int, rows: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Variates that lie side by side in some way; no two pairs share one."""
    u = gumbel_uniforms(rows, COLUMNS, seed)
    yield "rows", u[::2], u[1::2]
    for lag in (1, 2, 3, 4, 16):
        pairs = u[:, : COLUMNS // (2 * lag) * 2 * lag].unflatten(1, (-1, 2, lag))
        yield f"columns {lag} apart", pairs[:, :, 0], pairs[:, :, 1]
    calls = u.unflatten(1, (-1, 4))
    for i, j in itertools.combinations(range(4), 2):
        yield f"words {i} and {j}", calls[..., i], calls[..., j]
    yield "last and first word", calls[:, :-1, 3], calls[:, 1:, 0]
    for step in (1, 2**32):
        yield f"seeds {step} apart", u, gumbel_uniforms(rows, COLUMNS, seed + step)
    yield "rows 2^32 apart", u, gumbel_uniforms(rows, COLUMNS, seed, 2**32)
    v = gaussian_uniforms(rows, COLUMNS, seed)
    yield "gumbel and gaussian", u, v
    yield "rows of gaussian", v[::2], v[1::2]
    pairs = gaussian(rows, COLUMNS, seed, 0).unflatten(1, (-1, 2))
    low = torch.special.ndtr(pairs)
    yield "sine and cosine", low[..., 0], low[..., 1]
    yield "pairs of gaussian", low[:, :-1, 1], low[:, 1:, 0]


def independence_p(seeds: list[int], rows: int = 256) -> dict[str, float]:
    """Correlation, and chi-square over 16 x 16 cells, of all pairs of neighbours."""
    products: dict[str, Tensor] = {}
    cells: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for seed in seeds:
        for name, a, b in neighbours(seed, rows):
            cell = ((a * 16).long().clamp(0, 15) * 16 + (b * 16).long().clamp(0, 15)).flatten()
            cells[name] = cells.get(name, 0) + torch.bincount(cell, minlength=256)
            products[name] = products.get(name, 0.0) + 12 * ((a - 0.5) * (b - 0.5)).sum()
            sizes[name] = sizes.get(name, 0) + a.numel()
    result = {}
    for name, size in sizes.items():
        result[f"correlation: {name}"] = normal_p(float(products[name]) / math.sqrt(size))
        result[f"cells: {name}"] = chi_square_p(cells[name], torch.full((256,), size / 256))
    return result


def frequency_p(logits: Tensor, draws: int, seed: int, hard: bool = False) -> float:
    """Samples of one row of logits against its softmax."""
    cols = len(logits)
    counts = torch.zeros(cols, dtype=torch.int64)
    rows = max(min(draws, 2**22) // cols, 1)
    chunks = max(draws // (rows * cols), 1)
    for i in range(chunks):
        many, stream = logits.expand(rows, cols), dict(seed=seed, row_offset=i * rows)
        if hard:
            counts += tw.gumbel_softmax(many, 0.5, True, **stream).long().sum(0)
        else:
            counts += torch.bincount(tw.gumbel_argmax(many, **stream), minlength=cols)
    return chi_square_p(counts, chunks * rows * logits.double().softmax(-1))


def without_replacement_p(logits: Tensor, k: int, draws: int, seed: int) -> float:
    """Ordered draws of k categories against Plackett and Luce's probabilities."""
    cols = len(logits)
    index = tw.gumbel_argmax(logits.expand(draws // cols, cols), k, seed=seed)
    code = (index * cols ** torch.arange(k)).sum(-1)
    counts = torch.bincount(code, minlength=cols**k)
    p = logits.double().softmax(-1).tolist()
    expected = torch.zeros(cols**k, dtype=torch.float64)
    for order in itertools.permutations(range(cols), k):
        left, chance = 1.0, 1.0
        for j in order:
            chance, left = chance * p[j] / left if left > 0 else 0.0, left - p[j]
        expected[sum(j * cols**i for i, j in enumerate(order))] = chance
    return chi_square_p(counts, len(index) * expected)


def repeats_in_the_winning_tail(draws: int, seed: int, largest: int = 1000) -> int:
    """How many of the largest Gumbel variates occur twice: hardly one where u is dense near 0."""
    noise = gumbel(draws // COLUMNS, COLUMNS, seed, 0).flatten()
    top = noise.topk(largest).values.float()
    return largest - len(top.unique())
