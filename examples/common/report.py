"""What a run leaves behind: a table, the curves, and a sheet of pictures with their captions."""

from __future__ import annotations

import statistics
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

from examples.common.data import CREDIT, Pairs

INK, MUTED, GRID = "#222222", "#8a8a8a", "#e6e6e6"
COLORS = {"fused": "#0b6e99", "eager": "#f2a33a", "b = 0": "#b0413e"}
RIGHT, WRONG = "#1f8a4c", "#8a8a8a"
STYLE = {
    "axes.edgecolor": MUTED, "axes.grid": True, "axes.labelcolor": INK, "axes.spines.right": False,
    "axes.spines.top": False, "axes.titlelocation": "left", "axes.titlesize": 11,
    "axes.titleweight": "bold", "figure.facecolor": "white", "font.size": 9, "grid.color": GRID,
    "legend.frameon": False, "xtick.color": MUTED, "ytick.color": MUTED,
}  # fmt: skip


def note(history: dict) -> str:
    """The text beside a progress bar."""
    text = f"loss {history['loss'][-1]:.3f}"
    if history.get("recall"):
        text += f"   recall@1 {100 * history['recall'][-1][1]:.0f} %"
    return text


def largest_difference(results: dict, steps: int | None = None) -> float:
    """Of the fused and the eager loss curve, relative to the eager one."""
    fused, eager = (torch.tensor(results["runs"][n]["loss"][:steps]) for n in ("fused", "eager"))
    return ((fused - eager).abs() / eager).max().item()


# ---- the table


def _percent(found) -> list[str]:
    return [f"{100 * value:.1f}" for value in found]


def _time(seconds: list[float]) -> str:
    value = statistics.median(seconds)
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def _memory(megabytes: float) -> str:
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"


def table(console: Console, results: dict) -> None:
    runs, out = results["runs"], Table(title_justify="left", header_style="bold")
    for name in ("", "time per step", "peak memory", "loss", "image→text @1", "@5",
                 "text→image @1", "@5"):  # fmt: skip
        out.add_column(name, justify="right" if name else "left")
    out.add_row(f"[bold]{results['heldout']} held-out pictures[/]")
    for name in ("chance", "nearest pixel"):
        out.add_row(f"  {name}", "", "", "", *_percent(results[name]))
    for name in ("fused", "eager", "b = 0"):
        if name in runs:
            run = runs[name]
            step, *found = run["recall"][-1]
            out.add_row(f"  {name}, {step} steps", _time(run["seconds"]), "",
                        f"{run['loss'][-1]:.3f}", *_percent(found))  # fmt: skip
    if "large" in runs:
        _large_rows(out, results)
    console.print(out)
    for line in _remarks(results):
        console.print(line, highlight=False)


def _remarks(results: dict) -> list[str]:
    runs, lines = results["runs"], []
    for name in ("fused", "eager"):
        if name in runs:
            lines.append(f"{name} run: on the same weights the two losses are at most "
                         f"{max(runs[name]['apart']):.0e} apart, over all steps.")  # fmt: skip
    if {"fused", "eager"} <= runs.keys():
        lines.append(f"Two runs from one seed: {largest_difference(results, 20):.0e} apart after "
                     f"20 steps, at most {largest_difference(results):.0e} after all, since "
                     "training amplifies rounding.")  # fmt: skip
    if {"fused", "b = 0"} <= runs.keys():
        step, found = runs["b = 0"]["recall"][-1][:2]
        usual = {row[0]: row[1] for row in runs["fused"]["recall"]}.get(step)
        if usual is not None:
            lines.append(f"Why the prior: after {step} steps image→text recall@1 is "
                         f"{100 * usual:.1f} % with b = -10 at first, {100 * found:.1f} % with "
                         "b = 0.")  # fmt: skip
    if "large" in runs:
        large = runs["large"]
        share = sum(large["in_loss"]) / sum(large["seconds"])
        lines.append(f"Of a step of {results['large_batch']} scenes {100 * share:.0f} % is the "
                     f"loss, which goes from {large['loss'][0]:.2f} to {large['loss'][-1]:.2f}. "
                     "'Alone' is one forward and backward in a process of its own, and the memory "
                     "it takes beyond the features.")  # fmt: skip
    return lines


def _large_rows(out: Table, results: dict) -> None:
    large = results["runs"]["large"]
    out.add_section()
    out.add_row(f"[bold]{results['large_batch']} scenes a batch[/]")
    out.add_row("  chance", "", "", "", *_percent((0.001, 0.005) * 2))
    out.add_row("  before", "", "", "", *_percent(large["before"]))
    steps = len(large["loss"])
    out.add_row(f"  fused, {steps} steps", _time(large["seconds"]), "",
                f"{large['loss'][-1]:.3f}", *_percent(large["after"]))  # fmt: skip
    for name, cost in results["measured"].items():
        if cost is None:
            out.add_row(f"  {name} loss alone", "", "too much")
        else:
            out.add_row(f"  {name} loss alone", _time([cost["seconds"]]), _memory(cost["peak_mb"]))


# ---- the curves


def curves(results: dict, path: Path) -> None:
    runs = {name: results["runs"][name] for name in COLORS if name in results["runs"]}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(14, 7.2), layout="constrained")
        (loss, found, large), (scale, bias, difference) = axes
        for name, run in runs.items():
            looks = {"color": COLORS[name], "linestyle": "--" if name == "eager" else "-",
                     "linewidth": 1.4 if name == "eager" else 2.2,
                     "label": "fused, b = 0 at first" if name == "b = 0" else name}  # fmt: skip
            steps = range(1, len(run["loss"]) + 1)
            loss.plot(steps, run["loss"], **looks)
            scale.plot(steps, run["scale"], **looks)
            bias.plot(steps, run["bias"], **looks)
        loss.set(title="Loss", yscale="log")
        scale.set(title="Temperature t = exp(t′)", xlabel="step")
        bias.set(title="Bias b", xlabel="step")
        loss.legend()
        _recall(found, results, next(iter(runs.values())))
        _difference(difference, results)
        _large(large, results)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _recall(axis, results: dict, run: dict) -> None:
    steps, forth, _, back, _ = zip(*run["recall"], strict=True)
    axis.plot(steps, [100 * v for v in forth], color="#0b6e99", marker="o", label="image → text")
    axis.plot(steps, [100 * v for v in back], color="#7a4fa3", marker="s", label="text → image")
    pixel = results["nearest pixel"][0]
    for value, text in ((pixel, "nearest pixel"), (results["chance"][0], "chance")):
        axis.axhline(100 * value, color=MUTED, linestyle=":")
        axis.text(steps[-1], 100 * value + 1, text, color=MUTED, ha="right", va="bottom")
    axis.set(title=f"Recall@1 on {results['heldout']} held-out pictures, %", ylim=(0, None))
    axis.legend(loc="upper left")


def _difference(axis, results: dict) -> None:
    axis.set(title="Fused against eager loss, relative difference", xlabel="step")
    if not {"fused", "eager"} <= results["runs"].keys():
        axis.text(0.5, 0.5, "one loss only", ha="center", transform=axis.transAxes, color=MUTED)
        return
    fused, eager = (torch.tensor(results["runs"][n]["loss"]) for n in ("fused", "eager"))
    runs = ((fused - eager).abs() / eager).clamp(min=1e-8)
    weights = torch.tensor(results["runs"]["eager"]["apart"]).clamp(min=1e-8)
    steps = range(1, len(runs) + 1)
    axis.semilogy(steps, runs, color=MUTED, linewidth=1, label="two runs from one seed")
    axis.semilogy(steps, weights, color=COLORS["fused"], linewidth=1, label="on the same weights")
    axis.legend(loc="center right")


def _large(axis, results: dict) -> None:
    measured = {k: v for k, v in results.get("measured", {}).items() if v}
    axis.set(title=f"One loss of {results['large_batch']} × {results['large_batch']} pairs")
    axis.grid(False)
    axis.set_xticks([0.5, 3.5], ["seconds", "extra memory, GB"], color=INK)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    for place, key, unit in ((0, "seconds", 1), (3, "peak_mb", 1024)):
        most = max((cost[key] for cost in measured.values()), default=1)
        for i, (name, cost) in enumerate(measured.items()):
            axis.bar(place + i, cost[key] / most, color=COLORS[name], width=0.8)
            axis.text(place + i, cost[key] / most + 0.02, f"{name}\n{cost[key] / unit:.2f}",
                      ha="center", color=INK)  # fmt: skip
    axis.set(ylim=(0, 1.25))


# ---- the sheet


def sheet(heldout: Pairs, scores: torch.Tensor, path: Path, rows: int = 6) -> None:
    """Held-out pictures with the captions they retrieve, captions with their pictures.

    `scores` (pictures, captions). Which ones are shown is drawn by a fixed seed, not chosen.
    """
    shown = torch.randperm(len(scores), generator=torch.Generator().manual_seed(1)).tolist()
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(15.5, 1.3 * rows + 1.1))
        left, right = figure.subfigures(1, 2, width_ratios=(1.4, 1))
        left.suptitle("Picture → three best captions", x=0.03, ha="left", weight="bold")
        right.suptitle("Caption → five best pictures", x=0.03, ha="left", weight="bold")
        _captions(left, heldout, scores, shown[: 2 * rows], rows)
        _pictures(right, heldout, scores, shown[2 * rows : 3 * rows], rows)
        text = f"{len(scores)} candidates each, none seen in training. Green: right.   {CREDIT}."
        figure.text(0.99, 0.012, text, ha="right", color=MUTED, fontsize=8)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _picture(axis, image: torch.Tensor, edge: str | None = None) -> None:
    axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set(visible=edge is not None, color=edge, linewidth=2.5)


def _captions(figure, heldout: Pairs, scores: torch.Tensor, shown: list[int], rows: int) -> None:
    axes = figure.subplots(rows, 4, gridspec_kw={
        "width_ratios": (1, 2.6) * 2, "left": 0.02, "right": 0.99, "top": 0.92, "bottom": 0.05,
        "wspace": 0.05, "hspace": 0.12})  # fmt: skip
    for index, (image, text) in zip(shown, axes.reshape(-1, 2), strict=True):
        _picture(image, heldout.images[index])
        text.axis("off")
        lines = 0
        for best in scores[index].topk(3).indices.tolist():
            right = best == index
            wrapped = textwrap.wrap(heldout.captions[best], 44)
            text.text(0.03, 0.95 - 0.15 * lines, ("✓ " if right else "   ") + "\n   ".join(wrapped),
                      va="top", fontsize=7.5, color=RIGHT if right else WRONG,
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
            _picture(image, heldout.images[best], RIGHT if best == index else None)
