"""Tables, pictures and the sentence of the bias's example."""

from __future__ import annotations

import argparse
import math
import statistics

import matplotlib.pyplot as plt
from rich.console import Console

from examples.common import large_batch, report
from examples.common.matching import log_odds
from examples.common.report import BLUE, GREEN, INK, MUTED, PURPLE, RED, difference, percent

UNITS = ["T = 0", "T = 0, then moved for each unit", "one T, the best of the sweep",
         "a T for each unit, the best of the sweep", "b = -T learnt"]  # fmt: skip
TRAININGS = {"one T, the best of the sweep": 13, "a T for each unit, the best of the sweep": 13}
STARTS = {"-10": BLUE, "0": RED, "log odds": GREEN}


def _mean(values: list[float], digits: int = 1) -> str:
    mean, errors = report.two_errors(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(errors) else f" ± {errors:.{digits}f}")


def _claimed(ones: list[dict]) -> str:
    """The mean probability of the calls, over the runs that call anything a match."""
    values = [one["claimed"] for one in ones if one["claimed"] is not None]
    return percent(values) if values else "no calls"


# ---- the tables


def tables(console: Console, found: dict, args: argparse.Namespace) -> None:
    console.print(_units(found["units"]))
    console.print(_pairs(found, args))
    console.print(_starts(found, args))
    console.print(_odds(found, args))
    for line in _remarks(found, args):
        console.print(line)
    console.print(large_batch.cost_table(f"A batch of {args.twin}", found["cost"]))


def _units(seeds: list[dict]):
    made = report.table(
        f"A unit for each of ten digits: fires where Σ x·w > T. F1 of new digits, %, {len(seeds)} "
        "seeds", ["trainings", "F1", "from b learnt"],
    )  # fmt: skip
    learnt = [found["b = -T learnt"] for found in seeds]
    for name in UNITS:
        values = [found[name] for found in seeds]
        own = name == "b = -T learnt"
        made.add_row(name, str(TRAININGS.get(name, 1)), percent(values),
                     "" if own else difference(values, learnt))  # fmt: skip
    return made


def _pairs(found: dict, args: argparse.Namespace):
    """Thresholds that are learnt, beside the one that is picked by hand."""
    made = report.table(
        f"A pair matches where s > T, with T = -b / t or by hand: {found['candidates']} held-out "
        "pictures, as among B candidates, %",
        ["T", "precision", "recall", "F1", "from by hand", "mean p\nof calls"],
    )
    for batch in args.batches:
        made.add_section()
        share = 1 / batch
        made.add_row(f"[bold]B = {batch}[/]: all called", "", percent([share]), "100.0",
                     percent([2 * share / (1 + share)]), "", "")  # fmt: skip
        for start in STARTS:
            seeds = found["runs"][f"{batch}/{start}"]
            hand = [one["hand calls"][2] for one in seeds]
            for kind in ("learnt", "hand"):
                calls = [one[f"{kind} calls"] for one in seeds]
                precision, recall, f1 = (list(column) for column in zip(*calls, strict=True))
                at = [-one["bias"] / one["scale"] if kind == "learnt" else one["hand"]
                      for one in seeds]  # fmt: skip
                learnt = kind == "learnt"
                made.add_row(
                    f"  b₀ = {start}" if learnt else "    by hand",
                    f"{statistics.mean(at):.2f}",
                    percent(precision), percent(recall), percent(f1),
                    difference(f1, hand) if learnt else "",
                    _claimed([one["calibration"] for one in seeds]) if learnt else "",
                )  # fmt: skip
    return made


def _starts(found: dict, args: argparse.Namespace):
    """What the bias at first does to a run."""
    made = report.table(
        f"The bias at first, {args.steps} steps",
        ["first loss", "last loss", "b", "t", "image→text\n@1, %", "from b₀ = -10"],
    )
    for batch in args.batches:
        made.add_section()
        made.add_row(f"[bold]B = {batch}[/], log odds {log_odds(batch):.1f}")
        usual = [one["recall"][0] for one in found["runs"][f"{batch}/-10"]]
        for start in STARTS:
            seeds = found["runs"][f"{batch}/{start}"]
            ones = [one["recall"][0] for one in seeds]
            made.add_row(
                f"  b₀ = {start}", _mean([one["first loss"] for one in seeds]),
                _mean([one["last loss"] for one in seeds], 2),
                _mean([one["bias"] for one in seeds]), _mean([one["scale"] for one in seeds]),
                percent(ones),
                "" if start == "-10" else difference(ones, usual),
            )  # fmt: skip
    made.add_section()
    made.add_row("chance", "", "", "", "", percent([1 / found["candidates"]]), "")
    return made


def _odds(found: dict, args: argparse.Namespace):
    """A model at other odds than its batch had."""
    made = report.table(
        "b₀ = -10, used among N candidates: b as learnt, and b - log((N - 1) / (B - 1))",
        ["precision, %", "mean p\nof calls, %", "F1, %", "matches\nsaid / is"],
    )
    for batch in args.batches:
        made.add_section()
        for size in args.batches:
            if size == batch:
                continue
            seeds = [one["other odds"][str(size)] for one in found["runs"][f"{batch}/-10"]]
            for kind in ("as learnt", "moved"):
                ones = [one[kind] for one in seeds]
                made.add_row(
                    f"B = {batch}, N = {size}: {kind}",
                    percent([one["calls"][0] for one in ones]),
                    _claimed(ones), percent([one["calls"][2] for one in ones]),
                    _mean([one["said"] for one in ones], 2),
                )  # fmt: skip
    return made


def _remarks(found: dict, args: argparse.Namespace) -> list[str]:
    """What the page says beside the tables."""
    learnt = [t for seed in found["units"] for t in seed["learnt"]]
    sweep = [statistics.mean(f1) for f1 in zip(*(u["sweep"] for u in found["units"]), strict=True)]
    many = [(scale, bias) for size, scale, bias in found["refit"] if size >= 16]
    moves = [b[1] - a[1] for a, b in zip(many, many[1:], strict=False)]
    scales = [scale for scale, _ in many]
    said = {batch: _mean([one["calibration"]["said"] for one in found["runs"][f"{batch}/-10"]], 2)
            for batch in args.batches}  # fmt: skip
    return [
        f"Units: the learnt thresholds lie between {min(learnt):.1f} and {max(learnt):.1f}; in the "
        f"sweep the worst T costs {100 * (max(sweep) - min(sweep)):.1f} points of F1.",
        f"Fitted anew for 16 to {found['refit'][-1][0]:,} candidates, b moves by {max(moves):.2f} "
        f"to {min(moves):.2f} with each doubling, and t is {min(scales):.1f} to {max(scales):.1f}.",
        "Matches that b₀ = -10 says there are among its own B, where there is 1: "
        + ", ".join(f"{text} (B = {batch})" for batch, text in said.items()) + ".",
    ]  # fmt: skip


def value(found: dict, args: argparse.Namespace) -> str:
    """What the bias is, in a sentence."""
    batch = args.batches[-1]
    seeds = found["runs"][f"{batch}/-10"]
    learnt, hand = ([one[f"{kind} calls"][2] for one in seeds] for kind in ("learnt", "hand"))
    first = {start: statistics.mean(one["first loss"] for one in found["runs"][f"{batch}/{start}"])
             for start in STARTS}  # fmt: skip
    return (
        f"Among {batch} candidates SigLIP's own threshold, -b / t, calls matches with an F1 "
        f"of {percent(learnt)} %, from the best one picked by hand {difference(learnt, hand)}; a "
        f"run begins at a loss of {first['log odds']:.1f} where b is the log odds of a match, "
        f"{first['-10']:.1f} at -10 and {first['0']:.0f} at 0."
    )


# ---- the pictures


def pictures(found: dict, args: argparse.Namespace) -> list[str]:
    with report.picture(args.out / "units.png"):
        _, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
        _sweep(axes[0], found["units"])
        _sums(axes[1], found["units"][0]["sums"])
    with report.picture(args.out / "pairs.png"):
        _, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
        _reliability(axes[0], found, args)
        _refit(axes[1], found, args)
        _bias(axes[2], found, args)
    return ["units.png", "pairs.png"]


def _sweep(axis, seeds: list[dict]) -> None:
    """F1 by the threshold of all units."""
    from examples.bias import SWEEP

    curves = list(zip(*(found["sweep"] for found in seeds), strict=True))
    mean, errors = zip(*(report.two_errors(list(values)) for values in curves), strict=True)
    axis.errorbar(SWEEP, [100 * m for m in mean], [100 * e for e in errors], color=BLUE,
                  marker="o", label="one T for all units, by hand")  # fmt: skip
    learnt = statistics.mean(found["b = -T learnt"] for found in seeds)
    axis.axhline(100 * learnt, color=RED, label="b = −T learnt")
    thresholds = [t for found in seeds for t in found["learnt"]]
    low = axis.get_ylim()[0]
    axis.plot(thresholds, [low] * len(thresholds), "|", color=RED, markersize=12,
              label="the learnt thresholds")  # fmt: skip
    axis.set(title="F1 of ten units on new digits, %", xlabel="threshold T while training")
    axis.legend()


def _sums(axis, sums: dict) -> None:
    digit = sums["digit"]
    shared = {"bins": 40, "density": True, "alpha": 0.6}
    axis.hist(sums["no"], color=MUTED, label="other digits", **shared)
    axis.hist(sums["yes"], color=BLUE, label=f"an {digit}", **shared)
    axis.axvline(sums["T"], color=RED, label="T = −b, learnt")
    axis.set(title=f"What the unit for {digit} sums up", xlabel="Σ x·w", yticks=[],
             ylabel="share of new digits")  # fmt: skip
    axis.legend()


def _reliability(axis, found: dict, args: argparse.Namespace) -> None:
    axis.plot([5e-4, 1], [5e-4, 1], ":", color=MUTED)
    for start, color in STARTS.items():
        for i, one in enumerate(found["runs"][f"{args.twin}/{start}"]):
            curve = one["calibration"]["curve"]
            if curve:
                said, there = zip(*((x, max(y, 5e-4)) for x, y in curve), strict=True)
                label = f"b₀ = {start}" if i == 0 else None
                axis.plot(said, there, marker="o", markersize=3, color=color, label=label)
    axis.set(title=f"Share of matches among pairs, B = {args.twin}", xscale="log", yscale="log",
             xlabel="probability σ(t s + b)", xlim=(5e-4, 1.2), ylim=(5e-4, 1.2))  # fmt: skip
    axis.legend(loc="upper left")


def _refit(axis, found: dict, args: argparse.Namespace) -> None:
    sizes, _, bias = zip(*found["refit"], strict=True)
    at = min(range(len(sizes)), key=lambda i: abs(sizes[i] - args.twin))
    line = [bias[at] + log_odds(n) - log_odds(sizes[at]) if n > 1 else 0 for n in sizes]
    axis.plot(sizes, line, ":", color=MUTED, label="slope of the log odds, −log(B − 1)")
    label = "one model, t and b fitted"
    axis.plot(sizes, bias, color=PURPLE, marker="o", markersize=3, label=label)
    for start, color in STARTS.items():
        ends = [(batch, one["bias"]) for batch in args.batches
                for one in found["runs"][f"{batch}/{start}"]]  # fmt: skip
        axis.plot(*zip(*ends, strict=True), "x", color=color, label=f"trained, b₀ = {start}")
    axis.set(title="The bias by the number of candidates", xscale="log", xlabel="B", ylabel="b")
    axis.legend(loc="lower left", fontsize=8)


def _bias(axis, found: dict, args: argparse.Namespace) -> None:
    styles = dict(zip(args.batches, (":", "-", "--"), strict=False))
    for start, color in STARTS.items():
        for batch, style in styles.items():
            curve = found["runs"][f"{batch}/{start}"][0]["curves"]["bias"]
            label = f"B = {batch}" if start == "-10" else None
            axis.plot(range(1, len(curve) + 1), curve, style, color=color)
            if label:
                axis.plot([], [], style, color=INK, label=label)
    for start, color in STARTS.items():
        axis.plot([], [], color=color, label=f"b₀ = {start}")
    axis.set(title="The bias while training", xlabel="step", ylabel="b")
    axis.legend(ncols=2, loc="center right", bbox_to_anchor=(1, 0.26))
