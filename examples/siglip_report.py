"""What a SigLIP run leaves behind: a table, the curves, and a sheet of pictures and captions."""

from __future__ import annotations

import statistics
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console

from examples.common import report
from examples.common.data import CREDIT, Pairs
from examples.common.report import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED

COLORS = {"fused": BLUE, "eager": ORANGE, "b = 0": RED}


# ---- the table


def tables(console: Console, results: dict) -> None:
    """One table, the row in which the loss matters first, and what it does not show."""
    out = report.table("", ["time", "memory", "loss", "image→text\n@1, @5, %",
                            "text→image\n@1, @5, %"])  # fmt: skip
    if "large" in results["runs"]:
        _large_rows(out, results)
    _step_rows(out, results)
    out.add_section()
    out.add_row("[bold]recall to beat[/]")
    for name in ("nearest pixel", "chance"):
        out.add_row(f"  {name}", "", "", "", *_recalls(results[name]))
    console.print(out)
    for line in _remarks(results):
        console.print(line)


def _large_rows(out, results: dict) -> None:
    large, count = results["runs"]["large"], f"{results['large_batch']:,}"
    out.add_row(f"[bold]{count} pairs, the loss[/]")
    for name, cost in results["alone"][-1].items():
        shown = ["", "too much"] if cost is None else [
            report.duration(cost["seconds"]), report.memory(cost["peak_mb"])]  # fmt: skip
        out.add_row(f"  {name}", *shown)
    out.add_section()
    out.add_row(f"[bold]{count} scenes a step[/]")
    steps, seconds = len(large["loss"]), statistics.median(large["seconds"])
    inside = statistics.median(large["in_loss"])
    out.add_row(f"  fused, {steps} steps", report.duration(seconds), "", f"{large['loss'][-1]:.3f}")
    out.add_row("    of it the loss", report.duration(inside))
    out.add_section()


def _step_rows(out, results: dict) -> None:
    """Of whole training steps: what the towers take is the same for both."""
    runs = {name: results["runs"][name] for name in ("fused", "eager") if name in results["runs"]}
    steps = {name: statistics.median(run["seconds"]) for name, run in runs.items()}
    share = 1 - min(results["alone"][0][name]["seconds"] / steps[name] for name in runs)
    out.add_row(f"[bold]{results['batch']} pairs a step[/]")
    for name, run in runs.items():
        step, *found = run["recall"][-1]
        out.add_row(f"  {name}, {step} steps", report.duration(steps[name]), "",
                    f"{run['loss'][-1]:.3f}", *_recalls(found))  # fmt: skip
    out.add_row("  share of the towers", f"{100 * share:.1f} %")


def _recalls(found) -> list[str]:
    """Of the two directions."""
    one, five, back_one, back_five = (f"{100 * value:.1f}" for value in found)
    return [f"{one}, {five}", f"{back_one}, {back_five}"]


def _remarks(results: dict) -> list[str]:
    runs, lines = results["runs"], []
    for name in ("fused", "eager"):
        if name in runs:
            lines.append(f"{name} run: on the same weights the two losses are at most "
                         f"{max(runs[name]['apart']):.0e} apart, over all steps.")  # fmt: skip
    if {"fused", "eager"} <= runs.keys():
        apart = _apart(results)
        lines.append(f"Two runs from one seed, step by step in turn: {apart[:20].max():.0e} apart "
                     f"after 20 steps, at most {apart.max():.0e} after all, since training "
                     "amplifies rounding.")  # fmt: skip
    if {"fused", "b = 0"} <= runs.keys():
        step, found = runs["b = 0"]["recall"][-1][:2]
        usual = {row[0]: row[1] for row in runs["fused"]["recall"]}.get(step)
        if usual is not None:
            lines.append(f"Why the bias starts at -10: after {step} steps image→text recall@1 is "
                         f"{100 * usual:.1f} %, from b = 0 it is {100 * found:.1f} %.")  # fmt: skip
    if "large" in runs:
        large = runs["large"]
        lines.append(f"Over the steps of {results['large_batch']:,} scenes, which train the text "
                     f"tower alone, the loss goes from {large['loss'][0]:.2f} to "
                     f"{large['loss'][-1]:.2f}.")  # fmt: skip
    return lines


def value(results: dict) -> str:
    """What the fused loss is good for, in one sentence."""
    pairs = results["large_batch"] if len(results["alone"]) > 1 else results["batch"]
    fused, eager = (results["alone"][-1][name] for name in ("fused", "eager"))
    ours = report.memory(fused["peak_mb"])
    if eager is None:
        return f"{pairs:,} pairs: {report.duration(fused['seconds'])} and {ours}; the eager loss " \
               "needs more memory than is free here."  # fmt: skip
    return (f"{pairs:,} pairs: {eager['seconds'] / fused['seconds']:.1f}x faster, {ours} in place "
            f"of {report.memory(eager['peak_mb'])}.")  # fmt: skip


def _apart(results: dict) -> torch.Tensor:
    return report.differences(*(results["runs"][name]["loss"] for name in ("fused", "eager")))


# ---- the curves


def curves(results: dict, path: Path) -> None:
    runs = {name: results["runs"][name] for name in COLORS if name in results["runs"]}
    with report.picture(path):
        _, axes = plt.subplots(2, 3, figsize=(14, 7.2), layout="constrained")
        (large, found, loss), (difference, scale, bias) = axes
        for name, run in runs.items():
            looks = report.looks(COLORS[name], name)
            looks["label"] = "fused, b = 0 at first" if name == "b = 0" else name
            steps = range(1, len(run["loss"]) + 1)
            for axis, curve in ((loss, "loss"), (scale, "scale"), (bias, "bias")):
                axis.plot(steps, run[curve], **looks)
        loss.set(title=f"Loss of {results['batch']} pairs", yscale="log", xlabel="step")
        scale.set(title="Temperature t = exp(t′)", xlabel="step")
        bias.set(title="Bias b", xlabel="step")
        loss.legend()
        _recall(found, results, next(iter(runs.values())))
        _difference(difference, results)
        _cost(large, results)


def _recall(axis, results: dict, run: dict) -> None:
    steps, forth, _, back, _ = zip(*run["recall"], strict=True)
    axis.plot(steps, [100 * v for v in forth], color=BLUE, marker="o", label="image → text")
    axis.plot(steps, [100 * v for v in back], color=PURPLE, marker="s", label="text → image")
    pixel = results["nearest pixel"][0]
    for value, text in ((pixel, "nearest pixel"), (results["chance"][0], "chance")):
        axis.axhline(100 * value, color=MUTED, linestyle=":")
        axis.text(steps[-1], 100 * value + 1, text, color=MUTED, ha="right", va="bottom")
    axis.set(title=f"Recall@1 on {results['heldout']} held-out pictures, %", ylim=(0, None),
             xlabel="step")  # fmt: skip
    axis.legend(loc="upper left")


def _difference(axis, results: dict) -> None:
    axis.set(title="Fused against eager loss, relative difference", xlabel="step")
    if not {"fused", "eager"} <= results["runs"].keys():
        axis.text(0.5, 0.5, "one loss only", ha="center", transform=axis.transAxes, color=MUTED)
        return
    runs = _apart(results).clamp(min=1e-8)
    weights = torch.tensor(results["runs"]["eager"]["apart"]).clamp(min=1e-8)
    steps = range(1, len(runs) + 1)
    axis.semilogy(steps, runs, color=MUTED, linewidth=1, label="two runs from one seed")
    axis.semilogy(steps, weights, color=BLUE, linewidth=1, label="on the same weights")
    axis.legend(loc="center right")


def _cost(axis, results: dict) -> None:
    """Bars of the last of the losses measured alone."""
    alone = {name: cost for name, cost in results["alone"][-1].items() if cost}
    pairs = results["large_batch"] if len(results["alone"]) > 1 else results["batch"]
    axis.set(title=f"The loss of {pairs:,} pairs alone", ylim=(0, 1.25))
    axis.grid(False)
    axis.set_xticks([0.5, 3.5], ["time", "extra memory"], color=INK)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    for place, key in ((0, "seconds"), (3, "peak_mb")):
        most = max(cost[key] for cost in alone.values())
        for i, (name, cost) in enumerate(alone.items()):
            text = report.duration(cost[key]) if key == "seconds" else report.memory(cost[key])
            axis.bar(place + i, cost[key] / most, color=COLORS[name], width=0.8)
            axis.text(place + i, cost[key] / most + 0.02, f"{name}\n{text}", ha="center", color=INK)


# ---- the sheet


def sheet(heldout: Pairs, scores: torch.Tensor, path: Path, rows: int = 6) -> None:
    """Held-out pictures with the captions they retrieve, captions with their pictures.

    `scores` (pictures, captions). Which ones are shown is drawn by a fixed seed, not chosen.
    """
    shown = torch.randperm(len(scores), generator=torch.Generator().manual_seed(1)).tolist()
    with report.picture(path):
        figure = plt.figure(figsize=(15.5, 1.3 * rows + 1.1))
        left, right = figure.subfigures(1, 2, width_ratios=(1.4, 1))
        left.suptitle("Picture → three best captions", x=0.03, ha="left", weight="bold")
        right.suptitle("Caption → five best pictures", x=0.03, ha="left", weight="bold")
        _captions(left, heldout, scores, shown[: 2 * rows], rows)
        _pictures(right, heldout, scores, shown[2 * rows : 3 * rows], rows)
        text = f"{len(scores)} candidates each, none seen in training. Green: right.   {CREDIT}."
        figure.text(0.99, 0.012, text, ha="right", color=MUTED, fontsize=8)


def _captions(figure, heldout: Pairs, scores: torch.Tensor, shown: list[int], rows: int) -> None:
    axes = figure.subplots(rows, 4, gridspec_kw={
        "width_ratios": (1, 2.6) * 2, "left": 0.02, "right": 0.99, "top": 0.92, "bottom": 0.05,
        "wspace": 0.05, "hspace": 0.12})  # fmt: skip
    for index, (image, text) in zip(shown, axes.reshape(-1, 2), strict=True):
        report.show(image, heldout.images[index])
        text.axis("off")
        lines = 0
        for best in scores[index].topk(3).indices.tolist():
            right = best == index
            wrapped = textwrap.wrap(heldout.captions[best], 44)
            text.text(0.03, 0.95 - 0.15 * lines, ("✓ " if right else "   ") + "\n   ".join(wrapped),
                      va="top", fontsize=7.5, color=GREEN if right else MUTED,
                      weight="bold" if right else "normal", transform=text.transAxes)  # fmt: skip
            lines += len(wrapped) + 0.4


def _pictures(figure, heldout: Pairs, scores: torch.Tensor, shown: list[int], rows: int) -> None:
    axes = figure.subplots(rows, 6, gridspec_kw={
        "width_ratios": (2.2, 1, 1, 1, 1, 1), "left": 0.02, "right": 0.99, "top": 0.92,
        "bottom": 0.05, "wspace": 0.06, "hspace": 0.12})  # fmt: skip
    for index, (text, *images) in zip(shown, axes, strict=True):
        text.axis("off")
        text.text(0, 0.5, "\n".join(textwrap.wrap(heldout.captions[index], 24)), va="center",
                  color=INK, transform=text.transAxes)  # fmt: skip
        for image, best in zip(images, scores[:, index].topk(5).indices.tolist(), strict=True):
            report.show(image, heldout.images[best], GREEN if best == index else None)
