"""The joint table, the curves and the sentence of cheaper training."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from rich.console import Console

from examples.common import large_batch, report
from examples.common.report import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED, difference, percent
from examples.common.retrieval import both

COLORS = {
    "plain": INK, "FLIP, 50 %": BLUE, "FLIP, 75 %": PURPLE, "LiT, locked": GREEN,
    "LiT, unlocked": ORANGE, "random tower, locked": MUTED, "CatLIP": RED,
}  # fmt: skip
BEFORE = {"LiT, locked": "subgroups", "LiT, unlocked": "subgroups", "CatLIP": "nouns"}


def seconds_before(found: dict, name: str) -> float:
    """What learning labels took."""
    kind, plan = BEFORE.get(name), found["plan"]
    return plan["steps"][kind] * plan["seconds"][kind] if kind else 0.0


def curve(found: dict, name: str, seed: dict) -> list[tuple[float, float]]:
    """(seconds, validation recall@1) at each checkpoint. CatLIP's first part counts; the labels
    that LiT begins with do not, as it is for a tower that somebody has."""
    began = seconds_before(found, name) if name == "CatLIP" else 0.0
    each = found["plan"]["seconds"][name]
    return [(began + step * each, both(recall)) for step, *recall in seed["methods"][name]["curve"]]


def until(found: dict, name: str, seed: dict) -> float | None:
    """Seconds until the first checkpoint at the stated recall."""
    return next((at for at, value in curve(found, name, seed) if value >= found["target"]), None)


def tables(console: Console, found: dict) -> None:
    plan, seeds = found["plan"], found["seeds"]
    whole = plan["steps"]["plain"] * plan["seconds"]["plain"]
    made = report.table(
        f"Each trains for {report.duration(whole)}; recall of {found['candidates']} test pictures, "
        f"%, {len(seeds)} seeds",
        ["labels\nbefore", "a step", "steps", f"time to\n{100 * found['target']:.0f} %",
         "image→text\n@1", "text→image\n@1", "from plain"],
    )  # fmt: skip
    plain = [both(seed["methods"]["plain"]["recall"]) for seed in seeds]
    for name in COLORS:
        recalls = [seed["methods"][name]["recall"] for seed in seeds]
        before = seconds_before(found, name)
        made.add_row(
            name, report.duration(before) if before else "", report.duration(plan["seconds"][name]),
            str(plan["steps"][name]), _until(found, name),
            percent([r[0] for r in recalls]), percent([r[2] for r in recalls]),
            "" if name == "plain" else difference([both(r) for r in recalls], plain),
        )  # fmt: skip
    made.add_section()
    for name in ("nearest pixel", "chance"):
        made.add_row(name, *[""] * 4, percent([found[name][0]]), percent([found[name][2]]))
    console.print(made)
    for kind in ("subgroups", "nouns"):
        ones = [seed["labels"][kind] for seed in seeds]
        console.print(
            f"{ones[0]['labels']} {kind} as labels: on {ones[0]['pictures']} test pictures the "
            f"best guess is right in {percent([one['right'] for one in ones])} %, the most "
            f"frequent one in {percent([ones[0]['most frequent']])} %."
        )
    title = "A plain step, with each loss"
    console.print(large_batch.cost_table(title, plan["cost"]))


def _until(found: dict, name: str) -> str:
    times = [until(found, name, seed) for seed in found["seeds"]]
    if None in times:
        reached = sum(time is not None for time in times)
        return "never" if not reached else f"{reached} of {len(times)}"
    return report.duration(statistics.mean(times))


def value(found: dict) -> str:
    """What was cheaper, in a sentence."""
    seconds = found["plan"]["seconds"]
    plain = [both(seed["methods"]["plain"]["recall"]) for seed in found["seeds"]]
    parts = []
    for name in ("FLIP, 50 %", "FLIP, 75 %", "LiT, locked", "LiT, unlocked", "CatLIP"):
        ones = [both(seed["methods"][name]["recall"]) for seed in found["seeds"]]
        parts.append(f"{name} {difference(ones, plain)}")
    return (
        f"Steps are {seconds['plain'] / seconds['FLIP, 50 %']:.1f} and "
        f"{seconds['plain'] / seconds['FLIP, 75 %']:.1f} times shorter with FLIP, "
        f"{seconds['plain'] / seconds['LiT, locked']:.1f} times with LiT; recall@1 after equal "
        f"time, in points from the plain run's: {'; '.join(parts)}."
    )


def curves(found: dict, path: Path) -> None:
    """Validation recall by time."""
    with report.picture(path):
        _, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained",
                                        width_ratios=(1.6, 1))  # fmt: skip
        for name, color in COLORS.items():
            by_seed = [curve(found, name, seed) for seed in found["seeds"]]
            points = [
                (at[0][0], *report.two_errors([value for _, value in at]))
                for at in zip(*by_seed, strict=True)
            ]
            times, means, errors = zip(*points, strict=True)
            left.plot(times, [100 * m for m in means], color=color, label=name)
            left.fill_between(times, [100 * (m - e) for m, e in zip(means, errors, strict=True)],
                              [100 * (m + e) for m, e in zip(means, errors, strict=True)],
                              color=color, alpha=0.12, linewidth=0)  # fmt: skip
        left.axhline(100 * found["target"], color=MUTED, linestyle=":")
        left.set(title="Recall@1 on validation pictures, %", xlabel="seconds of training",
                 ylim=(0, None))  # fmt: skip
        left.legend()
        for i, (name, color) in enumerate(reversed(COLORS.items())):
            right.barh(i, 1000 * found["plan"]["seconds"][name], color=color)
        right.set_yticks(range(len(COLORS)), [*reversed(COLORS)], color=INK)
        right.set_axisbelow(True)
        right.set(title="A step, ms", xlim=(0, None))
