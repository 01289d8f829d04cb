"""The same loop for every distance; what differs is the loss, and what it asks of the two sides."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewise as tw
from examples.common.sample_distances import mmd, sliced_wasserstein, unit_vectors
from examples.common.training import warmup_cosine
from examples.distances import exact
from examples.distances.targets import Mixture
from tilewise import estimators

DIRECTIONS, CRITIC_STEPS = 32, 4
Sampler = Callable[[int], Tensor]  # a number of samples -> (n, 2)
Loss = Callable[[nn.Module, Mixture, int], Tensor]


class AxisGaussian(nn.Module):
    """A Gaussian along the axes, N(0, 1) at first: with a density, and samples with a gradient."""

    def __init__(self):
        super().__init__()
        self.mean, self.logvar = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def forward(self, count: int) -> Tensor:
        return tw.gaussian_sample(self.mean.expand(count, 2), self.logvar.expand(count, 2)).z

    def distribution(self) -> estimators.Gaussian:
        return estimators.Gaussian(self.mean[None], self.logvar[None])

    def parts(self) -> Tensor:
        """(4,): as `exact` has it."""
        return torch.cat([self.mean, self.logvar])


# ---- what has a density


def likelihood(model: AxisGaussian, target: Mixture, batch: int) -> Tensor:
    """KL(target, model) but for the target's entropy: minus the mean log-likelihood of data."""
    return -exact.log_prob(model.parts(), target.sample(batch)).mean()


def reverse_kl(estimator: Callable[..., Tensor], **options) -> Loss:
    """KL(model, target): minus the model's entropy, and an expectation over the model's samples."""

    def loss(model: AxisGaussian, target: Mixture, batch: int) -> Tensor:
        expected = estimator(
            lambda z: -target.log_prob(z), model.distribution(), batch, **options
        )  # (1,)
        return expected.mean() - model.logvar.sum() / 2

    return loss


# ---- what has samples only


def discrepancy(model: nn.Module, target: Mixture, batch: int) -> Tensor:
    return mmd(model(batch), target.sample(batch), exact.WIDTHS)


def sliced(model: nn.Module, target: Mixture, batch: int) -> Tensor:
    return sliced_wasserstein(model(batch), target.sample(batch), unit_vectors(DIRECTIONS, 2))


class Adversarial:
    """A critic learns to tell data from samples; at its best its error is 2 JS - log 4, with the
    Jensen-Shannon divergence JS. The model raises that error.

    Args:
        saturating: the model's loss is log(1 - D), which belongs to JS. Otherwise -log D, whose
            gradient does not vanish where the critic is sure: what is used where fits are poor.
    """

    def __init__(self, saturating: bool = True, width: int = 64, rate: float = 5e-3):
        self.saturating = saturating
        self.critic = nn.Sequential(
            nn.Linear(2, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
        )  # fmt: skip
        self.optimizer = torch.optim.Adam(self.critic.parameters(), rate, betas=(0.5, 0.99))

    def __call__(self, model: nn.Module, target: Mixture, batch: int) -> Tensor:
        for _ in range(CRITIC_STEPS):
            with torch.no_grad():
                made = model(batch)
            self.optimizer.zero_grad()
            real, fake = self.critic(target.sample(batch)), self.critic(made)
            (F.softplus(-real) + F.softplus(fake)).mean().backward()
            self.optimizer.step()
        logits = self.critic(model(batch))
        return (-F.softplus(logits) if self.saturating else F.softplus(-logits)).mean()


class Kind(NamedTuple):
    """A way to learn: what it asks of the data and of the model, the distance that it lowers."""

    data: str
    model: str
    distance: Callable[[Tensor, Mixture], Tensor]
    loss: Callable[[], Loss]  # makes one for a run


SAMPLES, DENSITY = "samples", "density"
KINDS: dict[str, Kind] = {
    "forward KL, likelihood": Kind(SAMPLES, DENSITY, exact.forward_kl, lambda: likelihood),
    "reverse KL, reparameterised": Kind(
        "density, its slope", "entropy, samples with a gradient", exact.reverse_kl,
        lambda: reverse_kl(estimators.reparameterized),
    ),
    "reverse KL, score function": Kind(
        DENSITY, "density, samples", exact.reverse_kl,
        lambda: reverse_kl(estimators.score_function, baseline="leave_one_out"),
    ),
    "maximum mean discrepancy": Kind(
        SAMPLES, "samples with a gradient", exact.mmd, lambda: discrepancy
    ),
    "sliced Wasserstein": Kind(
        SAMPLES, "samples with a gradient", exact.sliced_wasserstein, lambda: sliced
    ),
    "adversarial, JS": Kind(
        SAMPLES, "samples with a gradient", exact.jensen_shannon, Adversarial
    ),
}  # fmt: skip
FROM_SAMPLES = [kind for kind, of in KINDS.items() if of.model == "samples with a gradient"]


def descend(model: nn.Module, loss: Loss, target: Mixture, args, rate: float) -> float:
    """Trains it in place; milliseconds of a step."""
    optimizer = torch.optim.Adam(model.parameters(), rate, betas=(0.5, 0.99))
    began = time.perf_counter()
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = rate * warmup_cosine(step, args.steps, warmup=1)
        optimizer.zero_grad()
        loss(model, target, args.batch).backward()
        optimizer.step()
    return 1e3 * (time.perf_counter() - began) / args.steps


def fit(kind: str, target: Mixture, args, seed: int) -> dict:
    """A Gaussian's means and log-variances after training, and how good they are."""
    torch.manual_seed(seed)
    model = AxisGaussian()
    milliseconds = descend(model, KINDS[kind].loss(), target, args, args.rate)
    parts = model.parts().detach().double()
    return {
        "parts": parts.tolist(), "ms": milliseconds,
        "distance": float(KINDS[kind].distance(parts, target)),
        "forward": float(exact.forward_kl(parts, target)),
        "reverse": float(exact.reverse_kl(parts, target)),
    }  # fmt: skip
