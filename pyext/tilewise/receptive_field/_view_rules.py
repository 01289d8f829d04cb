"""Rules of views, and of what joins and cuts tensors: positions stay, or move as a whole."""

import math
from typing import Any

from torch import fx

from tilewise.receptive_field._rules import op, rule, sources_of
from tilewise.receptive_field._steps import Steps, axes_of, plain_dims, regroup
from tilewise.receptive_field._windows import IDENTITY, Everything, Window


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze",
       "_reshape_alias", "view_as", "reshape_as", "ravel")  # fmt: skip
def reshape(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    x = arguments["self"]
    dims, lost = regroup(x.meta["dims"], node.meta["shape"])
    everything = dict.fromkeys(lost, "regroups positions")
    steps.set(node, "reshape", dims, [(x, steps.read(x, dims, everything))])


@rule("permute", "transpose", "t")
def permute(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    x = arguments["self"]
    theirs = x.meta["dims"]
    order = list(range(len(theirs)))
    if "dims" in arguments:
        order = [dim % len(order) for dim in arguments["dims"]]
    elif "dim0" in arguments:
        a, b = arguments["dim0"], arguments["dim1"]
        order[a], order[b] = order[b], order[a]
    else:
        order.reverse()
    dims = [theirs[place] for place in order]
    steps.set(node, "permute", dims, [(x, steps.read(x, dims, {}))])


@rule("expand", "expand_as", "repeat", "broadcast_to")
def expand(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    x, shape = arguments["self"], node.meta["shape"]
    theirs = x.meta["dims"]
    dims = plain_dims(shape)
    everything = dict.fromkeys(axes_of(theirs), "repeats positions")
    for place, dim in enumerate(theirs, len(shape) - len(theirs)):
        if math.prod(n for _, n in dim) == shape[place]:
            dims[place] = dim
            everything = {a: why for a, why in everything.items() if a not in axes_of([dim])}
    steps.set(node, "expand", dims, [(x, steps.read(x, dims, everything))])


@rule("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind")
def part(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    """Of channels: the same grid. Of an axis: a grid that starts elsewhere, or is thinned out."""
    x, shape = arguments["self"], node.meta["shape"]
    theirs = x.meta["dims"]
    place = arguments["dim"] % len(theirs)
    kept = len(theirs) == len(shape)
    axes = axes_of([theirs[place]])
    if not axes or kept and shape[place] == x.meta["shape"][place]:
        dims = [*theirs[:place], *([[(None, shape[place])]] if kept and not axes else []),
                *(theirs[place : place + 1] if axes else []), *theirs[place + 1 :]]  # fmt: skip
        return steps.set(node, "slice", dims, [(x, steps.read(x, dims, {}))])
    if len(theirs[place]) > 1 or not kept:
        dims = [*theirs[:place], *([[(None, shape[place])]] if kept else []), *theirs[place + 1 :]]
        everything = dict.fromkeys(axes, "takes some positions")
        return steps.set(node, "slice", dims, [(x, steps.read(x, dims, everything))])
    start, stride = _start(arguments, x.meta["shape"][place])
    axis = axes.pop()
    reads: list[Window | Everything] = [IDENTITY] * len(steps.axes)
    reads[axis] = Window(stride, start, start)
    dims = [*theirs[:place], [(axis, shape[place])], *theirs[place + 1 :]]
    steps.set(node, "slice", dims, [(x, tuple(reads))])


def _start(arguments: dict[str, Any], size: int) -> tuple[int, int]:
    """Where a part of a dimension begins, and its step."""
    if "part" in arguments:  # of a split
        if isinstance(sizes := arguments.get("split_sizes", arguments.get("split_size")), int):
            return sizes * arguments["part"], 1
        if sizes is not None:
            return sum(sizes[: arguments["part"]]), 1
        return -(-size // arguments["chunks"]) * arguments["part"], 1
    start = arguments.get("start") or 0
    return min(start + size if start < 0 else start, size), arguments.get("step", 1)


@rule("cat", "concat", "concatenate", "stack")
def cat(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    """Of channels: the union of what the branches see."""
    sources = sources_of(arguments)
    shape = node.meta["shape"]
    place = arguments["dim"] % len(shape)
    stacks = op(node) == "stack"
    dims = plain_dims(shape)
    everything: dict[int, str] = {}
    for source in sources:
        theirs = list(source.meta["dims"])
        if stacks:
            theirs.insert(place, [(None, 1)])
        everything |= dict.fromkeys(axes_of([theirs[place]]), "joins positions")
        for i, dim in enumerate(theirs):
            if i != place and axes_of([dim]):
                dims[i] = dim
    steps.set(node, "cat", dims, [(s, steps.read(s, dims, everything)) for s in sources])
