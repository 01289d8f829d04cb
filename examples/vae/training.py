"""The digits, and one run of training for each model."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewise as tw
from examples.common.data import split_digits
from examples.common.training import Run, batch_rows, warmup_cosine
from examples.vae import models

SIZE, VARIABLES, KINDS = 16, 20, 10  # numbers; variables and categories
BATCH = 50


class Data(NamedTuple):
    """Grey pixels (N, 784) in [0, 1] and labels; held-out digits are also binary, once for all."""

    seen: Tensor
    labels: Tensor
    heldout: Tensor
    heldout_labels: Tensor
    binary: Tensor


def digits(without: int | None = None) -> Data:
    """4,000 and 1,000 of MNIST. `without`: this digit is not among those that are seen."""
    seen, heldout = split_digits()
    keep = seen.labels != (-1 if without is None else without)
    grey = [(x.float() / 255).flatten(1) for x in (seen.images[keep], heldout.images)]
    return Data(grey[0], seen.labels[keep], grey[1], heldout.labels, drawn(grey[1], 0))


def drawn(grey: Tensor, seed: int) -> Tensor:
    """Binary pixels, each 1 as often as it is bright: the usual binary MNIST."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(grey.shape, generator=generator) < grey).float()


def batch(grey: Tensor, step: int, seed: int) -> Tensor:
    """Grey pixels of batch `step`, which depends on its number and the seed alone."""
    return grey[batch_rows(step, len(grey), BATCH, seed)]


def falling(steps: int) -> tw.nn.ExponentialSchedule:
    """From 1 to 0.4 in two thirds of the steps."""
    return tw.nn.ExponentialSchedule(start=1.0, end=0.4, rate=0.916 / max(steps * 2 / 3, 1))


def latents(kind: str, steps: int) -> nn.Module:
    """By the names that tables and curves have."""

    def categories(estimator: str, **options) -> models.Categories:
        return models.Categories(VARIABLES, KINDS, estimator, **options)

    made = {
        "normal": lambda: models.Normal(SIZE),
        "normal, eager": lambda: models.EagerNormal(SIZE),
        "normal, eager, other noise": lambda: models.EagerNormal(SIZE),
        "normal, without fours": lambda: models.Normal(SIZE),
        "uniform": lambda: models.Uniform(SIZE),
        "normal, of two": lambda: models.Normal(2),
        "uniform, of two": lambda: models.Uniform(2),
        "Gumbel-softmax, tau 1 to 0.4": lambda: categories("gumbel_softmax", tau=falling(steps)),
        "Gumbel-softmax, tau 1": lambda: categories("gumbel_softmax", tau=1.0),
        "Gumbel-softmax, tau 0.4": lambda: categories("gumbel_softmax", tau=0.4),
        "straight-through": lambda: categories("straight_through"),
        "score function": lambda: categories("score_function", baseline="leave_one_out"),
        "codes": lambda: models.Codes(VARIABLES, 32, 16, falling(steps)),
    }
    return made[kind]()


CATEGORICAL = [
    "Gumbel-softmax, tau 1 to 0.4", "Gumbel-softmax, tau 1", "Gumbel-softmax, tau 0.4",
    "straight-through", "score function",
]  # fmt: skip


class VaeRun(Run):
    """Runs of one seed share first weights, order of batches and binary pixels."""

    def __init__(self, kind: str, data: Data, args, steps: int):
        torch.manual_seed(args.seed)
        model = models.Vae(latents(kind, steps))
        models.begin_at_mean(model.decoder, data.seen.mean(0))
        super().__init__(
            kind, args.out / f"{kind.replace(', ', '-').replace(' ', '-')}.pt", model,
            torch.optim.Adam(model.parameters(), args.rate, fused=True), steps,
            {"steps": steps, "seed": args.seed}, ("bound",),
        )  # fmt: skip
        self.data, self.seed, self.rate = data, args.seed, args.rate
        self.noise = (2 if kind.endswith("other noise") else 1) * 1_000_003

    def before(self, step: int) -> None:
        self.x = drawn(batch(self.data.seen, step, self.seed), self.seed * 1_000_003 + step)
        torch.manual_seed((self.seed + self.noise) * 1_000_003 + step)

    def step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * warmup_cosine(step, self.steps, warmup=20)
        self.optimizer.zero_grad()
        loss = self.model.loss(self.x).mean()
        loss.backward()
        self.optimizer.step()
        self.history["loss"].append(loss.item())

    def evaluate(self) -> None:
        torch.manual_seed(0)
        self.model.eval()
        bound = self.model.bound(self.data.binary).mean().item()
        self.history["bound"].append([self.done, bound])

    def note(self) -> str:
        text = f"seen {statistics.mean(self.history['loss'][-40:]):.1f}"
        if self.history["bound"]:
            text += f"   held out {self.history['bound'][-1][1]:.1f} nats"
        return text


class GanRun(Run):
    """The critic and the generator learn in turn, with the loss that does not saturate."""

    def __init__(self, data: Data, args, steps: int):
        torch.manual_seed(args.seed)
        model = models.Gan(SIZE)
        models.begin_at_mean(model.generator, data.seen.mean(0))
        optimizer = torch.optim.Adam([
            {"params": model.critic.parameters(), "lr": 5e-4},
            {"params": model.generator.parameters(), "lr": 1e-3},
        ], betas=(0.5, 0.99), fused=True)  # fmt: skip
        settings = {"steps": steps, "seed": args.seed}
        super().__init__("GAN", args.out / "gan.pt", model, optimizer, steps, settings)
        self.data, self.seed = data, args.seed

    def before(self, step: int) -> None:
        self.x = batch(self.data.seen, step, self.seed)
        torch.manual_seed(self.seed * 1_000_003 + step)

    def step(self, step: int) -> None:
        critic = self.model.judge
        self.optimizer.zero_grad()
        made = self.model(BATCH)
        loss = (F.softplus(-critic(self.x)) + F.softplus(critic(made.detach()))).mean()
        loss.backward()
        self.model.critic.requires_grad_(False)
        F.softplus(-critic(made)).mean().backward()
        self.model.critic.requires_grad_(True)
        self.optimizer.step()
        self.history["loss"].append(loss.item())
