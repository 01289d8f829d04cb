"""From a model to the table: records it, follows its graph, and computes both ways."""

import math
from collections.abc import Sequence
from fractions import Fraction

from torch import nn

from tilewise.receptive_field import _directions, _record, _rules
from tilewise.receptive_field import _mixing_rules as _mixing_rules  # each registers its rules
from tilewise.receptive_field import _view_rules as _view_rules
from tilewise.receptive_field import _window_rules as _window_rules
from tilewise.receptive_field._result import Layer, ReceptiveField
from tilewise.receptive_field._steps import Step, Steps
from tilewise.receptive_field._windows import Everything, Span, Window


def receptive_field(
    model: nn.Module, input_size: int | Sequence[int], top: str | None
) -> ReceptiveField:
    """See tilewise.receptive_field."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    shape = _shape(model, input_size)
    recording = _record.record(model, shape, _rules.known)
    steps = Steps(next(iter(recording.graph.nodes)))
    for node in recording.graph.nodes:
        if node.op == "call_function" and "order" in node.meta:
            _rules.follow(node, steps)
    modules = {name: node for name, node in recording.outputs.items() if "step" in node.meta}
    if top is not None and top not in modules:
        raise ValueError(f"top: expected a module that depends on the input, got {top!r}")
    place = None if top is None else modules[top].meta["step"]
    layers, place = _layers(steps.all, place)
    return ReceptiveField(
        model, shape, layers, place, recording.graph, tuple(steps.all), modules
    )  # fmt: skip


def _shape(model: nn.Module, input_size: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(input_size, int):
        first = next(
            (m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None
        )
        channels = 3 if first is None else first.in_channels
        count = 2 if first is None else len(first.kernel_size)
        return (1, channels, *[input_size] * count)
    shape = tuple(int(size) for size in input_size)
    if len(shape) < 3 or min(shape) < 1:
        raise ValueError(f"input_size: expected (batch, channels, ...), got {shape}")
    return shape


def _layers(steps: Sequence[Step], top: int | None) -> tuple[tuple[Layer, ...], int]:
    """The table's rows, and which is the top one."""
    axes = range(len(steps[0].sizes))
    spans = [_directions.closed_form(steps, axis) for axis in axes]
    if top is None:
        ends = [all(not isinstance(s[i], Everything) for s in spans) for i in range(len(steps))]
        top = max(i for i, has_end in enumerate(ends) if has_end)
    seen = [_directions.recursion(steps, top, steps[top].sizes[axis] // 2, axis) for axis in axes]
    columns = []
    for place, step in enumerate(steps):
        fields = [_field(steps, place, axis, spans[axis][place]) for axis in axes]
        windows = [_window(step, axis) for axis in axes]
        count = [_count(units.get(place, (1, 0))) for units in seen]
        why = next((why for *_, why in fields if why), "")
        size, jump, start, centre = zip(*(field[:4] for field in fields), strict=True)
        ksize, stride = zip(*windows, strict=True)
        columns.append(Layer(step.module, step.op, step.sizes, ksize, stride, size, jump, start,
                             centre, tuple(count), why))  # fmt: skip
    return tuple(columns), top


def _field(
    steps: Sequence[Step], place: int, axis: int, span: Span | Everything | None
) -> tuple[float, float | Fraction, float, float, str]:
    """Size, jump, start and centre of a layer, by both ways, and why there is none."""
    if isinstance(span, Everything):
        return math.inf, math.nan, -math.inf, math.nan, span.why
    if span is None:  # no formula: all units, one by one
        units = range(steps[place].sizes[axis])
        ends = [_directions.recursion(steps, place, unit, axis)[0] or (1, 0) for unit in units]
        first, last = ends[0]
        size = max(b - a + 1 for a, b in ends)
        return size, math.nan, first, (first + last) / 2, "joins branches whose jumps differ"
    for unit in {0, len(span.first) - 1}:
        counted = _directions.recursion(steps, place, unit, axis).get(0, (1, 0))
        if counted != span.at(unit) and not _both_empty(counted, span.at(unit)):
            raise RuntimeError(
                f"{steps[place].module}: unit {unit} sees pixels {span.at(unit)} by the closed "
                f"form and {counted} by the recursion: please report this"
            )
    first, last = span.at(0)
    return span.size, _number(span.jump), first, (first + last) / 2, ""


def _both_empty(a: tuple[int, int] | None, b: tuple[int, int]) -> bool:
    return a is not None and a[0] > a[1] and b[0] > b[1]


def _window(step: Step, axis: int) -> tuple[float, float | Fraction]:
    """ksize and stride of a layer; of several sources the widest."""
    windows = [reads[axis] for _, reads in step.sources]
    if any(isinstance(window, Everything) for window in windows):
        return math.inf, math.nan
    plain = [window for window in windows if isinstance(window, Window)]
    widest = max(plain, key=lambda window: window.ksize, default=Window())
    stride = Fraction(widest.stride, widest.divide)
    return widest.ksize, _number(stride)


def _number(value: Fraction) -> int | Fraction:
    """2, not Fraction(2, 1)."""
    return int(value) if value.denominator == 1 else value


def _count(units: tuple[int, int] | None) -> float:
    return math.inf if units is None else max(units[1] - units[0] + 1, 0)
