"""A unit's field over the picture, and its effective field beside it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from tilewise.receptive_field._result import ReceptiveField

FRAME = "#d1495b"


def draw(result: "ReceptiveField", x: Tensor, name: str, unit: tuple[int, ...],
         path: str | Path | None) -> Any:  # fmt: skip
    """Two panels: the frame of all that the unit sees, and what counts inside it."""
    from matplotlib.figure import Figure

    if len(unit) != 2:
        raise ValueError(f"plot: expected a model of pictures, got {len(unit)} dimensions")
    field, layer = result.field(name, unit), result[name]
    effective = result.effective(x, name, unit).cpu()
    picture = x[0].detach().float().cpu()
    picture = (picture - picture.amin()) / (picture.amax() - picture.amin()).clamp_min(1e-12)
    picture = picture[:3] if len(picture) >= 3 else picture[:1].expand(3, -1, -1)

    height, width = picture.shape[1:]
    figure = Figure(figsize=(8, 4 * height / width + 0.25), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    left.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
    left.set_title(f"{name or 'output'}, unit {tuple(unit)}: sees {_text(field.size)} pixels",
                   fontsize=9)  # fmt: skip
    right.imshow(picture.mean(0).numpy(), cmap="gray", vmin=-1, vmax=2, interpolation="nearest")
    shown = effective.numpy() ** 0.5  # a square root, or only the middle would be seen
    right.imshow(shown, cmap="magma", alpha=(0.15 + shown * 2).clip(0, 1), vmin=0, vmax=1)
    size = "x".join("all" if s == float("inf") else str(s) for s in layer.size)
    right.set_title(f"how much they count (field {size})", fontsize=9)
    for axes in (left, right):
        axes.add_patch(_frame(field))
        axes.set_axis_off()
    if path is not None:
        figure.savefig(path)
    return figure


def _frame(field: Any) -> Any:
    from matplotlib.patches import Rectangle

    corner = field.first[1] - 0.5, field.first[0] - 0.5
    height, width = field.size
    return Rectangle(corner, width, height, fill=False, edgecolor=FRAME, linewidth=2,
                     clip_on=False)  # fmt: skip


def _text(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))
