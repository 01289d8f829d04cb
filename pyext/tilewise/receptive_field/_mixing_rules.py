"""Rules of layers that read everything along some dimensions: means, products, attention."""

from collections.abc import Sequence
from typing import Any

from torch import fx

from tilewise.receptive_field._rules import (
    is_followed,
    numbers,
    op,
    pointwise,
    rule,
    sources_of,
    unknown,
)
from tilewise.receptive_field._steps import Steps, axes_of, plain_dims


def _mixing(node: fx.Node, x: fx.Node, places: Sequence[int], keep: bool, steps: Steps) -> None:
    """Along the dimensions at `places` everything is read; they stay, shrink to 1, or go."""
    theirs, shape = x.meta["dims"], node.meta["shape"]
    places = [place % len(theirs) for place in places]
    everything = dict.fromkeys(
        axes_of([theirs[place] for place in places]), f"{op(node)} over positions"
    )
    if keep:
        dims = theirs
    elif len(theirs) == len(shape):
        dims = [[(None, 1)] if i in places else dim for i, dim in enumerate(theirs)]
    else:
        dims = [dim for i, dim in enumerate(theirs) if i not in places]
    steps.set(node, op(node), dims, [(x, steps.read(x, dims, everything))])


@rule("mean", "sum", "amax", "amin", "max", "min", "var", "std", "norm", "linalg_vector_norm",
       "logsumexp", "prod", "argmax", "argmin", "any", "all", "var_mean", "topk")  # fmt: skip
def reduction(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    if op(node) in ("max", "min") and is_followed(arguments.get("other")):
        return pointwise(node, arguments, steps)
    x, dim = arguments["self"], arguments.get("dim")
    places = range(len(x.meta["dims"])) if dim is None or dim == [] else numbers(dim, 1)
    _mixing(node, x, list(places), False, steps)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "flip", "roll",
       "sort", "logcumsumexp")  # fmt: skip
def along(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    x, dim = arguments["self"], arguments.get("dim", arguments.get("dims"))
    places = range(len(x.meta["dims"])) if dim is None or dim == [] else numbers(dim, 1)
    _mixing(node, x, list(places), True, steps)


@rule("linear")
def linear(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    """Mixes the last dimension: channels, or, in an MLP-Mixer or after flatten, positions."""
    x = arguments["input"]
    if len(sources_of(arguments)) > 1 or not is_followed(x):
        return unknown(node, arguments, steps)
    theirs, shape = x.meta["dims"], node.meta["shape"]
    dims = [*theirs[:-1], [(None, shape[-1])]]
    everything = dict.fromkeys(axes_of([theirs[-1]]), "linear over positions")
    steps.set(node, "linear", dims, [(x, steps.read(x, dims, everything))], own=True)


@rule("matmul", "mm", "bmm", "addmm", "baddbmm")
def matmul(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    """Of two that depend on the input: attention, all positions with all."""
    names = [("self", "other"), ("self", "mat2"), ("mat1", "mat2"), ("batch1", "batch2")]
    pair = next([arguments[a], arguments[b]] for a, b in names if a in arguments and b in arguments)
    if any(not isinstance(m, fx.Node) or len(m.meta["shape"]) < 2 for m in pair) or (
        len(sources_of(arguments)) != sum(map(is_followed, pair))
    ):
        return unknown(node, arguments, steps)
    shape = node.meta["shape"]
    dims = plain_dims(shape)
    everything: dict[int, str] = {}
    for at, m in enumerate(pair):
        if not is_followed(m):
            continue
        theirs = m.meta["dims"]
        mixed = theirs[-2:] if all(map(is_followed, pair)) else [theirs[-1 - at]]
        everything |= dict.fromkeys(axes_of(mixed), f"{op(node)} over positions")
        dims[-2 + at] = theirs[-2 + at]
        for place, dim in enumerate(theirs[:-2], len(shape) - len(theirs)):
            dims[place] = dim if axes_of([dim]) else dims[place]
    sources = [(m, steps.read(m, dims, everything)) for m in pair if is_followed(m)]
    steps.set(node, op(node), dims, sources, own=True)


@rule("scaled_dot_product_attention")
def attention(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    """Reads all positions of the sequence; those in the batch, of axial attention, stay apart."""
    sources = sources_of(arguments)
    query = arguments["query"]
    if not is_followed(query):
        return unknown(node, arguments, steps)
    dims = [*query.meta["dims"][:-1], [(None, node.meta["shape"][-1])]]
    mixed = [dim for source in sources for dim in source.meta["dims"][-2:]]
    everything = dict.fromkeys(axes_of(mixed), "attention over positions")
    steps.set(
        node, "attention", dims, [(s, steps.read(s, dims, everything)) for s in sources], own=True
    )
