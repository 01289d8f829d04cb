"""The quick cases under pytest-benchmark: `pytest benchmarks/test_bench.py --benchmark-autosave`.

Its statistics, saved runs and comparisons (`--benchmark-compare`) suit work on one kernel. Numbers
to publish come from `python -m benchmarks.run`, which interleaves what it compares.
"""

import pytest

from benchmarks.harness import registry


def _quick() -> list:
    """A parameter set for each op, quick case and implementation."""
    return [
        pytest.param(op, case, name, id=f"{op}-{case.label}-{name}".replace(" ", "-"))
        for op in registry.names()
        for case in registry.load(op).cases
        if case.quick
        for name in registry.load(op).implementations("cpu")
    ]


@pytest.mark.parametrize(("op", "case", "name"), _quick())
def test_time(benchmark, op, case, name):
    entry = registry.load(op)
    kind = case.kinds[0]
    benchmark.group = f"{op} {case.label} {kind}"
    benchmark.extra_info.update(flops=entry.flops(case, kind), bytes=entry.moved(case, kind))
    call = entry.implementations("cpu")[name].build(entry.inputs(case, "cpu"), kind)
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
