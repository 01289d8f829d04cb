"""Tables, pictures and the sentence of the gradient estimators' example."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console

from examples.common import report
from examples.common.report import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED, two_errors

COLORS = {
    "score function": MUTED, "leave-one-out": BLUE, "REBAR": PURPLE, "straight-through": ORANGE,
    "ReinMax": RED, "Gumbel-softmax": GREEN, "Gumbel-softmax, hard": "#5bbf7a",
    "Gumbel-Rao": "#0d4f2b", "moving average": PURPLE, "learned": RED,
}  # fmt: skip
UNBIASED = ("score function", "leave-one-out", "REBAR")


def tables(console: Console, found: dict) -> None:
    known, cost = found["known"]["counts"], found["cost"]
    made = report.table(
        "Off the exact gradient of a known sum, in % of its length; cost of a sample of 64 rows",
        ["samples", "bias", "spread", "error", "error at 32", "time", "memory"],
    )
    for kind, entries in known.items():
        count, first = entries[0]
        last = entries[-1][1]
        bias = "none" if kind in UNBIASED else f"{100 * last['bias']:.1f}"
        made.add_row(
            kind, str(count), bias, *(f"{100 * first[k]:.0f}" for k in ("spread", "error")),
            f"{100 * last['error']:.1f}", report.duration(cost[kind]["ms"] / 1e3),
            f"{cost[kind]['kb']:.0f} kB",
        )  # fmt: skip
    console.print(made)
    made = report.table("Pulls of the best of ten arms, %", ["first tenth", "last tenth"])
    for kind, curve in found["bandit"].items():
        tenth = max(len(curve) // 10, 1)
        made.add_row(kind, *(f"{100 * statistics.mean(part):.0f}"
                             for part in (curve[:tenth], curve[-tenth:])))  # fmt: skip
    console.print(made)
    made = report.table("Held-out digits: negative ELBO ± two standard errors", ["nats"])
    for kind, curves in found["vae"].items():
        made.add_row(kind, "{:.1f} ± {:.1f}".format(*two_errors([c[-1][1] for c in curves])))
    console.print(made)


def value(found: dict) -> str:
    """What came of it, in a sentence."""
    known = found["known"]["counts"]
    one = {kind: entries[0][1]["spread"] for kind, entries in known.items()}
    samples, alone = known["score function"][-1]
    gain = alone["spread"] / known["leave-one-out"][-1][1]["spread"]
    vae = {kind: statistics.mean(c[-1][1] for c in v) for kind, v in found["vae"].items()}
    best = min((k for k in vae if k.startswith("categories")), key=vae.__getitem__)
    reinmax = one["score function"] / one["ReinMax"]
    return (
        f"{samples} samples spread {gain:.1f} times less with leave-one-out than without; one of "
        f"ReinMax {reinmax:.1f} times less than a score function's, with a bias of "
        f"{100 * known['ReinMax'][-1][1]['bias']:.0f} %. The best VAE with categories: "
        f"{best.partition(', ')[2]}, {vae[best]:.1f} nats."
    )


def known(found: dict, path: Path) -> None:
    """Errors by samples, means and spreads by temperature."""
    with report.picture(path):
        _, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
        for kind, entries in found["counts"].items():
            look = {"color": COLORS[kind], "linestyle": "-" if kind in UNBIASED else "--"}
            counts = [n for n, _ in entries]
            left.loglog(counts, [100 * e["error"] for _, e in entries], "o", markersize=4,
                        label=kind, **look)  # fmt: skip
        left.set(title="Error by samples, % of the gradient", xlabel="samples")
        left.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        left.legend(fontsize=7, title="solid: unbiased")
        for kind, entries in found["taus"].items():
            taus = [tau for tau, _ in entries]
            means = torch.tensor([e["mean"] for _, e in entries])
            band = torch.tensor([e["mean_error"] for _, e in entries])
            middle.plot(taus, means, "o-", color=COLORS[kind], markersize=4, label=kind)
            middle.fill_between(taus, means - band, means + band, color=COLORS[kind], alpha=0.2,
                                linewidth=0)  # fmt: skip
            right.loglog(taus, [100 * e["spread"] for _, e in entries], "o-", color=COLORS[kind],
                         markersize=4)  # fmt: skip
        middle.axhline(found["truth"], color=INK, linewidth=2, label="exact")
        near = found["truth"] - 0.2, found["truth"] + 0.2
        middle.set(title="Mean of one element, ± two errors", xlabel="tau", xscale="log", ylim=near)
        middle.legend(fontsize=7)
        right.set(title="Spread of one sample, % of the gradient", xlabel="tau")
        for axes in (middle, right):
            axes.set_xticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
        for axes in (left, right):
            axes.set_yticks([10, 20, 50, 100, 200, 500], ["10", "20", "50", "100", "200", "500"])
        for axes in (left, middle, right):
            axes.minorticks_off()


def uses(found: dict, path: Path) -> None:
    """The bandits' and the VAEs' curves."""
    with report.picture(path):
        _, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
        for kind, curve in found["bandit"].items():
            left.plot([100 * x for x in curve], color=COLORS[kind], label=kind)
        left.axhline(10, color=INK, linewidth=0.8, linestyle=":")
        left.set(title="A bandit: pulls of the best of ten arms, %", xlabel="pulls", ylim=(0, 100))
        left.legend(title="baseline", loc="lower right")
        for kind, curves in found["vae"].items():
            name = kind.partition(", ")[2]
            steps = [step for step, _ in curves[0]]
            mean = torch.tensor([[x for _, x in curve] for curve in curves]).mean(0)
            color = COLORS.get(name, INK)
            right.plot(steps, mean, "--" if kind.startswith("Gaussian") else "-", color=color,
                       label=kind)  # fmt: skip
        lowest = min(curve[-1][1] for curves in found["vae"].values() for curve in curves)
        right.set(title="A VAE: negative ELBO of held-out digits, nats", xlabel="step",
                  ylim=(math.floor(lowest / 5) * 5, math.ceil(lowest / 5) * 5 + 40))  # fmt: skip
        right.legend(fontsize=8)
