"""The layers that change what is seen, and the axes along which a tensor's dimensions run.

A tensor's dimension is a list of factors, slowest first: (axis, size), where axis is a dimension of
the input's grid, or None for channels, heads and the like. `(C, H, W).flatten(1)` is
[[(None, C)], [(0, H), (1, W)]]. An axis in no factor has one unit only: it was averaged, or lost.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import fx

from tilewise.receptive_field._windows import CONSTANT, IDENTITY, Everything, Window

Factor = tuple[int | None, int]
Dims = list[list[Factor]]
Reads = tuple[Window | Everything, ...]  # along each axis


class Step(NamedTuple):
    """A layer: the sizes of its grid, and which units of which earlier steps it reads."""

    module: str
    op: str
    sizes: tuple[int, ...]
    sources: tuple[tuple[int, Reads], ...]  # a step's place in the list, and what is read of it


class Steps:
    """Grows while the rules walk the graph; a node's meta has its "step" and its "dims"."""

    def __init__(self, x: fx.Node) -> None:
        shape = x.meta["shape"]
        sizes = tuple(shape[2:])
        self.all = [Step("", "input", sizes, ())]
        dims: Dims = [[(None, shape[0])], [(None, shape[1])]]
        x.meta.update(step=0, dims=dims + [[(axis, size)] for axis, size in enumerate(sizes)])
        self.axes = range(len(sizes))

    def set(self, node: fx.Node, op: str, dims: Dims, sources: Iterable[tuple[fx.Node, Reads]],
            own: bool = False) -> None:  # fmt: skip
        """Gives a node its step: a new one, unless it only repeats what its source sees."""
        links = tuple(dict.fromkeys((source.meta["step"], reads) for source, reads in sources))
        node.meta["dims"] = dims
        if len(links) == 1 and not own and all(read == IDENTITY for read in links[0][1]):
            node.meta["step"] = links[0][0]
            return
        found = dict(factor for dim in dims for factor in dim if factor[0] is not None)
        sizes = tuple(found.get(axis, 1) for axis in self.axes)
        node.meta["step"] = len(self.all)
        self.all.append(Step(node.meta["module"], op, sizes, links))

    def read(self, source: fx.Node, to: Dims, everything: dict[int, str]) -> Reads:
        """Unit for unit, but for the axes of which everything is read, for the reasons given."""
        theirs, ours = axes_of(source.meta["dims"]), axes_of(to)
        return tuple(
            Everything(everything[axis]) if axis in everything
            else CONSTANT if axis in ours and axis not in theirs
            else Everything("takes all positions") if axis in theirs and axis not in ours
            else IDENTITY
            for axis in self.axes
        )  # fmt: skip


def axes_of(dims: Iterable[Iterable[Factor]]) -> set[int]:
    """The axes that stand in some dimension, with more than one unit."""
    return {axis for dim in dims for axis, size in dim if axis is not None and size > 1}


def plain_dims(shape: Sequence[int]) -> Dims:
    """Dimensions of a shape that run along no axis."""
    return [[(None, size)] for size in shape]


def regroup(dims: Dims, shape: Sequence[int]) -> tuple[Dims, set[int]]:
    """The factors in the order that they have, under the dimensions of another shape.

    Channels may be cut into heads; an axis that would be cut is lost: it is in the second result.
    """
    left = [factor for dim in dims for factor in dim if factor[1] != 1]
    lost: set[int] = set()
    result: Dims = []
    for size in shape:
        group: list[Factor] = []
        while size > 1:
            axis, have = left.pop(0)
            if size % have == 0:
                group.append((axis, have))
                size //= have
                continue
            if axis is not None:
                lost.add(axis)
            common = math.gcd(size, have)
            if common == 1:  # the two do not fit: the next factor is lost as well
                follower, more = left.pop(0)
                if follower is not None:
                    lost.add(follower)
                left.insert(0, (None, have * more))
            else:
                left[:0] = [(None, common), (None, have // common)]
        result.append(group or [(None, 1)])
    return [[(None if axis in lost else axis, n) for axis, n in dim] for dim in result], lost
