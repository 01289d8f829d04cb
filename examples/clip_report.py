"""What clip.py leaves behind: a table of recalls, one of costs, and a picture."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from rich.console import Console

from examples.common import large_batch, report
from examples.common.report import BLUE, INK, MUTED, ORANGE

COLORS = {"CLIP": ORANGE, "SigLIP": BLUE}


def percent(values: list[float]) -> str:
    """The mean ± two standard errors, in %."""
    mean, error = report.two_errors([100 * v for v in values])
    return f"{mean:.1f}" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}"


def difference(ours: list[float], theirs: list[float]) -> str:
    """Of equal seeds: a mean that is two standard errors from 0 is a difference."""
    mean, error = report.two_errors([100 * (a - b) for a, b in zip(ours, theirs, strict=True)])
    verdict = "equal" if not abs(mean) > error else "better" if mean > 0 else "worse"
    return f"{mean:+.1f} ± {error:.1f}, {verdict}"


def tables(console: Console, found: dict) -> None:
    console.print(_recalls(found))
    title = f"a batch of {found['sizes'][-1]:,}"
    console.print(large_batch.cost_table(title, found["cost"]))


def _recalls(found: dict):
    right, wrong = (found["recall"][kind] for kind in ("right", "shuffled"))
    title = f"recall@1 of {found['held']:,} unseen scenes, %, after {found['pairs']:,} pairs"
    out = report.table(title, ["steps", "CLIP", "SigLIP", "SigLIP − CLIP", "CLIP,\n1/5 shuffled",
                               "SigLIP,\n1/5 shuffled", "SigLIP − CLIP"])  # fmt: skip
    for size in found["sizes"]:
        row = [f"{found['pairs'] // size:,}"]
        for part in (right, wrong):
            row += [percent(part[loss][size]) for loss in COLORS]
            row.append(difference(part["SigLIP"][size], part["CLIP"][size]))
        out.add_row(f"batch {size:,}", *row)
    out.add_section()
    for name, value in found["beat"].items():
        out.add_row(name, "", f"{100 * value:.1f}")
    return out


def value(found: dict) -> str:
    """What came out, in one sentence."""
    best = {}
    for loss in COLORS:
        means = {size: statistics.mean(v) for size, v in found["recall"]["right"][loss].items()}
        size = max(means, key=lambda s: means[s])
        best[loss] = f"{loss} is best in batches of {size:,} ({100 * means[size]:.1f} %)"
    fused, eager = (found["cost"]["alone"]["CLIP"][name] for name in ("fused", "eager"))
    text = f"Of {found['pairs']:,} pairs {best['CLIP']}, {best['SigLIP']}"
    if eager is None:
        return f"{text}; the eager loss of {found['sizes'][-1]:,} needs more memory than is free."
    return (f"{text}; CLIP's loss of {found['sizes'][-1]:,} is "
            f"{eager['seconds'] / fused['seconds']:.1f}x faster than the eager one, "
            f"{report.memory(fused['peak_mb'])} in place of "
            f"{report.memory(eager['peak_mb'])}.")  # fmt: skip


def picture(found: dict, path: Path) -> None:
    with report.picture(path):
        _, (recalls, lost, cost) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
        sizes, width = found["sizes"], 0.05
        for i, (loss, color) in enumerate(COLORS.items()):
            for kind in ("right", "shuffled"):
                values = [found["recall"][kind][loss][size] for size in sizes]
                means, errors = zip(*(report.two_errors([100 * x for x in v]) for v in values),
                                    strict=True)  # fmt: skip
                style = "-" if kind == "right" else "--"
                label = loss + ("" if kind == "right" else ", a fifth of the captions shuffled")
                recalls.errorbar(sizes, means, [e if e > 0 else 0 for e in errors], color=color,
                                 linestyle=style, marker="o", capsize=2, label=label)  # fmt: skip
            right, wrong = (found["recall"][kind][loss] for kind in ("right", "shuffled"))
            parts = [report.two_errors([100 * (b - a) for a, b in
                                        zip(right[s], wrong[s], strict=True)])
                     for s in sizes]  # fmt: skip
            lost.errorbar([s * (1 + width * (2 * i - 1)) for s in sizes], [m for m, _ in parts],
                          [e if e > 0 else 0 for _, e in parts], color=color, marker="o",
                          capsize=2, label=loss)  # fmt: skip
        for axis in (recalls, lost):
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [f"{s:,}" for s in sizes])
            axis.set_xlabel("batch")
        beat = 100 * found["beat"]["nearest pixel"]
        recalls.axhline(beat, color=MUTED, linestyle=":")
        recalls.text(sizes[0], beat, " nearest pixel", color=MUTED, va="bottom")
        recalls.set(title=f"Recall@1, %, after {found['pairs']:,} pairs", ylim=(0, None))
        recalls.legend(fontsize=8)
        lost.axhline(0, color=MUTED, linewidth=0.8)
        lost.set(title="What shuffled captions cost, points of recall@1")
        lost.legend(loc="lower right")
        _bars(cost, found)


def _bars(axis, found: dict) -> None:
    """Memory of the losses of the largest batch, with their times."""
    place, names = 0, []
    for loss, color in COLORS.items():
        for name, one in found["cost"]["alone"][loss].items():
            names.append(f"{loss}\n{name}")
            if one is not None:
                axis.bar(place, one["peak_mb"], color=color, alpha=1 if name == "fused" else 0.45)
                text = f"{report.memory(one['peak_mb'])}\n{report.duration(one['seconds'])}"
                axis.text(place, one["peak_mb"], text, ha="center", va="bottom", color=INK)
            place += 1
    axis.set_xticks(range(place), names)
    axis.grid(False, axis="x")
    most = max(c["peak_mb"] for loss in COLORS for c in found["cost"]["alone"][loss].values() if c)
    axis.set(title=f"A loss of {found['sizes'][-1]:,} pairs alone: memory, MB, and time",
             ylim=(0, 1.2 * most))  # fmt: skip
