"""Draws the drawing of docs/architecture.md: `python -m docs.figures.house`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

PATH = Path(__file__).with_name("house.svg")
INK, GREY, LINE = "#2e4057", "#6b7280", "#9aa3af"
PYTHON, CPU, TRITON, REFERENCE, PROOF = "#e8edf3", "#f9e3e6", "#dff0f2", "#f6efd9", "#f4f4f4"


def main(path: Path = PATH) -> Path:
    """Writes the picture; returns its path."""
    with plt.rc_context({"svg.hashsalt": "tilewise", "svg.fonttype": "none"}):
        figure = draw()
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        plt.close(figure)
    return path


def draw() -> plt.Figure:
    """All boxes and arrows."""
    figure = plt.figure(figsize=(10, 7.5))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100), ylim=(0, 75))
    axes.axis("off")

    box(axes, 2, 64, 60, 9, PYTHON, "tw.nn", "nn/losses · nn/quantizers · nn/sampling · converters",
        "modules with their peers' constructors; state, schedules, processes")  # fmt: skip
    box(axes, 66, 64, 32, 9, PYTHON, "tw.evaluation", "recall and accuracy", "by nearest_code")
    box(axes, 2, 50, 96, 9, PYTHON, "tw.<op>", "ops/<op>.py",
        "docstring, checks and casts (_arguments), choice of a backend (_backend)")  # fmt: skip
    box(axes, 30, 36, 68, 9, PYTHON, "torch's dispatcher", "ops/_register.py",
        "schema, fake kernel, autograd: torch.ops.tilewise and tilewise_triton")  # fmt: skip

    box(axes, 2, 17, 24, 14, REFERENCE, "reference", "reference/<op>.py",
        "the equation in plain PyTorch,", "float64, the whole matrix;", "any device")  # fmt: skip
    box(axes, 30, 17, 36, 14, CPU, "cpu", "csrc/cpu/<op>.cpp  (the loop over tiles)",
        "csrc/cpu/simd/<op>.cpp  (one block;", "compiled for each instruction set)",
        "registered by csrc/module.cpp")  # fmt: skip
    box(axes, 70, 17, 28, 14, TRITON, "triton", "kernels/<op>.py",
        "chunks and launches in Python,", "a tile in @triton.jit;", "imported on first use")

    box(axes, 2, 8.5, 24, 6, REFERENCE, "", "_philox · _precision · _matches")
    box(axes, 30, 8.5, 36, 6, CPU, "", "contrast · positives · matmul · rows_along",
        "simd: lanes · lane_math · lane_sum · noise")  # fmt: skip
    box(axes, 70, 8.5, 28, 6, TRITON, "", "_contrast · _rows · _philox · _common")

    box(axes, 2, 1, 96, 5.2, PROOF, "", "tests/common: inputs that break things, the error budget"
        "  ·  tests/triton_tools: interpreter, race checker, static gate",
        "tests/tools: names and signatures agree  ·  benchmarks/harness: time and memory of a call",
        )  # fmt: skip

    arrow(axes, (32, 64), (32, 59.3))
    arrow(axes, (82, 64), (82, 59.3))
    arrow(axes, (14, 50), (14, 31.3), "a plain call")
    arrow(axes, (64, 50), (64, 45.3), "kernels")
    arrow(axes, (48, 36), (48, 31.3), "CPU tensors")
    arrow(axes, (84, 36), (84, 31.3), "CUDA tensors")
    for x in (14, 48, 84):
        axes.plot((x, x), (17, 14.8), color=LINE, linewidth=1.2)
    return figure


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, title: str,
        file: str, *text: str) -> None:  # fmt: skip
    """A rounded box with a title, a file and lines of text, centred."""
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.8", facecolor=colour,
                       edgecolor=LINE, linewidth=1)  # fmt: skip
    )
    lines = [(title, 11, "bold", INK)] * bool(title)
    lines += [(file, 8.5, "normal", INK), *((line, 8, "normal", GREY) for line in text)]
    step = 2.5
    top = y + height / 2 + step * (len(lines) - 1) / 2
    for i, (line, size, weight, ink) in enumerate(lines):
        axes.text(x + width / 2, top - i * step, line, ha="center", va="center", fontsize=size,
                  weight=weight, color=ink)  # fmt: skip


def arrow(axes: Axes, start: tuple, end: tuple, text: str = "") -> None:
    """An arrow downwards, with a word beside it."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 1.4})
    middle = (start[1] + end[1]) / 2
    axes.text(start[0] + 1.2, middle + 0.2, text, va="center", fontsize=8, color=GREY)


if __name__ == "__main__":
    print(f"wrote {main()}")
