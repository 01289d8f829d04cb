"""Tables, pictures and the sentence of the distances' example."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Ellipse
from rich.console import Console
from torch import Tensor

from examples.common import report
from examples.common.report import BLUE, INK, MUTED, ORANGE, RED
from examples.distances.exact import apart
from examples.distances.fit import KINDS
from examples.distances.targets import TARGETS, Mixture, ring


def _mean(runs: list[dict], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def off(found: dict, target: str, kind: str) -> float:
    """Wasserstein distance of a fit from the optimum of its distance, the mean over seeds."""
    best = torch.tensor(found["optima"][target][kind], dtype=torch.float64)
    runs = found["fits"][target][kind]
    return statistics.mean(apart(torch.tensor(run["parts"]).double(), best) for run in runs)


def tables(console: Console, found: dict) -> None:
    made = report.table("What a distance asks for", ["of the data", "of the model", "a step"])
    for kind, of in KINDS.items():
        runs = [run for fits in found["fits"].values() for run in fits[kind]]
        made.add_row(kind, of.data, of.model, report.duration(_mean(runs, "ms") / 1e3))
    console.print(made)
    made = report.table(
        "A Gaussian along the axes, fitted: the distance and its optimum, the rest in nats",
        ["distance", "optimum", "off", "KL(data, model)", "KL(model, data)"],
    )
    for target, fits in found["fits"].items():
        made.add_section()
        made.add_row(f"[bold]{target}[/]")
        for kind, runs in fits.items():
            made.add_row(
                f"  {kind}", f"{_mean(runs, 'distance'):.4f}",
                f"{abs(found['lowest'][target][kind]):.4f}", f"{off(found, target, kind):.3f}",
                f"{_mean(runs, 'forward'):.3f}", f"{_mean(runs, 'reverse'):.3f}",
            )  # fmt: skip
    console.print(made)
    made = report.table(
        "A ring of eight bumps, without a family",
        ["samples near a bump, %", "bumps, of 8", "Wasserstein from data"],
    )
    for name, shown in found["ring"].items():
        made.add_row(name, f"{100 * shown['near']:.0f}", f"{shown['bumps']:.1f}",
                     f"{shown['wasserstein']:.3f}")  # fmt: skip
    console.print(made)
    _sizes(console, found["sizes"])


def _sizes(console: Console, found: dict) -> None:
    made = report.table(
        "KL(data, model) in nats by the number of data points; density of 1,000 points",
        [f"{size:,}" for size in found["sizes"]],
    )
    for target, values in found["error"].items():
        for name, errors in values.items():
            made.add_row(f"{name}, {target}", *(f"{error:.4f}" for error in errors))
    made.add_section()
    for name, times in found["ms"].items():
        made.add_row(f"{name}, time", *(report.duration(ms / 1e3) for ms in times))
    console.print(made)


def value(found: dict) -> str:
    """What came of it, in a sentence."""
    inside, *outside = found["fits"]
    worst = max(KINDS, key=lambda kind: off(found, inside, kind))
    bumps = found["fits"][outside[-1]]
    forward = _mean(bumps["forward KL, likelihood"], "forward")
    reverse = _mean(bumps["reverse KL, reparameterised"], "forward")
    error = found["sizes"]["error"][outside[-1]]
    return (
        f"Inside the family all six end within {off(found, inside, worst):.2f} of the target "
        f"({worst} is farthest). Outside it they disagree: on two bumps KL(data, model) is "
        f"{forward:.2f} by likelihood and {reverse:.1f} by the reverse divergence, and a kernel "
        f"density of {found['sizes']['sizes'][-1]:,} points reaches "
        f"{error['kernel density'][-1]:.3f}."
    )


# ---- pictures


def _contours(place, target: Mixture, half: float) -> None:
    line = torch.linspace(-half, half, 121, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    density = target.log_prob(points).exp().view(121, 121).T
    density = density / density.max()
    levels = [0.02, 0.1, 0.3, 0.6, 1.0]
    place.contourf(line, line, density, levels, cmap="Greys", alpha=0.7, vmax=1.6)


def _ellipse(place, parts: Tensor, **look) -> None:
    """Where a model's density is exp(-2) of its largest: two standard deviations."""
    width, height = (4 * (parts[2:] / 2).exp()).tolist()
    place.add_patch(Ellipse(parts[:2].tolist(), width, height, fill=False, **look))


def fits(found: dict, path: Path) -> None:
    """Each fit beside the optimum of its distance, on the target."""
    with report.picture(path):
        _, axes = plt.subplots(3, 6, figsize=(15, 7.8), layout="constrained")
        for row, target in zip(axes, TARGETS, strict=True):
            for place, kind in zip(row, KINDS, strict=True):
                _contours(place, target, 3.6)
                for run in found["fits"][target.name][kind]:
                    _ellipse(place, torch.tensor(run["parts"]), color=RED, linewidth=1.6)
                best = torch.tensor(found["optima"][target.name][kind])
                _ellipse(place, best, color=INK, linewidth=1.6, linestyle="--")
                place.set(aspect="equal", xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), xticks=[], yticks=[])
            row[0].set_ylabel(target.name)
        for place, kind in zip(axes[0], KINDS, strict=True):
            place.set_title(kind.replace(", ", ",\n", 1), fontsize=10)
        place.plot([], [], color=RED, label="fits")
        place.plot([], [], color=INK, linestyle="--", label="optimum")
        place.legend(loc="upper right", fontsize=7)


def on_the_ring(found: dict, path: Path) -> None:
    """Samples of each model; the circles have three standard deviations of a bump."""
    target = ring()
    with report.picture(path):
        _, axes = plt.subplots(1, 6, figsize=(15, 3.3), layout="constrained")
        for place, (name, shown) in zip(axes, found["ring"].items(), strict=True):
            points = torch.tensor(shown["points"])
            for mean in target.means.tolist():
                place.add_patch(plt.Circle(mean, 0.6, color=MUTED, fill=False, linewidth=0.7))
            place.scatter(*points.T, s=2, color=INK if name == "data" else BLUE, alpha=0.5,
                          linewidth=0)  # fmt: skip
            place.set_title(name.replace(", ", ",\n", 1), fontsize=9)
            place.set(aspect="equal", xlim=(-3.4, 3.4), ylim=(-3.4, 3.4), xticks=[], yticks=[])


def sizes(found: dict, path: Path) -> None:
    """Error and cost of a kernel density and of a Gaussian by the number of data points."""
    colors = {"kernel density": BLUE, "Gaussian": ORANGE}
    styles = dict(zip(found["error"], ("-", "--"), strict=True))
    with report.picture(path):
        _, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
        for target, values in found["error"].items():
            for name, errors in values.items():
                left.loglog(found["sizes"], errors, styles[target], color=colors[name], marker="o",
                            markersize=4, label=f"{name}, {target}")  # fmt: skip
        left.set(title="KL(data, model), nats", xlabel="data points")
        left.legend(fontsize=8)
        for name, times in found["ms"].items():
            right.loglog(found["sizes"], times, "o-", color=colors[name], markersize=4, label=name)
        right.set(title="Density of 1,000 points, ms", xlabel="data points")
        right.legend()
