"""Tables, pictures and the sentence of the filter network's example."""

from __future__ import annotations

import argparse
import statistics
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console

from examples.common import large_batch, report
from examples.common.data import CREDIT, Pairs
from examples.common.report import BLUE, GREEN, MUTED, ORANGE, PURPLE, RED, difference, percent
from examples.common.retrieval import both

COLORS = {"filtered": BLUE, "random": ORANGE, "oracle-clean": GREEN, "whole pool": PURPLE,
          "clean pairs": MUTED}  # fmt: skip


def columns(rows: list[list[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*rows, strict=True)]


# ---- the tables


def tables(console: Console, found: dict, args: argparse.Namespace) -> None:
    console.print(_filters(found["seeds"], args))
    console.print(_sets(found))
    console.print(_grid(found["grid"], args))
    title = f"A batch of {args.batch_size}"
    console.print(large_batch.cost_table(title, found["seeds"][0]["cost"]))


def _filters(seeds: list[dict], args: argparse.Namespace):
    from examples.dfn import SHARES

    made = report.table(
        f"The filter: {args.pool:,} pairs, {100 * args.noise:.0f} % of them wrong; by share kept",
        [f"{what} of\n{100 * share:.0f} %" for share in SHARES for what in ("precision", "recall")]
        + ["ranked\nright"],
    )
    for name in seeds[0]["filters"]:
        judged = [found["filters"][name] for found in seeds]
        made.add_row(name, *(
            percent([j[what][i] for j in judged])
            for i in range(len(SHARES)) for what in ("precision", "recall")
        ), percent([j["ranked"] for j in judged]))  # fmt: skip
    chosen = [percent([x]) for share in SHARES for x in (1 - args.noise, share)]
    made.add_row("random", *chosen, "50.0")
    calls = [found["calls"] for found in seeds]
    made.caption = (
        f"What SigLIP itself calls a match, s > -b / t: {percent([c['kept'] for c in calls])} % of "
        f"the pool, precision {percent([c['precision'] for c in calls])} %, recall "
        f"{percent([c['recall'] for c in calls])} %."
    )
    made.caption_justify = "left"
    return made


def _sets(found: dict):
    seeds = found["seeds"]
    made = report.table(
        f"Trained on it: recall of {found['candidates']} test pictures, %, {len(seeds)} seeds",
        ["pairs", "image→text\n@1", "text→image\n@1", "mean, from\nrandom", "from whole\npool"],
    )
    ones = {name: [both(s["sets"][name]["recall"]) for s in seeds] for name in COLORS}
    for name in COLORS:
        forth, _, back, _ = columns([s["sets"][name]["recall"] for s in seeds])
        cells = []
        for other in ("random", "whole pool"):
            cells.append("" if name == other else difference(ones[name], ones[other]))
        count = seeds[0]["sets"][name]["pairs"]
        made.add_row(name, f"{count:,}", percent(forth), percent(back), *cells)
    made.add_section()
    pixel = columns([s["nearest pixel"] for s in seeds])
    made.add_row("nearest pixel", "", percent(pixel[0]), percent(pixel[2]))
    made.add_row("chance", "", *[percent([found["chance"][0]])] * 2)
    return made


def _cells(cells: list[dict], amount: int, noise: float, diversity: str) -> list[float]:
    return [both(c["recall"]) for c in cells
            if (c["amount"], c["noise"], c["diversity"]) == (amount, noise, diversity)]  # fmt: skip


def _grid(cells: list[dict], args: argparse.Namespace):
    made = report.table("Recall@1, %, mean of both directions, by amount, noise, diversity",
                        ["pairs", *(f"{100 * n:.0f} % wrong" for n in args.noises)])  # fmt: skip
    for diversity in ("few things", "many things"):
        for amount in args.amounts:
            things = next(c["things"] for c in cells
                          if (c["amount"], c["diversity"]) == (amount, diversity))  # fmt: skip
            made.add_row(f"{diversity}: {things}", str(amount), *(
                percent(_cells(cells, amount, noise, diversity)) for noise in args.noises
            ))  # fmt: skip
        made.add_section()
    return made


def value(found: dict) -> str:
    """What the filter is good for, in a sentence."""
    seeds = found["seeds"]
    name = next(iter(seeds[0]["filters"]))
    precision = [s["filters"][name]["precision"][1] for s in seeds]
    ones = {k: [both(s["sets"][k]["recall"]) for s in seeds] for k in COLORS}
    parts = []
    for other in ("random", "whole pool", "oracle-clean"):
        words = {"random": "as many random ones", "whole pool": "the whole pool",
                 "oracle-clean": "as many right ones"}[other]  # fmt: skip
        parts.append(f"{difference(ones['filtered'], ones[other])}, from {words}")
    return (f"The half that the filter keeps is right in {percent(precision)} % of its pairs; "
            f"recall@1 of a model trained on it is, in points, {'; '.join(parts)}.")  # fmt: skip


# ---- the pictures


def pictures(found: dict, args: argparse.Namespace) -> None:
    with report.picture(args.out / "filter.png"):
        _, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
        _curves(left, found["seeds"], args)
        _bars(right, found)
    with report.picture(args.out / "grid.png"):
        _, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", squeeze=False)
        _maps(axes[0], found["grid"], args)


def _curves(axis, seeds: list[dict], args: argparse.Namespace) -> None:
    for (name, _), color in zip(seeds[0]["filters"].items(), (BLUE, ORANGE), strict=True):
        for i, found in enumerate(seeds):
            recall, precision = columns(found["filters"][name]["curve"])
            axis.plot([100 * r for r in recall], [100 * p for p in precision], color=color,
                      label=name if i == 0 else None)  # fmt: skip
    for i, found in enumerate(seeds):
        calls = found["calls"]
        axis.plot(100 * calls["recall"], 100 * calls["precision"], "x", color=RED,
                  label="s > −b / t" if i == 0 else None)  # fmt: skip
    axis.axhline(100 * (1 - args.noise), color=MUTED, linestyle=":", label="random")
    axis.set(title="The filter: precision by recall of right captions, %", xlabel="recall, %",
             ylim=(100 * (1 - args.noise) - 5, 101))  # fmt: skip
    axis.legend(loc="lower left")


def _bars(axis, found: dict) -> None:
    for i, (name, color) in enumerate(COLORS.items()):
        ones = [both(s["sets"][name]["recall"]) for s in found["seeds"]]
        mean, errors = report.two_errors(ones)
        axis.bar(i, 100 * mean, yerr=100 * errors, color=color, width=0.7, capsize=4)
    names = [f"{name}\n{found['seeds'][0]['sets'][name]['pairs']:,}" for name in COLORS]
    axis.set_xticks(range(len(names)), names)
    pixel = statistics.mean(both(s["nearest pixel"]) for s in found["seeds"])
    axis.axhline(100 * pixel, color=MUTED, linestyle=":")
    axis.text(3, 100 * pixel, "nearest pixel", color=MUTED, ha="center", va="bottom")
    axis.grid(False)
    axis.set(title="Recall@1 on test pictures by what was trained on, %")


def _maps(axes, cells: list[dict], args: argparse.Namespace) -> None:
    means = {
        diversity: torch.tensor([
            [statistics.mean(_cells(cells, amount, noise, diversity)) for noise in args.noises]
            for amount in args.amounts
        ]) for diversity in ("few things", "many things")
    }  # fmt: skip
    top = 100 * max(m.max().item() for m in means.values())
    for axis, (diversity, values) in zip(axes, means.items(), strict=True):
        axis.imshow(100 * values, cmap="Blues", vmin=0, vmax=1.3 * top, origin="lower",
                    aspect="auto")  # fmt: skip
        for i, row in enumerate(values.tolist()):
            for k, value in enumerate(row):
                axis.text(k, i, f"{100 * value:.1f}", ha="center", va="center")
        things = {c["amount"]: c["things"] for c in cells if c["diversity"] == diversity}
        axis.set_xticks(range(len(args.noises)), [f"{100 * n:.0f} %" for n in args.noises])
        labels = [f"{amount}\n({things[amount]} things)" for amount in args.amounts]
        axis.set_yticks(range(len(args.amounts)), labels)
        axis.grid(False)
        axis.set(title=f"Recall@1, %: {diversity}", xlabel="wrong captions", ylabel="pairs")


def sheet(pool: Pairs, right: torch.Tensor, scores: torch.Tensor, path: Path) -> None:
    """The pairs with the best and the worst scores, and some between; green where right."""
    order = scores.argsort(descending=True)
    count = min(8, len(order) // 3)
    middle = (len(order) - count) // 2
    rows = {"best": order[:count], "middle": order[middle : middle + count],
            "worst": order[-count:]}  # fmt: skip
    with report.picture(path):
        figure, axes = plt.subplots(3, count, figsize=(1.7 * count, 8), layout="constrained")
        for line, (name, shown) in zip(axes, rows.items(), strict=True):
            for i, (axis, row) in enumerate(zip(line, shown.tolist(), strict=True)):
                axis.imshow(pool.images[row].permute(1, 2, 0).numpy(), interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.grid(False)
                axis.spines[:].set_visible(False)
                axis.set_xlabel("\n".join(textwrap.wrap(pool.captions[row], 20)), fontsize=7.5,
                                color=GREEN if right[row] else RED)  # fmt: skip
                title = f"{name}: {scores[row]:.2f}" if i == 0 else f"{scores[row]:.2f}"
                axis.set_title(title, weight="bold" if i == 0 else "normal", fontsize=9)
        figure.supxlabel(f"Cosines by the filter. Red: wrong caption.   {CREDIT}.", fontsize=8,
                         color=MUTED)  # fmt: skip
