"""The two ways to a receptive field: from the picture up, and from a unit down.

Up, a layer's field is a formula, which holds for every unit at once. Down, it is counted: how many
units of each layer does this unit of that one see? Neither uses the other, and they have to agree.
"""

from collections.abc import Sequence

from tilewise.receptive_field._steps import Step
from tilewise.receptive_field._windows import (
    NONE,
    PIXEL,
    Everything,
    Span,
    Window,
    hull,
    through,
    union,
)

Formula = Span | Everything | None  # None: branches whose jumps differ have none
Seen = tuple[int, int] | None  # the first and the last unit; None: all, without an end


def closed_form(steps: Sequence[Step], axis: int) -> list[Formula]:
    """Bottom-up: of every step the span of pixels that its units see, border or not."""
    spans: list[Formula] = [PIXEL]
    for step in steps[1:]:
        parts = [_through(spans[source], reads[axis]) for source, reads in step.sources]
        spans.append(_union(parts))
    return spans


def _through(span: Formula, window: Window | Everything) -> Formula:
    if isinstance(span, Everything):
        return span  # the first reason is the one that is named
    if isinstance(window, Everything):
        return window
    return None if span is None else through(span, window)


def _union(parts: list[Formula]) -> Formula:
    for part in parts:
        if isinstance(part, Everything):
            return part
    result = parts[0]
    for part in parts[1:]:
        if result is None or part is None:
            return None
        assert isinstance(result, Span) and isinstance(part, Span)
        result = union(result, part)
    return result


def recursion(steps: Sequence[Step], top: int, unit: int, axis: int) -> dict[int, Seen]:
    """Top-down: which units of the steps below a unit of step `top` sees, border or not.

    One layer down, N units with window (ksize, stride) see (N - 1) stride + ksize; where branches
    meet, both count.
    """
    seen: dict[int, Seen] = {top: (unit, unit)}
    for place in range(top, 0, -1):
        units = seen.get(place, NONE)
        if units is not None and units[0] > units[1]:
            continue
        for source, reads in steps[place].sources:
            window = reads[axis]
            if units is None or isinstance(window, Everything):
                seen[source] = None
                continue
            below = window.reads(*units)
            known = seen.get(source, NONE)
            seen[source] = None if known is None else hull(known, below)
    return seen


Box = tuple[tuple[int, int], ...]  # along each axis the first and the last unit


def within(steps: Sequence[Step], top: int, unit: Sequence[int]) -> dict[int, Box]:
    """Top-down within the borders: the units that exist, as boxes. What is padding is not seen."""
    seen: dict[int, Box] = {top: tuple((i, i) for i in unit)}
    for place in range(top, 0, -1):
        if place not in seen:
            continue
        for source, reads in steps[place].sources:
            sizes = steps[source].sizes
            below = tuple(
                (0, size - 1) if isinstance(window, Everything)
                else window.reads_within(*units, size)
                for window, units, size in zip(reads, seen[place], sizes, strict=True)
            )  # fmt: skip
            if any(first > last for first, last in below):
                continue
            known = seen.get(source)
            seen[source] = below if known is None else tuple(map(hull, known, below))
    return seen
