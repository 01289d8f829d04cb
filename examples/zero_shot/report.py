"""What the zero-shot example leaves behind: tables, curves, a sheet of pictures."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console

from examples.common import large_batch, report
from examples.common.data import CREDIT, DIGITS_CREDIT
from examples.common.glyphs import CREDIT as GLYPHS_CREDIT
from examples.common.report import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED, percent

COLORS = {"CLIP": ORANGE, "SigLIP": BLUE, "words": PURPLE, "labels": GREEN, "random": MUTED,
          "pixels": RED}  # fmt: skip
MADE = {"CLIP": "CLIP", "SigLIP": "SigLIP", "words": "bag of words", "labels": "labels",
        "random": "random tower", "pixels": "pixels, no tower"}  # fmt: skip
BEAT = ["chance", "majority class", "nearest pixel"]
METHODS = ["labels"] + [f"{kind}, {shown}" for kind in ("words", "CLIP", "SigLIP")
                        for shown in ("one prompt", "ensemble")]  # fmt: skip


def seeds(found: dict, method: str, task: str) -> list[float]:
    return [one[method][task] for one in found["zero-shot"] if task in one.get(method, {})]


# ---- tables


def tables(console: Console, found: dict) -> None:
    console.print(_zero_shot(found))
    for title in found["probes"][0]:
        console.print(_probes(found, title))
    console.print(large_batch.cost_table(f"a batch of {found['batch']}", found["cost"]))


def _zero_shot(found: dict):
    heads = [f"{title},\n{one['pictures']:,} of {one['classes']} classes"
             for title, one in found["tasks"].items()]  # fmt: skip
    out = report.table("accuracy without a label of it, %", heads)
    for name in BEAT:
        out.add_row(name, *(f"{100 * one[name]:.1f}" for one in found["tasks"].values()))
    out.add_section()
    for method in METHODS:
        kind, _, shown = method.partition(", ")
        label = f"{MADE[kind]}, {shown}" if shown else f"a classifier of {found['labels']:,} labels"
        values = [seeds(found, method, task) for task in found["tasks"]]
        out.add_row(label, *(percent(v) if v else "" for v in values))
    return out


def _probes(found: dict, title: str):
    curves = [one[title] for one in found["probes"]]
    counts = [str(f"{count:,}") for count, _ in curves[0]["CLIP"]]
    out = report.table(f"probes, {title}: accuracy, %, by labels", counts)
    for kind in COLORS:
        columns = zip(*(one[kind] for one in curves), strict=True)
        out.add_row(MADE[kind], *(percent([a for _, a in column]) for column in columns))
    return out


def worth(found: dict, title: str) -> tuple[str, int | None]:
    """The better contrast, and the most labels with which a probe of the same tower is not ahead
    of it by more than two standard errors."""
    best = max(("CLIP", "SigLIP"), key=lambda k: sum(seeds(found, f"{k}, ensemble", title)))
    without = seeds(found, f"{best}, ensemble", title)
    reached = None
    for column in zip(*(one[title][best] for one in found["probes"]), strict=True):
        more = [a - b for a, (_, b) in zip(without, column, strict=True)]
        if report.verdict(more) != "worse":
            reached = column[0][0]
    return best, reached


def value(found: dict) -> str:
    """What captions were good for, in one sentence."""
    parts = []
    for title in found["probes"][0]:
        best, reached = worth(found, title)
        mean, _ = report.two_errors([100 * v for v in seeds(found, f"{best}, ensemble", title)])
        than = f"as much as a probe of {reached:,} labels" if reached else "less than any probe"
        parts.append(f"{title} {mean:.0f} % by {best} ({than} on the same tower)")
    return f"Without a label: {'; '.join(parts)}."


# ---- pictures


def picture(found: dict, path: Path) -> None:
    """Accuracy of each task without labels, and of probes by their labels."""
    with report.picture(path):
        titles = [*found["probes"][0]]
        _, axes = plt.subplots(1, 1 + len(titles), figsize=(15, 4.6), layout="constrained",
                               width_ratios=(1.5, *[1] * len(titles)))  # fmt: skip
        _bars(axes[0], found)
        for axis, title in zip(axes[1:], titles, strict=True):
            _curves(axis, found, title)
        axes[1].legend(fontsize=8, loc="upper left")


def _bars(axis, found: dict) -> None:
    methods = [*BEAT[::2], "labels", "words, ensemble", "CLIP, ensemble", "SigLIP, ensemble"]
    shades = ["#d8d8d8", MUTED, *(COLORS[m.split(",")[0]] for m in methods[2:])]
    for i, (title, one) in enumerate(found["tasks"].items()):
        for j, (method, color) in enumerate(zip(methods, shades, strict=True)):
            values = [one[method]] if method in one else seeds(found, method, title)
            if values:
                mean, error = report.two_errors([100 * v for v in values])
                label = MADE.get(method.split(",")[0], method) if i == 0 else None
                axis.bar(i + 0.13 * (j - 2.5), mean, 0.12, color=color, label=label,
                         yerr=error if error > 0 else None)  # fmt: skip
    names = [f"{title}\n{one['classes']} classes" for title, one in found["tasks"].items()]
    axis.set_xticks(range(len(names)), names, color=INK)
    axis.grid(False, axis="x")
    axis.set(title="Accuracy, %: CLIP and SigLIP by an ensemble of prompts", ylim=(0, None))
    axis.legend(fontsize=8, ncols=2)


def _curves(axis, found: dict, title: str) -> None:
    for kind, color in COLORS.items():
        columns = [*zip(*(one[title][kind] for one in found["probes"]), strict=True)]
        counts = [column[0][0] for column in columns]
        means, errors = zip(*(report.two_errors([100 * a for _, a in c]) for c in columns),
                            strict=True)  # fmt: skip
        axis.errorbar(counts, means, [e if e > 0 else 0 for e in errors], color=color,
                      marker="o", markersize=3.5, capsize=2, label=MADE[kind],
                      linestyle="--" if kind in ("random", "pixels") else "-")  # fmt: skip
    for kind in ("CLIP", "SigLIP"):
        mean, _ = report.two_errors([100 * v for v in seeds(found, f"{kind}, ensemble", title)])
        axis.axhline(mean, color=COLORS[kind], linestyle=":", linewidth=1.2)
        axis.text(counts[-1], mean, f"{kind}, no label", color=COLORS[kind], ha="right",
                  va="bottom" if kind == "SigLIP" else "top", fontsize=8)  # fmt: skip
    axis.set_xscale("log")
    axis.set(title=f"Probes, {title}: accuracy, %", xlabel="labels", ylim=(0, None))


def sheet(tasks: list, scores: list[torch.Tensor], path: Path, columns: int = 8) -> None:
    """Pictures of each task with the class that their tower finds; the right one in green."""
    with report.picture(path):
        figure, axes = plt.subplots(len(tasks), columns, figsize=(13, 1.95 * len(tasks)))
        figure.subplots_adjust(0.02, 0.09, 0.99, 0.93, hspace=0.85, wspace=0.25)
        for row, task, found in zip(axes, tasks, scores, strict=True):
            generator = torch.Generator().manual_seed(1)
            chosen = torch.randperm(len(task.labels), generator=generator)[:columns].tolist()
            for axis, i in zip(row, chosen, strict=True):
                best, right = int(found[i].argmax()), int(task.labels[i])
                report.show(axis, task.images[i], GREEN if best == right else RED)
                text = task.classes[best]
                if best != right:
                    text += f"\n(is: {task.classes[right]})"
                axis.set_xlabel("\n".join(textwrap.wrap(text, 20)), fontsize=7.5,
                                color=GREEN if best == right else RED)  # fmt: skip
            row[0].set_title(task.title)
        credit = f"{CREDIT}. {DIGITS_CREDIT}.\n{GLYPHS_CREDIT}."
        figure.text(0.99, 0.005, credit, ha="right", color=MUTED, fontsize=6.5)
