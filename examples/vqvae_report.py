"""What a VQ-VAE run leaves behind: tables, sheets of reconstructions, codebooks, curves."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import hsv_to_rgb
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tilewise as tw
from examples.common import report
from examples.common.autoencoders import STRIDE
from examples.common.data import different
from examples.common.reconstruction import CHUNK, tokenize
from examples.common.report import BLUE, INK, MUTED, ORANGE, PURPLE

COLORS = {"tilewise": BLUE, "eager": ORANGE, "plain": PURPLE}
ROWS = {"tilewise": "VQ-VAE, tilewise", "eager": "VQ-VAE, eager", "plain": "no quantiser"}
AROUND = 2 * STRIDE  # pixels per side of what is shown of a code


# ---- tables


def tables(console: Console, results: dict, many: dict) -> None:
    console.print(quality_table(results))
    for line in [line for name, result in results.items() for line in _remarks(name, result)]:
        console.print(line, highlight=False)
    console.print(cost_table(results, many))
    for result in results.values():
        if "ablations" in result:
            console.print(ablation_table(result))


def quality_table(results: dict) -> Table:
    names = ["MSE", "PSNR, dB", "bytes", "in use: training", "held out", "perplexity"]
    table = report.table("Held-out pictures rebuilt", names)
    for name, result in results.items():
        table.add_section()
        table.add_row(f"[bold]{result['heldout']} {name}[/]")
        for label, found in result["baselines"].items():
            table.add_row(f"  {label}", *_error(found), f"{found['bits'] / 8:.0f}")
        for kind, label in ROWS.items():
            found = result["runs"][kind]
            if kind == "plain":
                table.add_row(f"  {label}", *_error(found), "not coded")
                continue
            used = [f"{found[s]['used']} ({100 * found[s]['used'] / result['codes']:.0f} %)"
                    for s in ("train", "heldout")]  # fmt: skip
            table.add_row(f"  {label}", *_error(found), f"{result['bits'] / 8:.0f}", *used,
                          f"{found['heldout']['perplexity']:.0f}")  # fmt: skip
    return table


def _error(found: dict) -> list[str]:
    return [f"{found['mse']:.5f}", f"{found['psnr']:.2f}"]


def _remarks(name: str, result: dict) -> list[str]:
    found = result["runs"]["tilewise"]
    each = math.log2(found["heldout"]["perplexity"])
    lines = [
        f"{name}: {result['cells']} tokens of {math.log2(result['codes']):.0f} bits are "
        f"{result['bits'] / 8:.0f} bytes, a PNG is {result['png_bits'] / 8:.0f}. At the held-out "
        f"entropy of {each:.2f} bits they would be {result['cells'] * each / 8:.0f}. The decoder's "
        "weights are not counted."
    ]  # fmt: skip
    apart = torch.tensor([row[1:] for row in found["apart"]])
    if len(apart):
        loss, other, farther = apart.max(0).values.tolist()
        lines.append(
            f"{name}: on the same features and codes, every ten steps, the eager loss differs by "
            f"at most {loss:.0e}, and {100 * other:.2g} % of the tokens do, for codes farther "
            f"away by at most {farther:.0e} of the features' mean square. {_drift(result)}"
        )
    return lines


def differences(result: dict) -> Tensor:
    """Of the two reconstruction errors in each step, relative."""
    return report.differences(*(result["runs"][kind]["error"] for kind in ("tilewise", "eager")))


def _drift(result: dict) -> str:
    """How far apart two runs from one seed are: training amplifies rounding."""
    runs = result["runs"]
    start = runs["tilewise"]["perplexity"][0][0] - 1  # the first step with codes
    ours, eager = (statistics.mean(runs[kind]["error"][-50:]) for kind in ("tilewise", "eager"))
    return (f"Two runs from one seed: {differences(result)[start + 1]:.0e} apart after one step "
            f"with codes, {abs(ours / eager - 1):.0e} in the mean of the last 50.")  # fmt: skip


def cost_table(results: dict, many: dict) -> Table:
    """The row in which the quantiser matters first."""
    table = report.table("Cost of a training step", ["tilewise", "eager", "ratio"])
    _cost_rows(table, "a large quantiser", many)
    for name, result in results.items():
        pair = [statistics.median(result["runs"][kind]["seconds"][-50:])
                for kind in ("tilewise", "eager")]  # fmt: skip
        share = result["cost"]["tilewise"]["ms"] / 1000 / pair[0]
        table.add_section()
        _cost_rows(table, f"{name}: the quantiser", result["cost"])
        label = f"{name}: the whole step, {100 * (1 - share):.0f} % of it towers"
        table.add_row(label, *map(report.duration, pair), f"{pair[1] / pair[0]:.2f}")
    return table


def _cost_rows(table: Table, label: str, cost: dict) -> None:
    size = f"{cost['rows']} × {cost['codes']} × {cost['dim']}"
    ours, eager = (cost[kind] for kind in ("tilewise", "eager"))
    times = [report.duration(one["ms"] / 1000) for one in (ours, eager)]
    peaks = [report.memory(one["peak_mb"]) for one in (ours, eager)]
    table.add_row(f"{label}, {size}", *times, f"{eager['ms'] / ours['ms']:.1f}")
    table.add_row("  its peak memory", *peaks, _times(eager["peak_mb"], ours["peak_mb"]))


def _times(theirs: float, ours: float) -> str:
    """A ratio, where there is something to divide by."""
    return f"{theirs / ours:.0f}" if ours >= 1 else ""


def value(many: dict) -> str:
    """What the quantiser is good for, in one sentence."""
    ours, eager = (many[kind] for kind in ("tilewise", "eager"))
    return (f"{many['rows']:,} rows, {many['codes']:,} codes: {eager['ms'] / ours['ms']:.0f}x "
            f"faster, {report.memory(ours['peak_mb'])} in place of "
            f"{report.memory(eager['peak_mb'])}.")  # fmt: skip


def ablation_table(result: dict) -> Table:
    table = report.table("What keeps the codes in use", [
        "MSE", "PSNR, dB", "in use: training", "held out", "perplexity"])  # fmt: skip
    for label, found in {"as above": result["runs"]["tilewise"], **result["ablations"]}.items():
        used = [f"{100 * found[s]['used'] / result['codes']:.0f} %" for s in ("train", "heldout")]
        table.add_row(label, *_error(found), *used, f"{found['heldout']['perplexity']:.0f}")
    return table


# ---- sheets


def sheet(task, rebuilt: Tensor, bound: Tensor, tokens: Tensor, path: Path) -> None:
    """Held-out pictures, their tokens, and what comes back; beside it, without a quantiser.

    Which ones are shown is drawn by a fixed seed; of a family that differs by persons only, one.
    """
    rows, columns = 5, 3
    shown = different(task.captions, rows * columns)
    original = task.heldout[shown].float() / 255
    grid = colored(tokens, task.codes)[shown]
    side = original.shape[-1] * (192 // original.shape[-1])  # whole pixels
    strips = [_large(x, side) for x in (original, grid, rebuilt[shown], bound[shown])]
    canvas = F.pad(torch.cat(strips, 3), (12, 12, 0, 0), value=1.0)  # (rows * columns, 3, h, 4 w)
    height, width = canvas.shape[2:]
    canvas = canvas.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    high, wide = canvas.shape[:2]
    with report.picture(path, dpi=100):
        figure = plt.figure(figsize=(wide / 100, high / 100 + 0.8), dpi=100)
        axis = figure.add_axes((0, 0.4 / (high / 100 + 0.8), 1, high / (high + 80)))
        axis.imshow(canvas.numpy(), interpolation="nearest")
        axis.axis("off")
        for i in range(columns):
            for k, text in enumerate(("original", "tokens", "VQ-VAE", "no quantiser")):
                axis.text((i + (k + 0.5) / 4) * width, -9, text, ha="center", color=INK, size=14)
        cells = math.isqrt(task.cells)
        text = (
            f"Held-out {task.name}, drawn at random. {cells} × {cells} tokens from {task.codes} "
            f"codes: {task.bits / 8:.0f} bytes. One colour is one code.   {task.credit}."
        )
        figure.text(0.99, 0.01, text, ha="right", color=MUTED, size=13)


def _large(pictures: Tensor, side: int) -> Tensor:
    """(N, C, h, w) as (N, 3, side + 8, side + 8), with a white margin."""
    pictures = F.interpolate(pictures.expand(-1, 3, -1, -1), size=(side, side))
    return F.pad(pictures, (4, 4, 4, 4), value=1.0)


def colored(tokens: Tensor, codes: int) -> Tensor:
    """(N, 3, h, w): a colour for each code, light grey for the most common one."""
    rank = tokens.flatten().bincount(minlength=codes).argsort(descending=True).argsort()
    hue = torch.arange(codes) * 0.618 % 1
    value = 0.95 - 0.45 * (torch.arange(codes) * 0.755 % 1)
    palette = torch.from_numpy(hsv_to_rgb(torch.stack([hue, hue * 0 + 0.6, value], 1).numpy()))
    palette[0] = 0.93
    return palette[rank[tokens]].permute(0, 3, 1, 2).float()


# ---- codebooks


@torch.no_grad()
def mean_patches(model, task, most: int = 1024) -> Tensor:
    """(K, C, AROUND, AROUND): what training pictures look like, on average, where a code is
    chosen; NaN for codes that are not."""
    channels, margin = task.train.shape[1], (AROUND - STRIDE) // 2
    counts, total = 0, 0.0
    for images in task.train[torch.randperm(len(task.train))[:most]].split(CHUNK):
        padded = F.pad(images.float() / 255, (margin,) * 4, value=1.0 if channels == 3 else 0.0)
        patches = F.unfold(padded, AROUND, stride=STRIDE).transpose(1, 2)  # (B, cells, C * A * A)
        found = tw.code_sums(patches, tokenize(model, images).flatten(1), task.codes)
        counts, total = counts + found[0], total + found[1]
    return (total / counts[:, None]).view(-1, channels, AROUND, AROUND)


def codebooks(results: dict, patches: dict, path: Path) -> None:
    """How often each code is chosen, sorted, and what it stands for."""
    with report.picture(path):
        _, axes = plt.subplots(len(results), 2, figsize=(14, 4.6 * len(results)),
                                    squeeze=False, layout="constrained",
                                    width_ratios=(1.15, 1))  # fmt: skip
        for (name, result), (histogram, mosaic) in zip(results.items(), axes, strict=True):
            _histogram(histogram, name, result)
            _mosaic(mosaic, result, patches[name])


def _histogram(axis, name: str, result: dict) -> None:
    for kind, style in (("tilewise", "-"), ("eager", "--")):
        for split, width in (("train", 2.2), ("heldout", 1.0)):
            found = result["runs"][kind][split]
            counts = torch.tensor(found["counts"]).sort(descending=True).values
            share = (counts / counts.sum()).masked_fill(counts == 0, float("nan"))
            text = (f"{kind}, {'training' if split == 'train' else 'held out'}: {found['used']} of "
                    f"{len(counts)} codes, perplexity {found['perplexity']:.0f}")  # fmt: skip
            axis.plot(100 * share, style, color=COLORS[kind], linewidth=width, label=text)
    axis.axhline(100 / result["codes"], color=MUTED, linestyle=":")
    axis.set(title=f"{name.capitalize()}: share of the tokens, codes sorted, %", yscale="log",
             xlim=(0, result["codes"] - 1), xlabel="codes")  # fmt: skip
    axis.legend(loc="lower left")


def _mosaic(axis, result: dict, patches: Tensor) -> None:
    order = torch.tensor(result["runs"]["tilewise"]["train"]["counts"]).argsort(descending=True)
    tiles = F.pad(patches[order].nan_to_num(1.0).expand(-1, 3, -1, -1), (1, 1, 1, 1), value=1.0)
    columns = 32 if len(tiles) > 128 else 16
    canvas = tiles.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    axis.imshow(canvas.clamp(0, 1).numpy(), interpolation="nearest")
    axis.axis("off")
    axis.set_title(f"The average {AROUND} × {AROUND} pixels where a code is chosen, "
                   "common codes first")  # fmt: skip


# ---- curves


def curves(results: dict, path: Path) -> None:
    with report.picture(path):
        _, axes = plt.subplots(len(results), 3, figsize=(14, 3.6 * len(results)),
                                    squeeze=False, layout="constrained")  # fmt: skip
        for (name, result), (error, perplexity, apart) in zip(results.items(), axes, strict=True):
            for kind in ("plain", "tilewise", "eager"):
                run = result["runs"][kind]
                looks = {**report.looks(COLORS[kind], kind), "label": ROWS[kind]}
                error.plot(range(1, len(run["error"]) + 1), run["error"], **looks)
                if run["perplexity"]:
                    perplexity.plot(*zip(*run["perplexity"], strict=True), **looks)
            error.axhline(result["baselines"]["mean image"]["mse"], color=MUTED, linestyle=":")
            error.set(title=f"{name.capitalize()}: squared error of a batch", yscale="log")
            error.legend()
            perplexity.set(title="Perplexity of a batch's tokens", ylim=(0, None))
            _apart(apart, result)
        for axis in axes[-1]:
            axis.set_xlabel("step")


def _apart(axis, result: dict) -> None:
    runs = differences(result).clamp(min=1e-8)
    axis.semilogy(range(1, len(runs) + 1), runs, color=MUTED, linewidth=1,
                  label="two runs from one seed")  # fmt: skip
    found = result["runs"]["tilewise"]["apart"]
    if found:
        axis.semilogy([row[0] for row in found], [max(row[1], 1e-8) for row in found], "o",
                      color=COLORS["tilewise"], markersize=3,
                      label="on the same features and codes")  # fmt: skip
    axis.set(title="Tilewise against eager, relative difference")
    axis.legend(loc="best")
