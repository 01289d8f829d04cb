"""Parts of what a run leaves behind: tables, pictures in one style, the text of the console."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import report as measured

INK, MUTED, GRID = "#222222", "#8a8a8a", "#e6e6e6"
BLUE, ORANGE, PURPLE, RED, GREEN = "#0b6e99", "#f2a33a", "#7a4fa3", "#b0413e", "#1f8a4c"
STYLE = {
    "axes.edgecolor": MUTED, "axes.grid": True, "axes.labelcolor": INK, "axes.spines.right": False,
    "axes.spines.top": False, "axes.titlelocation": "left", "axes.titlesize": 11,
    "axes.titleweight": "bold", "figure.facecolor": "white", "font.size": 9, "grid.color": GRID,
    "legend.frameon": False, "xtick.color": MUTED, "ytick.color": MUTED,
}  # fmt: skip


def console() -> Console:
    """Where a run prints; it remembers what it printed, without the bars."""
    return Console(width=None if Console().is_terminal else 110, record=True, highlight=False)


def table(title: str, names: list[str]) -> Table:
    """A table whose first column holds what a row is about."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for i, name in enumerate(["", *names]):
        made.add_column(name, justify="right" if i else "left")
    return made


def duration(seconds: float) -> str:
    """Three digits: 0.41 ms, 152 ms, 6.34 s."""
    milliseconds = 1000 * seconds
    return f"{seconds:.3g} s" if seconds >= 1 else f"{milliseconds:.3g} ms"


def minutes(seconds: float) -> str:
    """3 min 22 s, 41 s."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole} min {rest} s" if whole else f"{rest} s"


def two_errors(values: list[float]) -> tuple[float, float]:
    """The mean and two standard errors of it."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), 2 * statistics.stdev(values) / math.sqrt(len(values))


def percent(values: list[float], sign: str = "") -> str:
    """Shares, as the mean and two standard errors of it; `sign="+"` for differences."""
    mean, errors = two_errors(values)
    return f"{100 * mean:{sign}.1f}" + ("" if math.isnan(errors) else f" ± {100 * errors:.1f}")


def verdict(differences: list[float]) -> str:
    """Better or worse by more than two standard errors, or not to be told apart; of one run
    nothing can be said."""
    mean, errors = two_errors(differences)
    if math.isnan(errors):
        return ""
    if abs(mean) <= errors:
        return "equal"
    return "better" if mean > 0 else "worse"


def difference(ours: list[float], theirs: list[float]) -> str:
    """Of shares, run by run, and what may be said of it: "+1.2 ± 0.3, better"."""
    less = [a - b for a, b in zip(ours, theirs, strict=True)]
    return ", ".join(filter(None, (percent(less, "+"), verdict(less))))


def memory(mb: float) -> str:
    """Megabytes or, where there are many or few, gigabytes or kilobytes."""
    if mb < 1:
        return f"{1000 * mb:.0f} kB"
    return f"{mb / 1000:.1f} GB" if mb >= 1000 else f"{mb:.0f} MB"


@contextlib.contextmanager
def picture(path: Path, dpi: int = 110) -> Iterator[None]:
    """Saves the figure that is made inside, in the style of all pictures here."""
    with plt.rc_context(STYLE):
        yield
        plt.gcf().savefig(path, dpi=dpi)
        plt.close()


def show(axis, image: torch.Tensor, edge: str | None = None) -> None:
    """An uint8 picture (3, H, W) pixel by pixel, in a frame of color `edge` if there is one."""
    axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set(visible=edge is not None, color=edge, linewidth=2.5)


def looks(color: str, kind: str) -> dict:
    """Of a curve: what is compared with is dashed and thin, so that both show where they agree."""
    dashed = kind == "eager"
    return {"color": color, "linestyle": "--" if dashed else "-", "linewidth": 1.3 if dashed else 2}


def differences(ours: list[float], theirs: list[float]) -> torch.Tensor:
    """Relative, of two curves."""
    a, b = torch.tensor(ours), torch.tensor(theirs)
    return (a - b).abs() / b


def machine(device: str = "cpu") -> str:
    """Processor, threads and torch version: what every measured number depends on."""
    name, threads = measured.machine(device)
    return f"{name}, {threads} threads, torch {torch.__version__}"


def finish(
    printed: Console, folder: Path, pictures: list[str], value: str, history: object = None,
    then: str = "",
) -> None:  # fmt: skip
    """Says where the pictures are, in one sentence what the run was good for, and what to run
    `then`.

    What was printed is kept in report.txt, and `history`, numbers in lists and dicts, as JSON.
    """
    if history is not None:
        (folder / "history.json").write_text(json.dumps(history))
    printed.print("Pictures: " + ", ".join(str(folder / name) for name in pictures))
    printed.print(f"[bold]{value}[/]")
    if then:
        printed.print(then)
    printed.save_text(str(folder / "report.txt"), clear=False)
