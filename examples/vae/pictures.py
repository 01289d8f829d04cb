"""Pictures of the VAE's example: samples, latents, curves, uses."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from examples.common import report
from examples.common.data import DIGITS_CREDIT
from examples.common.report import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED
from examples.vae.judge import nearest
from examples.vae.models import Uniform
from examples.vae.training import CATEGORICAL, falling

COLORS = {
    "normal": BLUE, "normal, eager": ORANGE, "normal, eager, other noise": MUTED,
    "uniform": PURPLE, "Gumbel-softmax, tau 1 to 0.4": GREEN, "Gumbel-softmax, tau 1": "#5bbf7a",
    "Gumbel-softmax, tau 0.4": "#0d4f2b", "straight-through": ORANGE, "score function": BLUE,
    "codes": RED,
}  # fmt: skip


def tiles(pixels: Tensor, columns: int) -> Tensor:
    """Digits (N, 784) as one picture, rows of `columns`, dark on white."""
    rows = pixels.view(-1, columns, 28, 28).transpose(1, 2)  # (N / columns, 28, columns, 28)
    return 1 - rows.reshape(-1, columns * 28)


def show(place, pixels: Tensor, columns: int, title: str) -> None:
    place.imshow(tiles(pixels, columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    place.set_title(title, fontsize=10)
    place.set_axis_off()


def sheets(runs: dict, made: dict, data, path: Path) -> None:
    """Samples of every model and, below, the training digits nearest to some; rebuilt digits."""
    names = {
        "normal": "VAE, normal prior", "uniform": "VAE, uniform prior",
        "Gumbel-softmax, tau 1 to 0.4": "VAE, categories", "codes": "VAE, codes", "GAN": "GAN",
        "training digits": "training digits",
    }  # fmt: skip
    with report.picture(path, dpi=100):
        figure = plt.figure(figsize=(13, 5.6), layout="constrained")
        upper, middle, lower = figure.subfigures(3, 1, height_ratios=[4.6, 2.2, 3.2])
        for place, (key, title) in zip(upper.subplots(1, 6), names.items(), strict=True):
            show(place, made[key][:64], 8, title)
        middle.suptitle("Samples, and below each the nearest training digit", fontsize=10)
        for place, key in zip(middle.subplots(1, 2), ("normal", "GAN"), strict=True):
            some = made[key][:20]
            near = data.seen[nearest(some, data.seen)[1]]
            show(place, torch.cat([some, near]), 20, names[key])
        x = data.binary[::33][:30]
        rebuilt = [runs[key].model.rebuild(x) for key in list(names)[:4]]
        lower.suptitle(
            "Held-out digits, and rebuilt: normal, uniform, categories, codes", fontsize=10
        )
        show(lower.subplots(), torch.cat([x, *rebuilt]), 30, "")
        figure.text(0.995, 0.002, DIGITS_CREDIT, fontsize=6, color=MUTED, ha="right")


def latents(runs: dict, data, path: Path, side: int = 16) -> None:
    """Two numbers: where held-out digits lie, and what the decoder makes of a grid. Its places
    are equally likely under the prior."""
    shares = (torch.arange(side) + 0.5) / side
    grids = {
        "normal, of two": (torch.special.ndtri(shares), (-3, 3)),
        "uniform, of two": (Uniform.seen(shares), (-1.8, 1.8)),
    }
    with report.picture(path, dpi=100):
        _, axes = plt.subplots(1, 4, figsize=(15, 4.1), layout="constrained")
        for i, (kind, (line, limits)) in enumerate(grids.items()):
            model, prior = runs[kind].model, kind.partition(",")[0]
            points = model.features(data.heldout)
            axes[2 * i].scatter(*points.T, c=data.heldout_labels, cmap="tab10", s=6, vmin=-0.5,
                                vmax=9.5)  # fmt: skip
            for digit in range(10):
                center = points[data.heldout_labels == digit].median(0).values.tolist()
                axes[2 * i].text(*center, str(digit), fontsize=13, weight="bold", color=INK,
                                 ha="center", va="center")  # fmt: skip
            axes[2 * i].set(title=f"Held-out digits, {prior} prior", aspect="equal", xlim=limits,
                            ylim=limits)  # fmt: skip
            z = torch.stack(torch.meshgrid(line, line.flip(0), indexing="xy"), -1).view(-1, 2)
            with torch.no_grad():
                pixels = torch.sigmoid(model.decoder(z))
            show(axes[2 * i + 1], pixels, side, f"Decoded grid, {prior} prior")


def curves(bounds: dict, path: Path) -> None:
    """Ours beside eager operations; categorical latents; the temperature."""
    with report.picture(path):
        _, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
        labels = {
            "normal": "tw.gaussian_sample", "normal, eager": "eager operations, same seed",
            "normal, eager, other noise": "the same, other noise", "uniform": "uniform prior",
        }  # fmt: skip
        for name, label in labels.items():
            steps, nats = zip(*bounds[name]["curve"], strict=True)
            axes[0].plot(steps, nats, color=COLORS[name], label=label,
                         linestyle="--" if "eager" in name else "-")  # fmt: skip
        eager = dict(bounds["normal, eager"]["curve"])
        for name in ("normal", "normal, eager, other noise"):
            steps = [step for step, _ in bounds[name]["curve"]]
            less = [nats - eager[step] for step, nats in bounds[name]["curve"]]
            axes[1].plot(steps, less, color=COLORS[name], label=labels[name])
        axes[1].axhline(0, color=ORANGE, linestyle="--", label=labels["normal, eager"])
        last_step = bounds["codes"]["steps"]
        for name, x in bounds.items():
            if name in COLORS and not name.startswith(("normal", "uniform")):
                steps, nats = zip(*x["curve"], strict=True)
                axes[2].plot(steps, nats, color=COLORS[name], label=name)
        right = axes[2].twinx()
        right.grid(False)
        right.plot(range(last_step), [falling(last_step)(i) for i in range(last_step)], ":",
                   color=COLORS[CATEGORICAL[0]])  # fmt: skip
        right.set(ylim=(0, 4), yticks=[0.4, 1])
        right.set_ylabel("tau (dotted)", loc="bottom")
        last = max(x["curve"][-1][1] for name, x in bounds.items() if name in COLORS)
        lowest = min(x["curve"][-1][1] for name, x in bounds.items() if name in COLORS)
        limits = 5 * math.floor(lowest / 5), 5 * math.ceil(last / 5) + 20
        axes[0].set(title="-ELBO of held-out digits, nats", xlabel="step", ylim=limits)
        axes[1].set(title="Less that of eager operations", xlabel="step", ylim=(-3, 3))
        room = limits[0], limits[1] + 25  # for the legend
        axes[2].set(title="Discrete latents, nats", xlabel="step", ylim=room)
        axes[0].legend(fontsize=8, loc="upper right")
        axes[1].legend(fontsize=8, loc="lower right")
        axes[2].legend(fontsize=8, loc="upper right", ncols=2)


def uses(found: dict, path: Path) -> None:
    """Half a digit completed; labels by a probe; usual and unusual digits."""
    with report.picture(path):
        figure = plt.figure(figsize=(13, 4), layout="constrained")
        left, middle, right = figure.subfigures(1, 3, width_ratios=[3.2, 4, 4])
        shown = torch.tensor(found["half"]["shown"])  # (digits, 6, 784)
        show(left.subplots(), shown.flatten(0, 1), shown.shape[1],
             "Digit, upper half, mean completion, three")  # fmt: skip
        place = middle.subplots()
        for (name, accuracy), color in zip(found["probe"].items(), (BLUE, ORANGE, MUTED),
                                           strict=True):  # fmt: skip
            place.semilogx(found["labels"], [100 * x for x in accuracy], "o-", color=color,
                           label=name)  # fmt: skip
        place.set(title="Linear probe, % right", xlabel="labels seen")
        place.set_xticks(found["labels"], [str(n) for n in found["labels"]])
        place.minorticks_off()
        place.legend()
        usual, unusual = right.subplots(2, 1)
        show(usual, torch.tensor(found["ranking"]["usual"]), 5, "Most likely held-out digits")
        show(unusual, torch.tensor(found["ranking"]["unusual"]), 5, "Least likely ones")
