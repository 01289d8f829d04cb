"""Draws the pictures of docs/receptive_field.md: `python -m docs.figures.receptive_field`.

The networks are timm's, with random weights; the photograph comes with matplotlib.
"""

import importlib
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib import cbook  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from torch import Tensor  # noqa: E402

import tilewise as tw  # noqa: E402
from docs.figures.draw import OURS, STYLE, shrink  # noqa: E402
from tilewise.receptive_field.__main__ import load  # noqa: E402

HERE = Path(__file__).parent / "examples"
NETWORKS = "vgg11", "resnet18", "mobilenetv2_100", "densenet121", "convnext_atto", "inception_v3"


def main(folder: Path = HERE) -> list[Path]:
    """A unit's field over the photograph, and how fields grow with depth."""
    torch.manual_seed(0)
    load("timm:resnet18")  # makes timm importable, also beside a torchvision for another torch
    # Without zeros in the last layer of each block, with which the blocks would not count yet.
    model = importlib.import_module("timm").create_model("resnet18", zero_init_last=False)
    result = tw.receptive_field(model, 224)
    unit = folder / "receptive_field_unit.png"
    result.plot(photograph(224), "layer2", unit=(9, 14), path=unit)
    growth = folder / "receptive_field_growth.png"
    with plt.rc_context(STYLE):
        figure = draw_growth()
        figure.savefig(growth, dpi=140)
        plt.close(figure)
    for path in (unit, growth):
        shrink(path)
    return [unit, growth]


def photograph(size: int) -> Tensor:
    """Rear Admiral Grace Hopper: (1, 3, size, size), from 0 to 1."""
    with cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        pixels = np.asarray(ImageOps.fit(image.convert("RGB"), (size, size)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def draw_growth() -> plt.Figure:
    """The largest field so far by the number of the layer, a line for each network."""
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(NETWORKS)))
    for name, colour in zip(NETWORKS, colours, strict=True):
        layers = tw.receptive_field(load(f"timm:{name}"), 224).layers
        sizes = [layer.size[0] for layer in layers if np.isfinite(layer.size[0])]
        axes.plot(np.linspace(0, 1, len(sizes)), np.maximum.accumulate(sizes), color=colour,
                  label=name)  # fmt: skip
    axes.axhline(224, color=OURS, linestyle="--", linewidth=1)
    axes.annotate("the picture", (0, 224), (2, 3), textcoords="offset points", color=OURS)
    axes.set(yscale="log", xlabel="layers, from the picture to the last one before the mean",
             ylabel="field, pixels", title="How far a unit sees")  # fmt: skip
    axes.legend(fontsize=8, ncols=2)
    return figure


if __name__ == "__main__":
    print(*main(), sep="\n")
