"""The table of `print(tw.receptive_field(...))`."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tilewise.receptive_field._result import Layer, ReceptiveField

HEADS = "layer", "op", "units", "ksize", "stride", "N_RF", "size", "jump", "start", "centre"
MOST = 34  # characters of a name


def text(result: "ReceptiveField") -> str:
    """A row for each layer, from the picture up, with a line on how to read it below."""
    rows = [HEADS, *(_row(layer) for layer in result.layers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    top = result.layers[result.top]
    lines = [lines[0], rule, *lines[1:], rule]
    lines.append(f"input {_sizes(result.input_size)}; pixels are counted from 0")
    lines.append(
        f"N_RF: units of this layer that one unit of {_name(top)} sees: (N_RF - 1) stride + ksize,"
        " all three of the next row but where branches meet"
    )
    lines.append("size, start, centre: of unit 0, in pixels; the next unit's are jump further")
    for why in dict.fromkeys(layer.why for layer in result.layers if layer.why):
        first = next(layer for layer in result.layers if layer.why == why)
        lines.append(f"all: no end, since {_name(first)}: {why}" if math.inf in first.size else
                     f"nan: {_name(first)}: {why}")  # fmt: skip
    return "\n".join(lines)


def _row(layer: "Layer") -> tuple[str, ...]:
    numbers = layer.ksize, layer.stride, layer.seen, layer.size, layer.jump, layer.start
    cells = [_values(values) for values in (*numbers, layer.centre)]
    cells[2] = "-" if not any(layer.seen) else cells[2]  # it is no layer below the top
    return _name(layer)[-MOST:], layer.op, _sizes(layer.units), *cells


def _name(layer: "Layer") -> str:
    return layer.name or layer.op


def _sizes(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _values(values: Sequence[float | Fraction]) -> str:
    """One number where it is the same along all dimensions."""
    shown = [_value(value) for value in values]
    return shown[0] if len(set(shown)) == 1 else "x".join(shown)


def _value(value: float | Fraction) -> str:
    if isinstance(value, float) and math.isinf(value):
        return "all"
    return str(value) if not isinstance(value, float) else f"{value:g}"
