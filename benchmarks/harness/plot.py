"""Draws time and memory on logarithmic axes: against a size, or of many cases side by side.

`python -m benchmarks.harness.plot` draws the tracked pictures anew from the tracked CSV files.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullLocator  # noqa: E402

from benchmarks.harness import registry  # noqa: E402
from benchmarks.harness.bench import COMPILED, EAGER, OURS, PRODUCTS, Benchmark  # noqa: E402
from benchmarks.harness.measure import ROOT  # noqa: E402
from benchmarks.harness.report import MEASURED, Row, read_csv  # noqa: E402

# Colours that also differ in lightness; the ops' own baselines take the spare ones in turn.
COLOURS = {OURS: "#d1495b", PRODUCTS: "#555555", EAGER: "#2e4057", COMPILED: "#00798c"}
SPARE = ("#b8860b", "#7a5195", "#5f9e45", "#3b8ea5", "#c06c2f")
INCHES_PER_LABEL = 0.27
INCHES_PER_CASE = 0.42

Value = Callable[[Row], float | None]
End = tuple[dict[int, float], str, str, str]  # points of a line, its name, colour, and a note


def draw(benchmark: Benchmark, rows: Sequence[Row], stem: Path) -> list[Path]:
    """Draws the cases of the sweep, the main kind; returns `<stem>-{time,memory}.png`, if any."""
    sweep = {case.label for case in benchmark.cases if case.sweep}
    rows = [row for row in rows if row.case in sweep]
    rows = [row for row in rows if row.kind == rows[0].kind]
    if not rows:
        return []
    axis = benchmark.axis
    figures = {
        "time": _time(rows, axis) if axis else _cases(rows, time=True),
        "memory": _memory(rows, axis) if axis else _cases(rows, time=False),
    }
    paths = []
    for what, figure in figures.items():
        paths.append(stem.with_name(f"{stem.name}-{what}.png"))
        figure.savefig(paths[-1], dpi=150)
        plt.close(figure)
    return paths


def _cases(rows: Sequence[Row], time: bool) -> plt.Figure:
    """A line for each case: every implementation's time beside the products', or its memory.

    Where there are no products, beside the baseline's.
    """
    rows = [row for row in rows if row.status == MEASURED]
    cases = list(dict.fromkeys(row.case for row in rows))
    height = 1.8 + INCHES_PER_CASE * len(cases)
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    floor, ratio = _floor(rows)
    value: Value = ratio if time else lambda r: r.peak_bytes
    for name, colour in _colours(rows).items():
        line = [row for row in rows if row.implementation == name and value(row)]
        places = [cases.index(row.case) for row in line]
        if time and name == floor:
            axes.axvline(1.0, color=colour, linestyle="--", linewidth=1.2, label=name)
        else:
            axes.scatter(
                [value(row) for row in line], places, s=70 if name == OURS else 30, color=colour,
                marker="D" if name == OURS else "o", zorder=3 if name == OURS else 2, label=name,
            )  # fmt: skip
    axes.set(xscale="log", ylim=(len(cases) - 0.5, -0.5))
    axes.set_xlabel(f"time / {floor}" if time else "peak memory of a call")
    axes.set_yticks(range(len(cases)), [_short(rows, case) for case in cases])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×" if time else _bytes(x)))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    what, sizes = "time" if time else "peak memory", " × ".join(rows[0].size_of)
    _titles(axes, rows, what, sizes, across="figure fraction")
    return figure


def _floor(rows: Sequence[Row]) -> tuple[str, Value]:
    """What times are drawn relative to: the products or, where there are none, the baseline."""
    if any(row.ratio_to_products is not None for row in rows):
        return PRODUCTS, lambda row: row.ratio_to_products
    return rows[0].baseline, lambda row: row.ratio_to_baseline


def _short(rows: Sequence[Row], case: str) -> str:
    """A case in a few characters: the sizes, and what else tells it from the others."""
    row = next(row for row in rows if row.case == case)
    text = " × ".join(map(str, row.size_of.values()))
    several = len({row.dtype for row in rows}) > 1
    return text + f", {row.dtype}" * several + (f", {row.data}" if row.data else "")


def _time(rows: Sequence[Row], axis: str) -> plt.Figure:
    """Time above, its ratio to the products, or the baseline, below."""
    figure, (above, below) = plt.subplots(
        2, sharex=True, figsize=(8, 7), height_ratios=(2, 1), layout="constrained"
    )
    above.set(xscale="log", yscale="log")
    _panel(above, rows, axis, lambda row: row.median_ms, _milliseconds, notes=True)
    for name, colour in _colours(rows).items():
        line = [row for row in rows if row.implementation == name and row.median_ms is not None]
        quartiles = [row.q25_ms for row in line], [row.q75_ms for row in line]
        x = [row.size_of[axis] for row in line]
        above.fill_between(x, *quartiles, color=colour, alpha=0.15, linewidth=0)
    floor, ratio = _floor(rows)
    below.set(ylabel=f"time / {floor}", xlabel=axis)
    below.axhline(0, linewidth=0)  # so that the ratios start there
    _panel(below, rows, axis, ratio, lambda y: f"{y:g}×")
    _titles(above, rows, f"time against {axis}", _fixed(rows, axis))
    return figure


def _memory(rows: Sequence[Row], axis: str) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.set(xscale="log", yscale="log", xlabel=axis)
    _panel(axes, rows, axis, lambda row: row.peak_bytes, _bytes, notes=True)
    _titles(axes, rows, f"peak memory against {axis}", _fixed(rows, axis))
    return figure


def _panel(
    axes: Axes, rows: Sequence[Row], axis: str, value: Value, unit: Callable[[float], str],
    notes: bool = False,
) -> None:
    """A line with a label for each implementation; `notes` adds why a line stops."""
    ends = []
    for name, colour in _colours(rows).items():
        line = [row for row in rows if row.implementation == name and value(row) is not None]
        if line:
            x, y = [row.size_of[axis] for row in line], [value(row) for row in line]
            axes.plot(
                x, y, "--" if name == PRODUCTS else "-", color=colour, marker="o", markersize=4,
                linewidth=2.6 if name == OURS else 1.5, zorder=3 if name == OURS else 2,
            )  # fmt: skip
            note = _skipped(rows, name, axis) if notes else ""
            ends.append((dict(zip(x, y, strict=True)), name, colour, note))
    sizes = sorted({row.size_of[axis] for row in rows})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: unit(y)))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    _labels(axes, _lowest_first(ends))


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    names = list(dict.fromkeys(row.implementation for row in rows))
    spare = iter(SPARE * len(names))
    return {name: COLOURS.get(name) or next(spare) for name in names}


def _skipped(rows: Sequence[Row], name: str, axis: str) -> str:
    """Why the line of an implementation stops early."""
    for row in rows:
        if row.implementation == name and row.status != MEASURED:
            return f"{row.size_of[axis]:,} {row.status.removeprefix('skipped: ')}"
    return ""


def _lowest_first(ends: list[End]) -> list[End]:
    """In the order of the lines where all of them still are; one may go on alone, and higher."""
    shared = [x for x in ends[0][0] if all(x in points for points, *_ in ends)] if ends else []
    return sorted(ends, key=lambda end: end[0][shared[-1]] if shared else max(end[0].values()))


def _labels(axes: Axes, ends: list[End]) -> None:
    """Names the lines at the right edge, from the lowest up, apart from each other."""
    axes.autoscale_view()
    gap = INCHES_PER_LABEL / (axes.get_position().height * axes.figure.get_figheight())
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [to_axes.transform((1, list(points.values())[-1]))[1] for points, *_ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    ceiling = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    for height, (_, name, colour, note) in zip(heights, ends, strict=True):
        style = {"transform": axes.transAxes, "color": colour}
        weight = "bold" if name == OURS else "normal"
        axes.text(1.015, height, name, va="center", fontsize=9, fontweight=weight, **style)
        axes.text(1.015, height - 0.4 * gap, note, va="center", fontsize=6.5, **style)


def _fixed(rows: Sequence[Row], axis: str) -> str:
    """The sizes that a sweep leaves as they are."""
    return " ".join(pair for pair in rows[0].sizes.split() if not pair.startswith(f"{axis}="))


def _titles(
    axes: Axes, rows: Sequence[Row], what: str, sizes: str, across: str = "axes fraction"
) -> None:
    """Above the axes, from their left edge or from the figure's."""
    row, dtypes = rows[0], " and ".join(dict.fromkeys(row.dtype for row in rows))
    texts = {"xycoords": (across, "axes fraction"), "textcoords": "offset points"}
    left = 0 if across == "axes fraction" else 8
    axes.annotate(
        f"{row.op}, {row.kind}: {what}  ({sizes}, {dtypes})", (0, 1), xytext=(left, 26),
        fontweight="bold", fontsize=11, **texts,
    )  # fmt: skip
    note = "" if row.verified else "  ·  NOT VERIFIED"
    axes.annotate(
        f"{row.machine}, {row.threads} threads  ·  torch {row.torch}  ·  "
        f"tilewise {row.tilewise} {row.commit}{note}",
        (0, 1), xytext=(left, 10), fontsize=8, color="#555555", **texts,
    )


def _milliseconds(value: float) -> str:
    return f"{value / 1000:g} s" if value >= 1000 else f"{value:g} ms"


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"


def main() -> None:
    """Draws what is tracked."""
    results = ROOT / "benchmarks" / "results"
    for path in sorted([*results.glob("*-cpu.csv"), *results.glob("*-cuda.csv")]):
        op = path.stem.rsplit("-", 1)[0]
        for picture in draw(registry.load(op), read_csv(path), path.with_suffix("")):
            print(f"drew {picture.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
