"""Both ways to a field on random networks, beside sums written out and units walked one by one."""

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewise.receptive_field import _directions
from tilewise.receptive_field._steps import Step
from tilewise.receptive_field._windows import (
    PIXEL,
    Everything,
    Span,
    Window,
    hull,
    through,
    union,
)

layers = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 3), st.integers(1, 3))


def conv(ksize, stride, padding, dilation):
    return Window(stride, -padding, dilation * (ksize - 1) - padding)


def transposed(ksize, stride, padding):
    return Window(1, padding - ksize + 1 + stride - 1, padding, stride)


@given(st.lists(layers, max_size=8))
def test_closed_form_is_the_papers_sum_on_random_chains(chain):
    """r = 1 + sum d (k - 1) prod s, and the start is minus the sum of paddings in pixels."""
    span = PIXEL
    for layer in chain:
        span = through(span, conv(*layer))
    jumps = [math.prod(s for _, s, _, _ in chain[:i]) for i in range(len(chain) + 1)]
    size = 1 + sum(d * (k - 1) * j for (k, _, _, d), j in zip(chain, jumps, strict=False))
    start = -sum(p * j for (_, _, p, _), j in zip(chain, jumps, strict=False))
    assert (span.size, span.jump, span.first[0]) == (size, jumps[-1], start)


@given(st.lists(layers, min_size=1, max_size=8))
def test_recursion_is_the_formula_with_n_rf_on_random_chains(chain):
    steps = [Step("", "", (9,), ())]
    for i, layer in enumerate(chain):
        steps.append(Step("", "", (9,), ((i, (conv(*layer),)),)))
    seen = _directions.recursion(steps, len(chain), 4, 0)
    n = 1
    for i, (ksize, stride, _, dilation) in reversed(list(enumerate(chain))):
        n = (n - 1) * stride + dilation * (ksize - 1) + 1
        assert seen[i][1] - seen[i][0] + 1 == n


def random_graph(seed: int) -> list[Step]:
    """Layers of all kinds on one another, with branches that join where their jumps agree."""
    rng = random.Random(seed)
    steps, spans = [Step("", "", (10**6,), ())], [PIXEL]
    while len(steps) < 12:
        place = rng.randrange(max(len(steps) - 3, 0), len(steps))
        window = rng.choice([
            conv(rng.randint(1, 4), rng.randint(1, 2), rng.randint(0, 2), rng.randint(1, 2)),
            transposed(rng.randint(2, 5), 2, rng.randint(0, 2)),
            Window(1, 0, 0, rng.randint(2, 3)), Window(2 * 3, -1, 2 * 3 - 2, 2 * 4),
        ])  # fmt: skip
        links = {place: through(spans[place], window)}
        sources = [(place, (window,))]
        for other in range(len(steps)):
            if spans[other].jump == links[place].jump and other != place and rng.random() < 0.5:
                sources.append((other, (Window(),)))
                links[place] = union(links[place], spans[other])
        steps.append(Step("", "", (10**6,), tuple(sources)))
        spans.append(links[place])
    return steps


@pytest.mark.parametrize("seed", range(2, 22))
def test_the_two_ways_agree_on_random_graphs(seed):
    """For every unit of two periods, and the recursion agrees with sets of units, walked."""
    steps = random_graph(seed)
    spans = _directions.closed_form(steps, 0)
    for place, span in enumerate(spans):
        for unit in range(-3, 2 * len(span.first)):
            counted = _directions.recursion(steps, place, unit, 0).get(0, (1, 0))
            assert counted == span.at(unit) or counted[0] > counted[1], (place, unit)
        assert walked(steps, place, 50) == _directions.recursion(steps, place, 50, 0)[0]


def walked(steps, top, unit):
    """The first and last pixel by sets: every unit that is read, its own reads, and so on."""
    units = {place: set() for place in range(top + 1)}
    units[top].add(unit)
    for place in range(top, 0, -1):
        for source, (window,) in steps[place].sources:
            for i in units[place]:
                first, last = window.reads(i, i)
                units[source].update(range(first, last + 1))
    return min(units[0]), max(units[0])


def test_period_is_the_shortest():
    up = through(PIXEL, Window(1, 0, 0, 2))
    assert up == Span(1, (0, 0), (0, 0)) and up.jump == Fraction(1, 2)
    assert through(up, Window(2, 0, 0)) == PIXEL
    three = through(up, conv(3, 1, 1, 1))
    assert three.first == (-1, 0) and three.last == (0, 1) and three.size == 2


def test_branches_whose_jumps_differ_have_no_formula():
    assert union(PIXEL, through(PIXEL, conv(1, 2, 0, 1))) is None
    steps = [Step("", "", (8,), ()), Step("", "", (4,), ((0, (Window(2),)),)),
             Step("", "", (4,), ((0, (Window(),)), (1, (Window(),))))]  # fmt: skip
    assert _directions.closed_form(steps, 0)[2] is None


def test_everything_is_passed_on():
    steps = [Step("", "", (8,), ()), Step("", "", (8,), ((0, (Everything("all of it"),)),)),
             Step("", "", (8,), ((1, (Window(),)), (0, (Window(),))))]  # fmt: skip
    assert _directions.closed_form(steps, 0)[2] == Everything("all of it")
    assert _directions.recursion(steps, 2, 3, 0)[0] is None
    assert _directions.within(steps, 2, [3])[0] == ((0, 7),)


@pytest.mark.parametrize("edge", ["nothing", "repeat", "mirror", "wrap"])
def test_borders(edge):
    """Beside the padded indices, written out as torch pads them."""
    size, pad = 6, 3
    index = {
        "nothing": [i if 0 <= i < size else None for i in range(-pad, size + pad)],
        "repeat": [min(max(i, 0), size - 1) for i in range(-pad, size + pad)],
        "mirror": [size - 1 - abs(size - 1 - abs(i)) for i in range(-pad, size + pad)],
        "wrap": [i % size for i in range(-pad, size + pad)],
    }[edge]
    window = Window(1, -pad, -pad, 1, edge)
    for first in range(len(index)):
        for last in range(first, len(index)):
            read = [i for i in index[first : last + 1] if i is not None]
            found = window.reads_within(first, last, size)
            assert found == (min(read), max(read)) if read else found[0] > found[1]


def test_the_empty_interval_joins_nothing():
    assert hull((1, 0), (5, 7)) == hull((5, 7), (1, 0)) == (5, 7)
    assert hull((2, 3), (5, 7)) == (2, 7)
