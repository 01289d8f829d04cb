"""What clip.py leaves behind: a table of recalls, one of costs, and a picture."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from rich.console import Console

from examples.common import large_batch, report
from examples.common.report import BLUE, INK, MUTED, ORANGE, difference, percent

COLORS = {"CLIP": ORANGE, "SigLIP": BLUE}
USUAL = 512  # the batch whose steps smaller ones make too
STYLES = {"right": ("-", ""), "shuffled": ("--", ", 1/5 wrong"), "steps": (":", ", equal steps")}


def tables(console: Console, found: dict) -> None:
    console.print(_recalls(found))
    for line in _remarks(found):
        console.print(line)
    title = f"a batch of {found['sizes'][-1]:,}"
    console.print(large_batch.cost_table(title, found["cost"]))


def _recalls(found: dict):
    pairs = found["pairs"]
    title = f"recall@1 of {found['held']:,} unseen scenes, both directions, %"
    out = report.table(title, ["steps", "CLIP", "SigLIP", "SigLIP − CLIP"])
    usual = f"{pairs // USUAL:,}"
    for kind, heading in (("right", f"{pairs:,} pairs"), ("shuffled", "a fifth of them wrong"),
                          ("steps", f"{usual} steps")):  # fmt: skip
        out.add_row(f"[bold]{heading}[/]")
        for size in found["small" if kind != "right" else "sizes"]:
            steps = usual if kind == "steps" else f"{pairs // size:,}"
            clip, siglip = (found["recall"][kind][loss][size] for loss in COLORS)
            out.add_row(f"  batch {size:,}", steps, percent(clip), percent(siglip),
                        difference(siglip, clip))  # fmt: skip
        out.add_section()
    out.add_row("[bold]to beat[/]")
    for name, one in found["beat"].items():
        out.add_row(f"  {name}", "", f"{100 * one:.1f}", f"{100 * one:.1f}")
    return out


def lost(found: dict, loss: str, size: int) -> list[float]:
    """By wrong captions, of each seed."""
    right, wrong = (found["recall"][kind][loss][size] for kind in ("right", "shuffled"))
    return [a - b for a, b in zip(right, wrong, strict=True)]


def _remarks(found: dict) -> list[str]:
    return [
        f"Wrong captions cost, points, in batches of {size:,}: CLIP "
        f"{percent(lost(found, 'CLIP', size))}, SigLIP {percent(lost(found, 'SigLIP', size))}; "
        f"SigLIP is {difference(lost(found, 'CLIP', size), lost(found, 'SigLIP', size))}."
        for size in found["small"]
    ]


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
        _, (recalls, cost, bars) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
        for loss, color in COLORS.items():
            for kind, (style, label) in STYLES.items():
                by_size = found["recall"][kind][loss]
                _line(recalls, by_size, color=color, linestyle=style, label=loss + label)
            _line(cost, {size: lost(found, loss, size) for size in found["small"]}, color=color,
                  label=loss)  # fmt: skip
        for axis, sizes in ((recalls, found["sizes"]), (cost, found["small"])):
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [f"{s:,}" for s in sizes])
            axis.set_xlabel("batch")
        beat = 100 * found["beat"]["words alone"]
        recalls.axhline(beat, color=MUTED, linestyle=":")
        recalls.text(found["sizes"][-1], beat, "words alone", color=MUTED, va="bottom", ha="right")
        recalls.set(title=f"Recall@1, %, after {found['pairs']:,} pairs", ylim=(0, 100))
        recalls.legend(fontsize=7.5, loc="upper right")
        cost.set(title="Points lost by a fifth of wrong captions", ylim=(0, None))
        cost.legend(loc="lower right")
        _bars(bars, found)


def _line(axis, by_size: dict, **looks) -> None:
    """Means with two standard errors of them, in %."""
    points = [report.two_errors([100 * x for x in seeds]) for seeds in by_size.values()]
    means, errors = zip(*points, strict=True)
    axis.errorbar([*by_size], means, [e if e > 0 else 0 for e in errors], marker="o", markersize=4,
                  capsize=2, **looks)  # fmt: skip


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
    axis.set(title=f"A loss of {found['sizes'][-1]:,} pairs: MB, and time",
             ylim=(0, 1.2 * most))  # fmt: skip
