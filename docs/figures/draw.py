"""Draws the pictures of the pages on random ops: `python -m docs.figures.draw`.

Every point is a sample of the op itself; only the laws beside them are formulas.
"""

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.reference import _philox  # noqa: E402

HERE = Path(__file__).parent
OURS, LAW, GREY = "#d1495b", "#2e4057", "#8a8f98"
CORNERS = "#00798c", "#d1495b", "#b8860b"
STYLE = {
    "font.size": 9.5, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": GREY, "xtick.color": LAW, "ytick.color": LAW, "axes.grid": True,
    "grid.alpha": 0.25, "grid.linewidth": 0.6, "legend.frameon": False,
}  # fmt: skip
TAUS = 5.0, 1.0, 0.3, 0.05
LEAST = 1e-6  # probability to which tails are drawn


def main(folder: Path = HERE, rows: int = 4096) -> list[Path]:
    """Draws all pictures, of `rows` x 4096 variates where it is the noise; returns their paths."""
    pictures = {
        "gumbel_max": frequencies(200_000),
        "simplex": simplex(1500),
        "gumbel_noise": law(gumbel(rows), "Gumbel", gumbel_density, gumbel_tail, (-4, 10)),
        "normal_noise": law(normal(rows), "Normal", normal_density, normal_tail, (-4.5, 4.5)),
    }
    paths = []
    for name, figure in pictures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=140)
        plt.close(figure)
        shrink(paths[-1])
    return paths


def shrink(path: Path) -> None:
    """Rewrites a picture with 128 colours, which are enough and a quarter of the size."""
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def frequencies(draws: int) -> plt.Figure:
    """How often gumbel_argmax chooses each category, beside the softmax."""
    logits = torch.tensor([2.0, 1.6, 1.0, 0.7, 0.2, -0.2, -0.6, -1.0, -1.6, -2.4, -3.2, -4.5])
    index = tw.gumbel_argmax(logits.expand(draws, -1), seed=0)
    p = torch.softmax(logits.double(), 0).numpy()
    found = torch.bincount(index, minlength=len(p)).numpy() / draws
    deviation = np.sqrt(p * (1 - p) / draws)

    figure, (above, below) = plt.subplots(
        2, figsize=(7, 4.6), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    place = np.arange(len(p))
    above.bar(place, p, 0.72, color="#cfd6df", edgecolor=LAW, linewidth=0.8,
              label="softmax(logits)")  # fmt: skip
    above.plot(place, found, "D", color=OURS, markersize=5,
               label=f"frequency in {draws:,} draws")  # fmt: skip
    above.set(ylabel="probability", title="gumbel_argmax draws from the softmax")
    above.legend()
    for x, value in zip(place, p.tolist(), strict=True):
        above.annotate(f"{value:.1%}", (x, value), (0, 7), textcoords="offset points", ha="center",
                       fontsize=8, color=LAW)  # fmt: skip
    above.margins(y=0.12)
    below.axhspan(-2, 2, color="#cfd6df", alpha=0.6, linewidth=0)
    below.axhline(0, color=LAW, linewidth=0.8)
    below.plot(place, (found - p) / deviation, "D", color=OURS, markersize=4)
    below.set(ylim=(-4, 4), yticks=(-2, 0, 2), ylabel="standard\ndeviations")
    below.set(xlabel="category, by its logit")
    below.set_xticks(place, [f"{value:g}".replace("-", "\u2212") for value in logits.tolist()])
    return figure


def simplex(samples: int) -> plt.Figure:
    """Samples of three categories for falling temperatures, the noise the same in all panels.

    Corners say p; below stands how many of the samples each of them got.
    """
    p = torch.tensor([0.5, 0.3, 0.2])
    logits = p.log().expand(samples, 3)
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
    index = tw.gumbel_argmax(logits, seed=0).numpy()
    colours = np.array(CORNERS)[index]

    figure, panels = plt.subplots(1, len(TAUS), figsize=(10.5, 2.9), layout="constrained")
    for axes, tau in zip(panels, TAUS, strict=True):
        x, y = (tw.gumbel_softmax(logits, tau, seed=0).numpy() @ corners).T
        axes.fill(*corners.T, facecolor="#f4f6f8", edgecolor=GREY, linewidth=0.9, zorder=0)
        for i, (at, down) in enumerate(zip(corners, (13, 13, -5), strict=True)):
            axes.annotate(
                f"p = {p[i]:g}", at, (0, -down), textcoords="offset points",
                ha="center", color=CORNERS[i], fontweight="bold",
            )  # fmt: skip
        axes.scatter(x, y, s=6, c=colours, alpha=0.45, linewidths=0, clip_on=False)
        axes.set(aspect="equal", xlim=(-0.06, 1.06), ylim=(-0.22, 0.96))
        axes.text(0.5, -0.2, f"tau = {tau:g}", ha="center", fontweight="bold", color=LAW)
        axes.axis("off")
    left, right, above = (f"{(index == i).mean():.1%}" for i in (0, 1, 2))
    figure.supxlabel(f"of {samples:,} samples {left} belong to the left corner, {right} to the "
                     f"right one, {above} to the upper one", fontsize=9.5, color=LAW)  # fmt: skip
    return figure


def gumbel(rows: int) -> np.ndarray:
    """Noise of gumbel_softmax, ascending.

    With equal logits, log y is the noise less a constant of its row, which the reference's noise of
    the first column tells.
    """
    noise = tw.gumbel_softmax(torch.zeros(1, 1).expand(rows, 4096), seed=0).log_()
    first = _philox.gumbel(torch.tensor(0), rows, 1, 0)
    return ascending(noise.add_(first - noise[:, :1]))


def normal(rows: int) -> np.ndarray:
    """Noise of gaussian_sample, ascending."""
    zero = torch.zeros(1, 1).expand(rows, 4096)
    return ascending(tw.gaussian_sample(zero, zero, seed=0)[0])


def ascending(x: Tensor) -> np.ndarray:
    """All elements in order."""
    return np.sort(x.numpy(), axis=None)


def gumbel_density(x: np.ndarray) -> np.ndarray:
    """Of the standard Gumbel law."""
    return np.exp(-x - np.exp(-x))


def gumbel_tail(p: np.ndarray) -> np.ndarray:
    """What a Gumbel variate exceeds with probability p."""
    return -np.log(-np.log1p(-p))


def normal_density(x: np.ndarray) -> np.ndarray:
    """Of the standard normal law."""
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def normal_tail(p: np.ndarray) -> np.ndarray:
    """What a normal variate exceeds with probability p."""
    return -torch.special.ndtri(torch.from_numpy(p)).numpy()


def law(
    noise: np.ndarray, name: str, density: Callable, tail: Callable, span: tuple[float, float]
) -> plt.Figure:
    """The density of ordered draws beside the law's, and how often they exceed a value."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
    count, edges = np.histogram(noise, bins=90, range=span)
    centre = (edges[1:] + edges[:-1]) / 2
    left.bar(centre, count / len(noise) / np.diff(edges), np.diff(edges), color=OURS, alpha=0.45)
    x = np.linspace(*span, 400)
    left.plot(x, density(x), color=LAW, linewidth=1.6)
    left.set(title=f"{name} noise", xlabel="value", ylabel="density", xlim=span)
    left.set_ylim(bottom=0)

    p = np.logspace(math.log10(LEAST), -0.05, 200)
    right.plot(tail(p), p, color=LAW, linewidth=1.6, label="law")
    shown = np.logspace(math.log10(LEAST), math.log10(0.8), 26)
    right.plot(noise[-np.maximum(1, (shown * len(noise)).astype(int))], shown, "D", color=OURS,
               markersize=4, label=f"{len(noise):,} draws")  # fmt: skip
    right.set(yscale="log", title="Its tail", xlabel="value",
              ylabel="probability to exceed it")  # fmt: skip
    right.legend()
    return figure


if __name__ == "__main__":
    with plt.rc_context(STYLE):
        for path in main():
            print(f"wrote {path.relative_to(HERE.parents[1])}, {path.stat().st_size / 1e3:.0f} kB")
