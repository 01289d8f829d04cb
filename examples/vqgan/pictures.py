"""Pictures of both stages: rows of small pictures with their labels, curves, fields."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewise as tw
from examples.common import report
from examples.common.data import CREDIT
from examples.common.reconstruction import unit
from examples.common.report import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE
from examples.vqgan.models import BEFORE_ATTENTION
from examples.vqgan.stage_one import VARIANTS
from examples.vqvae_report import colored

COLORS = {"trunk": MUTED, "plain": PURPLE, "perceptual": ORANGE, "gan": BLUE}


def tokens(codes: Tensor, size: int, side: int) -> Tensor:
    """Codes (N, h, w), or of several levels the first, as pictures of coloured squares."""
    first = codes if codes.dim() == 3 else codes[..., 0]
    return F.interpolate(colored(first, size), size=side)


def rows(named: dict[str, Tensor], path: Path, captions: list[str] | None = None,
         wrap: int = 17, title: str = "", inch: float = 1.05) -> None:  # fmt: skip
    """A row of pictures (N, 3, h, w) for each name; captions below the last one."""
    some = next(iter(named.values()))
    count, high = len(some), some.shape[2] / some.shape[3]
    with report.picture(path, dpi=100):
        height = inch * high * len(named) + (0.65 if captions else 0.13) + (0.27 if title else 0)
        width = inch * count + 1.2
        figure, axes = plt.subplots(len(named), count, figsize=(width, height), squeeze=False)
        top = 1 - (0.25 if title else 0.03) / height
        bottom = (0.6 if captions else 0.1) / height
        figure.subplots_adjust(1.15 / width, bottom, 0.995, top, 0.06, 0.06)
        for line, (name, pictures) in zip(axes, named.items(), strict=True):
            for axis, picture in zip(line, unit(pictures), strict=True):
                axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set(visible=True, color=report.GRID)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", color=INK, labelpad=6)
        for axis, text in zip(axes[-1], captions or [], strict=False):
            lines = textwrap.wrap(text, wrap)
            shown = "\n".join(lines[:4]) + ("…" if len(lines) > 4 else "")
            axis.set_xlabel(shown, fontsize=6.5, color=INK, labelpad=3)
        figure.text(0.005, 0.005, CREDIT, fontsize=6, color=MUTED)
        if title:
            figure.text(0.005, 1 - 0.17 / height, title, fontsize=9, weight="bold", color=INK)


def stage_one_curves(runs: dict, path: Path) -> None:
    """Errors of a batch, perplexity, and the critic's weight."""
    with report.picture(path):
        _, axes = plt.subplots(1, 3, figsize=(14, 3.6), layout="constrained")
        shared = len(runs["trunk"]["error"])
        for name, run in runs.items():
            start = 0 if name == "trunk" else shared
            label = VARIANTS.get(name, "shared first steps")
            steps = range(start + 1, start + len(run["error"]) + 1)
            axes[0].plot(steps, _smooth(run["error"]), color=COLORS[name], label=label)
            if run["perplexity"]:
                at, values = zip(*run["perplexity"], strict=True)
                axes[1].plot(at, _smooth(list(values)), color=COLORS[name], label=label)
        weights = runs["gan"]["weight"]
        axes[2].plot(range(shared + 1, shared + len(weights) + 1), weights, color=BLUE)
        axes[0].set(title="Squared error of a batch", xlabel="step", yscale="log")
        axes[1].set(title="Perplexity of a batch's codes", xlabel="step", ylim=(0, None))
        axes[2].set(title="Adaptive weight of the critic", xlabel="step", yscale="log")
        axes[0].legend()


def _smooth(values: list[float], over: int = 10) -> list[float]:
    """Means of the last few."""
    x = torch.tensor(values)
    return [x[max(0, i - over + 1) : i + 1].mean().item() for i in range(len(x))]


def fields(encoder: nn.Module, critic: nn.Module, picture: Tensor, path: Path) -> dict:
    """What the convolutions below a code see, and a patch of the critic: frames on a picture.

    Args:
        picture: (1, 3, 64, 64) in [0, 1].

    Returns:
        of each the size of its field and its jump in pixels, and whether what follows has an end.
    """
    side = picture.shape[-1]
    with report.picture(path, dpi=110):
        _, axes = plt.subplots(1, 4, figsize=(12, 3.3), layout="constrained")
        found = {}
        asked = (
            ("a code", encoder, picture * 2 - 1, BEFORE_ATTENTION),
            ("a patch of the critic", critic, picture, ""),
        )
        for place, (name, network, scaled, layer) in enumerate(asked):
            result = tw.receptive_field(network, side)
            cells = result[layer].units
            where = tuple(n // 2 for n in cells)
            field, whole = result.field(layer, where), result.layers[-1]
            found[name] = {
                "size": int(result[layer].size[0]),
                "jump": int(result[layer].jump[0]), "units": cells[0],
                "end": whole.size[0] != float("inf"),
            }  # fmt: skip
            counts = result.effective(scaled, layer, where)
            left, right = axes[2 * place : 2 * place + 2]
            left.imshow(picture[0].permute(1, 2, 0).numpy(), interpolation="nearest")
            right.imshow(counts.sqrt().numpy(), cmap="magma")
            (top, first), (bottom, last) = field.first, field.last
            for axis in (left, right):
                corner, size = (first - 0.5, top - 0.5), (last - first + 1, bottom - top + 1)
                axis.add_patch(plt.Rectangle(corner, *size, fill=False, color=GREEN, lw=2))
                axis.set_axis_off()
            wide = found[name]["size"]
            left.set_title(f"What {name} sees: {wide} × {wide}", fontsize=9)
            right.set_title("how much it counts (root)", fontsize=9)
        plt.gcf().text(0.995, 0.005, CREDIT, fontsize=6, color=MUTED, ha="right")
    return found


def costs(pictures: Tensor, nats: Tensor, captions: list[str], path: Path) -> None:
    """Pictures, and what each of their codes costs: (N, h, w) nats."""
    with report.picture(path, dpi=100):
        count = len(pictures)
        _, axes = plt.subplots(2, count, figsize=(1.5 * count + 0.8, 3.6), layout="constrained")
        for upper, lower, picture, cost, text in zip(
            *axes, unit(pictures), nats, captions, strict=True
        ):
            upper.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            upper.set_title("\n".join(textwrap.wrap(text, 22)[:3]), fontsize=7, weight="normal")
            drawn = lower.imshow(cost.numpy(), cmap="magma", vmin=0, vmax=float(nats.max()))
            upper.set_axis_off()
            lower.set_axis_off()
        plt.colorbar(drawn, ax=axes[1], label="nats", fraction=0.05)
        plt.gcf().text(0.995, 0.002, CREDIT, fontsize=6, color=MUTED, ha="right")


def stage_two_curves(codes: dict, pixels: dict, grid: dict, chance: float, path: Path) -> None:
    """Nats of both transformers, by seconds; what guidance does to the right caption."""
    with report.picture(path):
        _, axes = plt.subplots(1, 3, figsize=(14, 3.6), layout="constrained")
        for axis, run, name, color in (
            (axes[0], codes, "8 × 8 codes", BLUE), (axes[1], pixels, "32 × 32 pixels", ORANGE)
        ):  # fmt: skip
            seconds = torch.tensor(run["seconds"]).cumsum(0)
            axis.plot(seconds, _smooth(run["loss"]), color=color, label="a batch in training")
            at, values = zip(*run["heldout"], strict=True)
            axis.plot(seconds[[i - 1 for i in at]], values, "o-", color=INK, markersize=3,
                      label="held-out pictures")  # fmt: skip
            axis.set(title=f"{name}: nats each", xlabel="seconds of training", ylim=(0, None))
            axis.legend()
        for top_k, color in zip(sorted({k for _, k in grid}), (GREEN, BLUE, PURPLE), strict=False):
            line = sorted((s, share) for (s, k), share in grid.items() if k == top_k)
            guidance, share = zip(*line, strict=True)
            axes[2].plot(guidance, [100 * x for x in share], "o-", color=color,
                         label=f"top {top_k}")  # fmt: skip
        axes[2].axhline(100 * chance, color=MUTED, linestyle=":")
        axes[2].set(title="Right caption first, % (dotted: chance)", xlabel="guidance",
                    ylim=(0, None))  # fmt: skip
        axes[2].legend()
