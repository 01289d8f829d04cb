"""For each ATen call, what its output reads of its input: the windows of every layer.

A rule takes the node, its arguments by name, and the steps. What has no rule is taken to read
everything, and says so: a field is never reported too small.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tilewise.receptive_field._steps import Dims, Reads, Steps, axes_of, plain_dims
from tilewise.receptive_field._windows import Everything

Rule = Callable[[fx.Node, dict[str, Any], Steps], None]
_RULES: dict[str, Rule] = {}
SHAPE_OF_OTHER = "expand_as", "view_as", "reshape_as", "type_as"
SYMMETRIC = "matmul", "mm", "bmm", "addmm", "baddbmm"  # any argument may be the one to follow


def known(call: Any) -> bool:
    """Whether there is a rule; others are taken apart where they can be."""
    return _name(call) in _RULES or torch.Tag.pointwise in getattr(call, "tags", ())


def follow(node: fx.Node, steps: Steps) -> None:
    """Gives a node of the graph its step and its dimensions."""
    arguments = _arguments(node)
    if op(node) in SHAPE_OF_OTHER:
        del arguments["other"]
    if not sources_of(arguments):
        return  # zeros of the input's shape, say
    rule = _RULES.get(op(node))
    if rule is None:
        tags = getattr(_call(node).target, "tags", ())
        rule = pointwise if torch.Tag.pointwise in tags else unknown
    main = arguments.get("self", arguments.get("input"))
    if isinstance(main, fx.Node) and not is_followed(main) and op(node) not in SYMMETRIC:
        rule = pointwise if rule is pointwise else unknown
    rule(node, arguments, steps)


def op(node: fx.Node) -> str:
    """The name of a node's call: "relu" of aten.relu_.default."""
    return _name(_call(node).target)


def _call(node: fx.Node) -> fx.Node:
    """The call that returned a node, if that is a part of a tuple."""
    if node.target is operator.getitem:
        assert isinstance(node.args[0], fx.Node)
        return node.args[0]
    return node


def _name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    name = target.__name__ if schema is None else schema.name
    return name.removeprefix("aten::").rstrip("_")


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by their names, those left out at their defaults; "part" of a tuple's."""
    call = _call(node)
    schema = getattr(call.target, "_schema", None)
    if schema is None:
        return {str(i): value for i, value in enumerate(call.args)}
    values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    values |= {a.name: value for a, value in zip(schema.arguments, call.args, strict=False)}
    return values | call.kwargs | ({} if call is node else {"part": node.args[1]})


def is_followed(value: Any) -> bool:
    return isinstance(value, fx.Node) and "step" in value.meta


def sources_of(arguments: dict[str, Any]) -> list[fx.Node]:
    """The arguments that depend on the input, those in lists too."""
    values: list[Any] = []
    for value in arguments.values():
        values += value if isinstance(value, (list, tuple)) else [value]
    return [value for value in values if is_followed(value)]


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for the calls of these names."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def numbers(value: Any, count: int, empty: Any = 1) -> list[int]:
    """An argument for each of `count` dimensions: it may have one for all, or none."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * count if len(values) == 1 else values or [empty] * count


# Everything, and nothing new


def unknown(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    """Reads all of all sources."""
    every: Reads = tuple(Everything(f"{op(node)} is taken to read everything") for _ in steps.axes)
    dims = plain_dims(node.meta["shape"])
    steps.set(node, op(node), dims, [(source, every) for source in sources_of(arguments)], own=True)


def pointwise(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    """Each element of the output, of the elements at its place; sources are broadcast."""
    sources = sources_of(arguments)
    shape = node.meta["shape"]
    dims: Dims = plain_dims(shape)
    mixed: dict[int, str] = {}
    for source in sources:
        theirs = source.meta["dims"]
        for place, dim in enumerate(theirs, len(shape) - len(theirs)):
            if not axes_of([dim]):
                continue
            if axes_of([dims[place]]) and dims[place] != dim:
                mixed |= dict.fromkeys(axes_of([dim, dims[place]]), "adds different dimensions")
            dims[place] = dim
    seen: set[int] = set()
    for dim in dims:  # an axis in two places, as in a table of pairs
        mixed |= dict.fromkeys(seen & axes_of([dim]), "makes pairs of positions")
        seen |= axes_of([dim])
    steps.set(node, op(node), dims, [(s, steps.read(s, dims, mixed)) for s in sources])


rule(  # those of the last line have no tag in torch 2.9
    "dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous",
    "detach", "alias", "to", "_to_copy", "lift_fresh", "prelu", "rrelu", "type_as", "copy",
    "leaky_relu", "celu", "elu", "hardsigmoid", "hardtanh", "selu",
)(pointwise)  # fmt: skip


@rule("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm")
def norm(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    """Element by element. A mean over positions is no picture of them: it gets a row, no field."""
    x = arguments["input"]
    if not is_followed(x):
        return unknown(node, arguments, steps)
    dims = x.meta["dims"]
    over = dims[-len(arguments.get("normalized_shape", dims)) :]
    if op(node) in ("batch_norm", "instance_norm"):  # per channel, or of means that are stored
        takes_means = arguments.get("training", arguments.get("use_input_stats"))
        over = [dims[0], *dims[2:]] if takes_means else []
    own = bool(axes_of(over))
    name = f"{op(node)}, alone" if own else op(node)
    steps.set(node, name, dims, [(x, steps.read(x, dims, {}))], own=own)


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros",
      "new_ones", "new_full", "new_empty")  # fmt: skip
def constant(node: fx.Node, arguments: dict[str, Any], steps: Steps) -> None:
    """Has the input's shape and none of its values."""
