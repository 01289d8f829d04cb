"""The table, the curves and the sentence of the smooth metrics' example."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.table import Table

import tilewise as tw
from examples.common import report
from examples.common.report import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED, percent, verdict

COLORS = {
    "cross-entropy": INK, "soft accuracy": BLUE, "soft F1": RED, "score function, F1": ORANGE
}  # fmt: skip
TITLES = {"accuracy": "accuracy", "f1": "macro F1"}


def differences(results: dict, metric: str, when: str, loss: str) -> list[float]:
    """From cross-entropy's, seed by seed."""
    found = results[metric][when]
    return [a - b for a, b in zip(found[loss], found["cross-entropy"], strict=True)]


def table(results: dict, trained_on: int) -> Table:
    seeds = len(results["f1"]["last"]["cross-entropy"])
    made = report.table(
        f"Test digits, %, mean of {seeds} seeds ± two standard errors",
        ["last step", "from cross-entropy's", "stopped early", "from cross-entropy's"],
    )
    for metric, title in TITLES.items():
        made.add_section()
        made.add_row(f"[bold]{title}[/]")
        for loss in COLORS:
            cells = []
            for when in ("last", "stopped"):
                cells.append(percent(results[metric][when][loss]))
                less = differences(results, metric, when, loss)
                own = loss == "cross-entropy"
                cells.append("" if own else f"{percent(less, '+')} {verdict(less)}")
            made.add_row(f"  {loss}", *cells)
    return made


def value(found: dict, results: dict) -> str:
    """What came of it, in a sentence."""
    runs = found["cross-entropy"]
    best = max(range(len(runs[0])), key=lambda i: sum(run[i]["test accuracy"] for run in runs))
    ce = [statistics.mean(run[i]["cross-entropy"] for run in runs) for i in (best, -1)]
    accuracy = [statistics.mean(run[i]["test accuracy"] for run in runs) for i in (best, -1)]
    parts = [
        f"From step {runs[0][best]['step']} on cross-entropy fell from {ce[0]:.2f} to {ce[1]:.2f} "
        f"while test accuracy went from {100 * accuracy[0]:.1f} to {100 * accuracy[1]:.1f} %."
    ]
    for metric, loss in (("accuracy", "soft accuracy"), ("f1", "soft F1")):
        less = differences(results, metric, "last", loss)
        parts.append(f"{loss[0].upper()}{loss[1:]} at the last step, by its own metric: "
                     f"{percent(less, '+')} points: {verdict(less)}.")  # fmt: skip
    return " ".join(parts)


def curves(found: dict, path: Path) -> None:
    """Cross-entropy beside the accuracy it should raise; the metrics of all losses."""
    with report.picture(path):
        _, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
        _falls_while(axes[0], found["cross-entropy"])
        for place, (metric, title) in zip(axes[1:], TITLES.items(), strict=True):
            for loss, runs in found.items():
                steps = [entry["step"] for entry in runs[0]]
                values = 100 * torch.tensor([[e[f"test {metric}"] for e in run] for run in runs])
                mean, error = values.mean(0), 2 * values.std(0) / len(runs) ** 0.5
                place.plot(steps, mean, color=COLORS[loss], label=loss)
                place.fill_between(steps, mean - error, mean + error, color=COLORS[loss],
                                   alpha=0.15, linewidth=0)  # fmt: skip
            low = 50 if metric == "accuracy" else 30
            place.set(title=f"{title} of test digits, %", xlabel="step", ylim=(low, None))
        axes[1].legend(loc="lower right")


def _falls_while(place, runs: list[list[dict]]) -> None:
    steps = [entry["step"] for entry in runs[0]]
    mean = {
        key: torch.tensor([[e[key] for e in run] for run in runs], dtype=torch.float32).mean(0)
        for key in ("cross-entropy", "train accuracy", "test accuracy")
    }
    place.plot(steps, mean["cross-entropy"], color=INK)
    place.set(title="Cross-entropy falls, accuracy does not rise", xlabel="step",
              ylabel="cross-entropy of seen digits", ylim=(0, None))  # fmt: skip
    right = place.twinx()
    right.spines["right"].set_visible(True)
    right.grid(False)
    right.plot(steps, 100 * mean["train accuracy"], color=MUTED, label="of seen, wrong labels")
    right.plot(steps, 100 * mean["test accuracy"], color=GREEN, label="of test, right labels")
    right.set(ylabel="accuracy, %", ylim=(40, 100))
    right.legend(loc="center right", bbox_to_anchor=(1, 0.4), title="accuracy")


def rates(path: Path) -> None:
    """Errors against 1 / tau of one row of numbers, and the slopes that the docstrings state."""
    x = torch.tensor([[0.3, 1.9, 1.0, -0.4, 2.5, 0.05]], dtype=torch.float64)  # gaps 0.6, 0.9, 0.25
    functions = {
        "onehot_argmax": (lambda tau: tw.smooth.onehot_argmax(x, tau), 0.6, BLUE),
        "topk, k = 2": (lambda tau: tw.smooth.topk(x, 2, tau), 0.45, RED),
        "rank": (lambda tau: tw.smooth.rank(x, tau), 0.25, GREEN),
        "sort": (lambda tau: tw.smooth.sort(x, tau), 0.25, PURPLE),
        "maximum": (lambda tau: tw.smooth.maximum(x, tau), 0.6, INK),
    }
    inverse = torch.linspace(1, 60, 60, dtype=torch.float64)
    with report.picture(path):
        _, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
        for name, (function, gap, color) in functions.items():
            errors = [(function(1 / t) - function(0)).abs().max().item() for t in inverse.tolist()]
            errors = [max(error, 1e-17) for error in errors]
            left.semilogy(inverse, errors, color=color, label=f"{name}: {gap}")
            law = torch.exp(-gap * inverse) / (inverse if name == "maximum" else 1)
            left.semilogy(inverse, errors[29] / law[29] * law, ":", color=color)
        left.set(title="Distance from the hard function", xlabel="1 / tau", ylim=(1e-15, 10))
        left.legend(title="slope by the docstring", fontsize=8)
        margins = torch.linspace(-3, 3, 200)
        for tau, color in ((2.0, MUTED), (1.0, BLUE), (0.3, RED), (0.05, INK)):
            logits = torch.stack([margins, torch.zeros_like(margins)], -1)[:, None]
            zeros = torch.zeros(200, 1, dtype=torch.int64)
            right.plot(margins, tw.smooth.accuracy(logits, zeros, tau), color=color,
                       label=f"tau = {tau}")  # fmt: skip
        right.plot(margins, -torch.nn.functional.logsigmoid(margins), "--", color=ORANGE,
                   label="cross-entropy")  # fmt: skip
        right.set(title="Accuracy of one sample by its margin", ylim=(-0.05, 2),
                  xlabel="label's logit less the other's")  # fmt: skip
        right.legend()
