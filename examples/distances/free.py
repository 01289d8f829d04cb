"""Models that are bound to no family: a network that samples, and a kernel density."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor, nn

from benchmarks.harness.measure import time_interleaved
from examples.common.sample_distances import sliced_wasserstein, unit_vectors
from examples.distances import exact
from examples.distances.fit import FROM_SAMPLES, KINDS, Adversarial, descend
from examples.distances.targets import Mixture, grid, ring

CHUNK = 500  # points looked at together
FACTORS = [0.2, 0.3, 0.45, 0.65, 1.0, 1.4]  # of the rule of thumb's width


class Network(nn.Module):
    """Noise (n, 4) to points (n, 2): samples with a gradient, and no density that is known."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )

    def forward(self, count: int) -> Tensor:
        return self.layers(torch.randn(count, 4))


class KernelDensity:
    """The mean of Gaussians around the data (N, 2): no parameters to learn but the width.

    The width is chosen by the likelihood of data that are left out, one at a time.
    """

    def __init__(self, data: Tensor):
        self.data = data
        rule = float(data.std(0).mean()) * len(data) ** (-1 / 6)
        some = data[:1000]
        self.width = max(
            (rule * factor for factor in FACTORS),
            key=lambda width: float(self._log_prob(some, width, leave_out=True).mean()),
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """(n,) of points (n, 2). Cost: n N kernels."""
        return self._log_prob(x, self.width)

    def _log_prob(self, x: Tensor, width: float, leave_out: bool = False) -> Tensor:
        count = len(self.data) - leave_out
        norm = math.log(2 * math.pi * width**2 * count)
        found = []
        for start in range(0, len(x), CHUNK):
            part = x[start : start + CHUNK]
            kernels = torch.cdist(part, self.data).square() / (-2 * width**2)
            if leave_out:  # x is the beginning of the data
                rows = torch.arange(len(part))
                kernels[rows, start + rows] = -math.inf
            found.append(torch.logsumexp(kernels, 1) - norm)
        return torch.cat(found)

    def __call__(self, count: int) -> Tensor:
        chosen = self.data[torch.randint(len(self.data), (count,))]
        return chosen + self.width * torch.randn(count, 2)


def moment_fit(data: Tensor) -> Tensor:
    """The Gaussian along the axes of greatest likelihood, as `exact` has it."""
    return torch.cat([data.mean(0), data.var(0, correction=0).log()])


def by_data_size(target: Mixture, sizes: list[int], seeds: range) -> dict[str, list]:
    """KL(target, model) in nats of a kernel density and of a Gaussian, fitted to N data points."""
    points, area = grid(101)
    p = target.log_prob(points)
    points, weight = points.float(), p.exp() * area
    heavy = weight > 1e-12 * weight.max()  # where the target is, up to what no sum would notice
    found: dict[str, list] = {"kernel density": [], "Gaussian": []}
    for size in sizes:
        values: dict[str, list[float]] = {name: [] for name in found}
        for seed in seeds:
            torch.manual_seed(1000 + seed)
            data = target.sample(size)
            q = {
                "kernel density": KernelDensity(data).log_prob(points[heavy]),
                "Gaussian": exact.log_prob(moment_fit(data), points[heavy]),
            }
            for name, log_q in q.items():
                loss = weight[heavy] * (p[heavy] - log_q.double())
                values[name].append(float(loss.sum()))
        for name in found:
            found[name].append(statistics.mean(values[name]))
    return found


def cost(target: Mixture, sizes: list[int], seconds: float) -> dict[str, list[float]]:
    """Milliseconds for the density of 1,000 points, of a model fitted to N data points."""
    torch.manual_seed(0)
    queries = target.sample(1000)
    calls = {}
    for size in sizes:
        data = target.sample(size)
        density, parts = KernelDensity(data), moment_fit(data)
        calls["kernel density", size] = lambda density=density: density.log_prob(queries)
        calls["Gaussian", size] = lambda parts=parts: exact.log_prob(parts, queries)
    times = time_interleaved(calls, seconds=seconds)
    return {
        name: [statistics.median(times[name, size]) for size in sizes]
        for name in ("kernel density", "Gaussian")
    }


def on_the_ring(args, tick) -> dict:
    """Samples of each model of the ring, and what they show."""
    target = ring()
    torch.manual_seed(args.seed)
    data = target.sample(2000)
    parts = moment_fit(data)
    models = {"data": target.sample, "kernel density": KernelDensity(data)}
    models["Gaussian, likelihood"] = lambda n: parts[:2] + (parts[2:] / 2).exp() * torch.randn(n, 2)
    for kind in FROM_SAMPLES:
        torch.manual_seed(args.seed)
        models[f"network, {kind}"] = network = Network()
        loss = Adversarial(saturating=False) if kind.startswith("adv") else KINDS[kind].loss()
        descend(network, loss, target, args, rate=3e-3)
        tick()
    return {name: judge(model, target) for name, model in models.items()}


@torch.no_grad()
def judge(model, target: Mixture, count: int = 4000) -> dict:
    """Of its samples: how many lie within three widths of a bump, on how many bumps (as many
    equally frequent ones would be as hard to guess), and how far they are from new data."""
    torch.manual_seed(7)
    points, real = model(count), target.sample(count)
    width = target.covariances[0, 0, 0].sqrt()
    distance, nearest = torch.cdist(points, target.means.float()).min(1)
    share = nearest[distance < 3 * width].bincount(minlength=len(target.means)) / count
    entropy = torch.special.entr(share / share.sum().clamp(min=1e-9)).sum()
    return {
        "near": float(share.sum()), "bumps": float(entropy.exp()),
        "wasserstein": float(sliced_wasserstein(points, real, unit_vectors(64, 2)).sqrt()),
        "points": points[:1000].tolist(),
    }  # fmt: skip
