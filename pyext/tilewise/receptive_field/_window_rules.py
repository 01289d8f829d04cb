"""Rules of layers with a window: convolutions, pooling, upsampling, padding."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from torch import fx

from tilewise.receptive_field._rules import is_followed, numbers, op, rule, unknown
from tilewise.receptive_field._steps import Steps, axes_of, plain_dims
from tilewise.receptive_field._windows import IDENTITY, Everything, Window

EDGES = {"constant": "nothing", "replication": "repeat", "reflection": "mirror", "": "wrap"}


def _local(node: fx.Node, x: fx.Node, windows: Sequence[Window | Everything],
           steps: Steps, name: str = "") -> None:  # fmt: skip
    """One window for each of the last dimensions; channels before them are mixed."""
    theirs, shape = x.meta["dims"], node.meta["shape"]
    spatial = len(shape) - len(windows)
    reads: list[Window | Everything] = [IDENTITY] * len(steps.axes)
    dims = plain_dims(shape)
    dims[: max(spatial - 1, 0)] = theirs[: max(spatial - 1, 0)]
    for axis in axes_of(theirs[max(spatial - 1, 0) : spatial]):
        reads[axis] = Everything("mixes positions as channels")
    for place, window in enumerate(windows, spatial):
        axes = axes_of([theirs[place]])
        if len(axes) == 1 and len(theirs[place]) == 1:
            axis = axes.pop()
            reads[axis], dims[place] = window, [(axis, shape[place])]
        for axis in axes:
            reads[axis] = Everything("has windows over joined dimensions")
    steps.set(node, name or op(node), dims, [(x, tuple(reads))], own=True)


@rule("convolution")
def convolution(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    """Along each dimension ksize taps, `dilation` apart; transposed, the same read backwards."""
    if not is_followed(arguments["input"]) or is_followed(arguments["weight"]):
        return unknown(node, arguments, steps)
    ksizes = arguments["weight"].meta["shape"][2:]
    count = len(ksizes)
    names = "stride", "padding", "dilation"
    settings = zip(ksizes, *(numbers(arguments[name], count) for name in names), strict=True)
    windows = []
    for ksize, stride, padding, dilation in settings:
        reach = dilation * (ksize - 1)
        if arguments["transposed"]:  # output i = stride j - padding + tap, solved for the input j
            windows.append(Window(1, padding - reach + stride - 1, padding, stride))
        else:
            windows.append(Window(stride, -padding, reach - padding))
    transposed = "_transpose" * arguments["transposed"]
    _local(node, arguments["input"], windows, steps, f"conv{transposed}{count}d")


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
       "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d_with_indices")  # fmt: skip
def pool(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    name = op(node)
    count = int(name[name.index("pool") + 4])
    ksizes = numbers(arguments["kernel_size"], count)
    strides = numbers(arguments["stride"] or ksizes, count)
    paddings = numbers(arguments["padding"], count)
    dilations = numbers(arguments.get("dilation", 1), count)
    windows = [
        Window(stride, -padding, dilation * (ksize - 1) - padding)
        for ksize, stride, padding, dilation in
        zip(ksizes, strides, paddings, dilations, strict=True)
    ]
    _local(node, arguments["self"], windows, steps)


@rule(*(f"{kind}_{what}_pool{n}d" for n in (1, 2, 3) for what in ("avg", "max")
         for kind in ("adaptive", "_adaptive")))  # fmt: skip
def adaptive_pool(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    """Cell i of n takes units floor(i size / n) to ceil((i + 1) size / n) - 1."""
    def window(old: int, new: int) -> Window | Everything:
        return Everything("global pooling") if new == 1 else Window(old, 0, old - 1, new)

    _resample(node, arguments, steps, window)


@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
def nearest(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    _resample(node, arguments, steps, lambda old, new: Window(old, 0, 0, new))


@rule("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")
def nearest_exact(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    _resample(node, arguments, steps, lambda old, new: Window(2 * old, old, old, 2 * new))


@rule("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d")
def linear_upsample(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    """Reads both neighbours of the place (i + 1/2) old / new - 1/2; bicubic, two more."""
    more = int("bicubic" in op(node))
    edge = "repeat" if more else "nothing"

    def window(old: int, new: int) -> Window:
        if arguments["align_corners"]:  # the place i (old - 1) / (new - 1)
            stride, shift, divide = old - 1, 0, max(new - 1, 1)
        else:
            stride, shift, divide = 2 * old, old - new, 2 * new
        reach = more * divide
        return Window(stride, shift - reach, shift + divide - 1 + reach, divide, edge)

    _resample(node, arguments, steps, window)


def _resample(node: fx.Node, arguments: dict[str, Any], steps: Steps,
              window: Callable[[int, int], Window | Everything]) -> None:  # fmt: skip
    """A layer whose windows follow from the sizes of its input and output, or from a scale."""
    x = arguments.get("input", arguments.get("self"))
    assert isinstance(x, fx.Node)
    count = int(op(node)[-2])
    sizes = zip(x.meta["shape"][-count:], node.meta["shape"][-count:], strict=True)
    windows = [
        window(old, new) if scale is None else _scaled(window, scale)
        for (old, new), scale in zip(sizes, _scales(arguments, count), strict=True)
    ]
    _local(node, x, windows, steps)


def _scales(arguments: dict[str, Any], count: int) -> Sequence[float | None]:
    """What torch divides a unit's place by: a scale that was given, whatever the sizes became."""
    if arguments.get("align_corners"):
        return [None] * count  # the corners decide
    each = [value for name, value in arguments.items() if name.startswith("scales")]
    return arguments.get("scale_factors") or each or [None] * count


def _scaled(window: Callable[[int, int], Window | Everything], scale: float
            ) -> Window | Everything:  # fmt: skip
    """As from `denominator` units to `numerator`."""
    ratio = Fraction(scale).limit_denominator(1000)  # else fields would repeat after 2^52 units
    found = window(ratio.denominator, ratio.numerator)
    if float(ratio) == scale or isinstance(found, Everything):
        return found
    return found._replace(first=found.first - 2, last=found.last + 2)  # so far off, at 1000 units


@rule("constant_pad_nd", "_pad_circular",
       "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
       "replication_pad1d", "replication_pad2d", "replication_pad3d")  # fmt: skip
def pad(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    pads = arguments.get("pad") or arguments["padding"]
    edge = EDGES[op(node).split("_pad")[0]]
    before = list(pads[::2])[::-1]  # of the last dimensions, in their order
    windows = [Window(1, -n, -n, 1, edge) for n in before]
    _local_keeping_channels(node, arguments["self"], windows, steps)


def _local_keeping_channels(node: fx.Node, x: fx.Node, windows: Sequence[Window],
                            steps: Steps) -> None:  # fmt: skip
    """Like _local, of a layer that mixes no channels, and may have windows along them."""
    theirs, shape = x.meta["dims"], node.meta["shape"]
    reads: list[Window | Everything] = [IDENTITY] * len(steps.axes)
    dims = [list(dim) for dim in theirs]
    for place, window in enumerate(windows, len(shape) - len(windows)):
        if shape[place] == math.prod(n for _, n in theirs[place]) and window == IDENTITY:
            continue
        dims[place] = [(None, shape[place])]
        if len(theirs[place]) == 1 and (axes := axes_of([theirs[place]])):
            axis = axes.pop()
            reads[axis], dims[place] = window, [(axis, shape[place])]
        for axis in axes_of([theirs[place]]) - axes_of([dims[place]]):
            reads[axis] = Everything("cuts joined dimensions")
    steps.set(node, op(node), dims, [(x, tuple(reads))])


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    if op(node) == "pixel_shuffle":
        window = Window(1, 0, 0, arguments["upscale_factor"])
    else:
        factor = arguments["downscale_factor"]
        window = Window(factor, 0, factor - 1)
    _local(node, arguments["self"], [window, window], steps)
