"""Draws the README's first picture from benchmarks/results: `python -m docs.figures.hero`."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

PATH = Path(__file__).with_name("hero.svg")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
OURS, OTHERS, INK = "#d1495b", "#b9c3d0", "#2e4057"


class Panel(NamedTuple):
    """One op and case, and who is compared, by the names of the benchmark."""

    title: str
    op: str
    case: str
    names: dict[str, str]  # of the benchmark: in the picture


PANELS = (
    Panel("SigLIP's loss: 16,384 pairs", "sigmoid_loss", "B=16384 D=512 float32",
          {"tilewise": "tilewise", "torch.compile": "torch.compile", "open_clip": "open_clip",
           "eager": "plain PyTorch"}),
    Panel("VQ step: 16,384 rows, 8,192 codes", "vector_quantizer",
          "N=16384 K=8192 D=64 float32", {"tilewise": "tilewise", "lucidrains": "lucidrains"}),
    Panel("Gumbel-softmax: 65,536 x 1,024", "gumbel_softmax", "N=65536 K=1024 float32",
          {"tilewise": "tilewise", "F.gumbel_softmax": "F.gumbel_softmax"}),
)  # fmt: skip


def main(path: Path = PATH) -> Path:
    """Writes the picture; returns its path."""
    style = {"svg.hashsalt": "tilewise", "svg.fonttype": "none", "font.size": 9}
    with plt.rc_context(style):
        figure = draw()
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        plt.close(figure)
    return path


def draw() -> plt.Figure:
    """A column for each panel: time above, memory below."""
    figure, grid = plt.subplots(
        2, len(PANELS), figsize=(11, 3.6), layout="constrained", sharey="col",
        gridspec_kw={"hspace": 0.12},
    )  # fmt: skip
    for (above, below), panel in zip(grid.T, PANELS, strict=True):
        rows = measured(panel)
        above.set_title(panel.title, fontsize=10, fontweight="bold", color=INK, loc="left")
        bars(above, {n: float(r["median_ms"]) for n, r in rows.items()}, seconds)
        bars(below, {n: float(r["peak_bytes"]) for n, r in rows.items()}, size)
    for axes, what in zip(grid[:, 0], ("time", "memory"), strict=True):
        axes.set_ylabel(what, color=INK, fontweight="bold", labelpad=8)
    return figure


def measured(panel: Panel) -> dict[str, dict[str, str]]:
    """The rows of a panel, forward and backward, by the name in the picture."""
    with (RESULTS / f"{panel.op}-cpu.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["case"] == panel.case]
    by_name = {row["implementation"]: row for row in rows if row["kind"] == "fwd+bwd"}
    return {shown: by_name[name] for name, shown in panel.names.items()}


def bars(axes: Axes, values: dict[str, float], text: Callable[[float], str]) -> None:
    """A bar for each value, ours first and in colour, with its value beside it."""
    longest = max(values.values())
    colours = [OURS if name == "tilewise" else OTHERS for name in values]
    axes.barh([*values], [*values.values()], 0.66, color=colours)
    for i, (name, value) in enumerate(values.items()):
        axes.text(value + 0.015 * longest, i, text(value), va="center", color=INK,
                  fontweight="bold" if name == "tilewise" else "normal")  # fmt: skip
    axes.set(xlim=(0, 1.24 * longest), xticks=[])
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.tick_params(length=0, labelcolor=INK)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def seconds(milliseconds: float) -> str:
    """In ms or s."""
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1e3:.1f} s"


def size(count: float) -> str:
    """In MB or GB."""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


if __name__ == "__main__":
    print(f"wrote {main()}")
