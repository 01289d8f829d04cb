"""Which units of a layer's input a unit of its output reads, along one dimension, and compositions.

A window is one layer, a span all layers from the picture to one of them. Both hold integers, so
that nothing is rounded where a network's stride is a fraction, as it is after an upsampling.
"""

import functools
import math
from fractions import Fraction
from typing import NamedTuple


class Window(NamedTuple):
    """Unit i reads units (stride i + first) // divide to (stride i + last) // divide.

    A convolution has divide = 1, an upsampling by 2 has stride = 1 and divide = 2. `edge` says what
    a read beyond the border finds: nothing, the "repeat" of the last unit, its "mirror", or, by
    "wrap", the units at the other end.
    """

    stride: int = 1
    first: int = 0
    last: int = 0
    divide: int = 1
    edge: str = "nothing"

    def reads(self, first: int, last: int) -> tuple[int, int]:
        """What units first to last read. With divide = 1 these are (n - 1) stride + ksize."""
        start = (self.stride * first + self.first) // self.divide
        return start, (self.stride * last + self.last) // self.divide

    def reads_within(self, first: int, last: int, size: int) -> tuple[int, int]:
        """The same of an input of `size` units; first > last where it reads none of them."""
        first, last = self.reads(first, last)
        if first > last:  # between the taps of a transposed convolution
            return first, last
        if self.edge == "mirror":
            first, last = _mirrored(first, last, size)
        if self.edge == "wrap":
            inside = first // size == last // size  # else it reads both ends, and all is between
            return (first % size, last % size) if inside else (0, size - 1)
        if self.edge == "repeat":
            return min(max(first, 0), size - 1), min(max(last, 0), size - 1)
        return max(first, 0), min(last, size - 1)

    @property
    def ksize(self) -> int:
        """Units from the first that it reads to the last, at most, holes of a dilation included."""
        ends = (self.reads(unit, unit) for unit in range(self.divide))
        return max(last - first for first, last in ends) + 1


IDENTITY = Window()
CONSTANT = Window(stride=0)  # every unit reads unit 0, the only one there is


class Everything(NamedTuple):
    """In place of a window: every unit reads all units, and `why`."""

    why: str


class Span(NamedTuple):
    """Unit i sees pixels first[i % period] + step q to last[i % period] + step q, q = i // period.

    The period is 1 below the first upsampling. Then first is the start, step the jump (the product
    of all strides), and last - first + 1 the size: 1 + sum (ksize - 1) (product of strides below).
    """

    step: int
    first: tuple[int, ...]
    last: tuple[int, ...]

    @property
    def jump(self) -> Fraction:
        return Fraction(self.step, len(self.first))

    @property
    def size(self) -> int:
        return max(last - first for first, last in zip(self.first, self.last, strict=True)) + 1

    def at(self, unit: int) -> tuple[int, int]:
        q, phase = divmod(unit, len(self.first))
        return self.first[phase] + q * self.step, self.last[phase] + q * self.step


PIXEL = Span(1, (0,), (0,))
NONE = 1, 0  # the first after the last: an empty interval


def through(span: Span, window: Window) -> Span:
    """Of the units that read `window` of units with this span: the closed form's next term."""
    period = len(span.first) * window.divide
    period //= math.gcd(window.stride, period)  # so many units on, the pattern repeats
    step = span.step * (window.stride * period // (len(span.first) * window.divide))
    ends = [_over(span, *window.reads(i, i)) for i in range(period)]
    return Span(step, tuple(first for first, _ in ends), tuple(last for _, last in ends))


def union(a: Span, b: Span) -> Span | None:
    """Of units that read both; None where the jumps differ, since the two then drift apart."""
    if a.jump != b.jump:
        return None
    period = math.lcm(len(a.first), len(b.first))
    ends = [hull(a.at(i), b.at(i)) for i in range(period)]
    step = int(a.jump * period)
    return Span(step, tuple(first for first, _ in ends), tuple(last for _, last in ends))


def hull(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """The smallest interval with both."""
    if a[0] > a[1] or b[0] > b[1]:
        return b if a[0] > a[1] else a
    return min(a[0], b[0]), max(a[1], b[1])


def _over(span: Span, first: int, last: int) -> tuple[int, int]:
    """What units first to last see together."""
    if first > last:
        return NONE
    if all(a <= b for a, b in zip(span.first, span.last, strict=True)):
        return span.at(first)[0], span.at(last)[1]  # the ends are enough: spans move to the right
    return functools.reduce(hull, map(span.at, range(first, last + 1)), NONE)


def _mirrored(first: int, last: int, size: int) -> tuple[int, int]:
    """Of an interval that leans over borders: -1 reads 1, and size reads size - 2."""
    low, high = max(first, 0), min(last, size - 1)
    if first < 0:
        low, high = hull((low, high), (max(-last, 1), -first))
    if last >= size:
        low, high = hull((low, high), (2 * size - 2 - last, 2 * size - 2 - max(first, size)))
    return low, high
