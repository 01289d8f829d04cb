"""VQ-VAE on real pictures: our quantiser beside one in plain PyTorch, from one seed.

    python -m examples.vqvae             # both data sets; about four minutes on two cores
    python -m examples.vqvae --quick     # a look at every stage in half a minute
    python -m examples.vqvae --resume    # go on from the checkpoints in --out
    python -m examples.vqvae --ablate    # also: what keeps the codes of the pictures in use

Neural Discrete Representation Learning, van den Oord et al. 2017 (arXiv 1711.00937): an encoder, a
codebook whose codes are moving averages, a decoder, gradients straight through. The first third of
the steps goes without the codebook, which then starts at the k-means of features that mean
something; codes that hardly any cell chooses start again elsewhere.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from examples import vqvae_report
from examples.common import quantizer_cost, report
from examples.common import reconstruction as measure
from examples.common.autoencoders import DIM, STRIDE, Autoencoder
from examples.common.data import CREDIT, DIGITS_CREDIT, split, split_digits
from examples.common.quantizer_cost import quantizer
from examples.common.training import Run, arguments, batch_rows, conduct, train, warmup_cosine

LEARNING = {"decay": 0.9, "kmeans_init": True, "threshold_ema_dead_code": 1.0}
ABLATIONS = {
    "no steps without codes": {"late": False},
    "no k-means": {"kmeans_init": False},
    "no revival": {"threshold_ema_dead_code": 0.0},
    "decay 0.99": {"decay": 0.99},
    "none of the four": {
        "late": False, "kmeans_init": False, "threshold_ema_dead_code": 0.0, "decay": 0.99
    },
    "16 dimensions, cosine": {"codebook_dim": 16, "use_cosine_sim": True},
    "rotation trick": {"rotation_trick": True},
}  # fmt: skip
LARGE = 8192  # codes of the last row of the cost table


@dataclass(frozen=True)
class Task:
    """A data set and how long to train on it."""

    name: str
    train: Tensor  # uint8 (N, C, H, W)
    heldout: Tensor
    captions: list[str]  # of the held-out pictures
    codes: int
    steps: int
    batch: int
    credit: str

    @property
    def cells(self) -> int:
        return self.train.shape[2] * self.train.shape[3] // STRIDE**2

    @property
    def bits(self) -> float:
        """Of an image's tokens, all codes taken as equally likely."""
        return self.cells * math.log2(self.codes)

    def images(self, step: int, seed: int) -> Tensor:
        """Batch `step`: it depends on the seed and its number alone, so a resumed run goes on."""
        return self.train[batch_rows(step, len(self.train), self.batch, seed)]


def tasks(args) -> list[Task]:
    (digits, more_digits), (seen, heldout) = split_digits(), split()
    labels = [f"digit {label}" for label in more_digits.labels.tolist()]
    every = [
        Task("digits", digits.images, more_digits.images, labels, 64, args.steps // 2, 64,
             DIGITS_CREDIT),
        Task("pictures", seen.images, heldout.images, heldout.captions, 512, args.steps, 16,
             CREDIT),
    ]  # fmt: skip
    return [task for task in every if args.data in (task.name, "both")]


# ---- training


class Twin:
    """The eager quantiser on the same features and codes, now and then along the way."""

    def __init__(self, task: Task, options: dict, device: str):
        self.eager = quantizer("eager", DIM, task.codes, **options).to(device)

    @torch.no_grad()
    def before(self, model: Autoencoder, images: Tensor) -> None:
        self.eager.copy_state(model.quantizer)
        self.codes = self.eager.codebook.clone()
        self.features = model.encode(images)
        _, self.tokens, self.loss = self.eager(self.features)

    def after(self, tokens: Tensor, loss: Tensor) -> list[float]:
        """Relative difference of the losses; share of other tokens; by how much the eager one's
        codes are farther away at most, relative to the mean square of the features."""
        rows = self.features.movedim(1, -1).double()  # (B, h, w, D)
        eager, ours = ((rows - self.codes[t]).square().sum(-1) for t in (self.tokens, tokens))
        farther = (eager - ours).max() / rows.square().sum(-1).mean()
        other = (self.tokens != tokens).float().mean()
        return [abs(self.loss.item() / loss.item() - 1), other.item(), farther.item()]


@torch.no_grad()
def start_codes(model: Autoencoder, task: Task, images: Tensor, seed: int) -> None:
    """Gives an eager quantiser the codes at which ours starts, and leaves the random generator
    where ours would leave it. k-means is not written twice: it would amplify rounding at once."""
    ours = quantizer("tilewise", DIM, task.codes, kmeans_init=True, decay=1.0)  # nothing moves
    ours.to(images.device)
    torch.manual_seed(seed)
    ours(model.encode(images))
    model.quantizer.copy_state(ours)


class VqVaeRun(Run):
    """Two kinds of quantiser differ by nothing else: same weights, batches, draws, first codes.

    Args:
        kind: "plain", which has no quantiser, "tilewise" or "eager".
        label: what an ablation is called.
        late: whether the codebook comes in after a third of the steps.
        changes: of the quantiser's settings.
    """

    def __init__(self, kind: str, task: Task, args, label: str = "", late: bool = True, **changes):
        options = {**LEARNING, **changes}
        torch.manual_seed(args.seed)
        model = Autoencoder(task.train.shape[1])
        if kind != "plain":
            model.quantizer = quantizer(kind, DIM, task.codes, **options)
        model.to(args.device)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=1e-4)
        name = label or kind
        super().__init__(
            f"{task.name}, {name}", args.out / f"{task.name}-{name}.pt".replace(" ", "-"), model,
            optimizer, task.steps,
            {"steps": task.steps, "batch": task.batch, "codes": task.codes, "seed": args.seed},
            ("error", "perplexity", "apart"),
        )  # fmt: skip
        self.kind, self.task, self.seed, self.rate = kind, task, args.seed, args.rate
        self.device = args.device
        self.variance = (task.train[::8].float() / 255).var().item()
        self.start = task.steps // 3 if late else 0
        self.twin = Twin(task, options, args.device) if kind == "tilewise" and not label else None

    def _compares(self, step: int) -> bool:
        return self.twin is not None and step > self.start and (step - self.start) % 10 == 1

    def before(self, step: int) -> None:
        self.images = self.task.images(step, self.seed).to(self.device)
        if self._compares(step):
            self.twin.before(self.model, self.images)
        seed = self.seed * 1_000_003 + step
        torch.manual_seed(seed)  # what the quantiser draws depends on the step alone
        if self.kind == "eager" and step == self.start:
            start_codes(self.model, self.task, self.images, seed)

    def step(self, step: int) -> None:
        rebuilt, self.tokens, self.commitment = self.model(self.images, step >= self.start)
        error = F.mse_loss(rebuilt, self.images.float() / 255)
        (error / self.variance + self.commitment).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * warmup_cosine(step, self.steps, warmup=20)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.history["loss"].append(error.item() / self.variance + self.commitment.item())
        self.history["error"].append(error.item())

    def after(self, step: int) -> None:
        if self.tokens is not None:
            perplexity = measure.usage(self.tokens, self.task.codes)["perplexity"]
            self.history["perplexity"].append([step + 1, perplexity])
        if self._compares(step):
            self.history["apart"].append(
                [step + 1, *self.twin.after(self.tokens, self.commitment)]
            )

    def note(self) -> str:
        text = f"mse {statistics.mean(self.history['error'][-20:]):.4f}"
        if self.history["perplexity"]:
            text += f"   perplexity {self.history['perplexity'][-1][1]:.0f}"
        return text


# ---- what came of it


def evaluate(model: Autoencoder, task: Task) -> tuple[dict, Tensor, Tensor | None]:
    """Figures on the held-out pictures, these pictures rebuilt, and their tokens."""
    rebuilt, tokens = measure.rebuild(model, task.heldout), None
    found = measure.quality(task.heldout, rebuilt)
    if model.quantizer is not None:
        tokens = measure.tokenize(model, task.heldout)
        found["heldout"] = measure.usage(tokens, task.codes)
        found["train"] = measure.usage(measure.tokenize(model, task.train), task.codes)
    return found, rebuilt, tokens


def baselines(task: Task) -> dict:
    images = task.heldout
    average = measure.mean_image(task.train, images)
    small, side = measure.thumbnail(images, task.bits)
    file, bits = measure.webp(images)
    small_bits = 8 * images.shape[1] * side**2
    return {
        "mean image": {"bits": 0, **measure.quality(images, average)},
        f"{side} × {side} thumbnail": {"bits": small_bits, **measure.quality(images, small)},
        "smallest WebP": {"bits": bits, **measure.quality(images, file)},
    }


def run(task: Task, args, bars: Progress) -> dict:
    """Everything about one data set, pictures included."""
    result = {"heldout": len(task.heldout), "train": len(task.train), "codes": task.codes,
              "cells": task.cells, "bits": task.bits, "baselines": baselines(task),
              "png_bits": measure.png_bits(task.heldout), "runs": {}}  # fmt: skip
    runs = {kind: VqVaeRun(kind, task, args) for kind in ("plain", "tilewise", "eager")}
    train([*runs.values()], bars, args.every, args.resume)
    rebuilt, tokens = {}, {}
    for kind, one in runs.items():
        found, rebuilt[kind], tokens[kind] = evaluate(one.model, task)
        result["runs"][kind] = {**one.history, **found}
    model = runs["tilewise"].model
    vqvae_report.sheet(
        task, rebuilt["tilewise"], rebuilt["plain"], tokens["tilewise"],
        args.out / f"{task.name}.png",
    )  # fmt: skip
    result["patches"] = vqvae_report.mean_patches(model, task)
    result["cost"] = cost(model, task, args)
    if args.ablate and task.name == "pictures":
        result["ablations"] = {}
        for label, changes in ABLATIONS.items():
            one = VqVaeRun("tilewise", task, args, label, **changes)
            train([one], bars, args.every, args.resume)
            result["ablations"][label] = evaluate(one.model, task)[0]
    return result


def cost(model: Autoencoder, task: Task, args) -> dict:
    """Of the quantiser's step, on a batch of the trained encoder's features."""
    with torch.no_grad():
        features = model.encode(task.images(0, args.seed).to(args.device))
    state = model.quantizer.state_dict()
    return quantizer_cost.measure(
        args.out / "features.pt", features, task.codes, LEARNING, state, args.measure, args.device
    )


def cost_of_many(args) -> dict:
    """The same with many codes, on features drawn at random."""
    features = torch.randn(32, DIM, 16, 16, generator=torch.Generator().manual_seed(args.seed))
    options = {"decay": 0.9, "threshold_ema_dead_code": 0.5}
    return quantizer_cost.measure(
        args.out / "features.pt", features, LARGE, options, None, args.measure, args.device
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, Path("out/vqvae"), every=100, on_device=True)
    add = parser.add_argument
    add("--steps", type=int, default=600, help="on the pictures; half as many on the digits")
    add("--data", choices=["digits", "pictures", "both"], default="both", help="what to train on")
    add("--rate", type=float, default=1.5e-3, help="highest learning rate (default: %(default)s)")
    add("--ablate", action="store_true", help="also train without each of the tricks")
    add("--measure", type=float, default=3.0, help="seconds for timing each quantiser step")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.every, args.measure = 60, 30, 0.5
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    console, results = conduct(
        "VQ-VAE", args,
        lambda args, bars: {task.name: run(task, args, bars) for task in tasks(args)},
    )  # fmt: skip
    with console.status(f"one step with {LARGE} codes"):
        many = cost_of_many(args)
    patches = {name: result.pop("patches") for name, result in results.items()}
    vqvae_report.tables(console, results, many)
    vqvae_report.curves(results, args.out / "curves.png")
    vqvae_report.codebooks(results, patches, args.out / "codebooks.png")
    names = [*(f"{name}.png" for name in results), "codebooks.png", "curves.png"]
    value = vqvae_report.value(many)
    report.finish(console, args.out, names, value, {**results, "many": many})
    return results


if __name__ == "__main__":
    main()
