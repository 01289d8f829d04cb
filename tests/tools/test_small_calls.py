"""Small calls are timed side by side, and fail a quick run where ours are slow in every try."""

import csv
import time

import pytest
import torch

from benchmarks import run
from benchmarks.harness import bench, registry, small
from benchmarks.harness.bench import OURS
from tilewise import _backend


@pytest.mark.parametrize("op", _backend.ops())
def test_every_op_has_small_calls(op):
    benchmark = registry.load(op)
    assert sum(case.quick for case in benchmark.small_calls) >= 3
    assert (benchmark.rival or benchmark.baseline) in benchmark.implementations("cpu")


@pytest.mark.parametrize("op", ["clip_loss", "sigmoid_loss"])
def test_the_operator_alone_makes_all_gradients(op):
    benchmark = registry.load(op)
    inputs = benchmark.inputs(benchmark.small_calls[0], "cpu")
    expected = benchmark.implementations("cpu")[OURS].build(inputs, bench.TRAINING)()
    found = benchmark.operator(inputs)()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_batches_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) or time.sleep(2e-3) for name in "ab"}
    times = small.time_batches(calls, rounds=3)
    assert order[-12:] == [*"bbaa", *"aabb", *"bbaa"]
    assert all(len(values) == 3 and min(values) >= 2 for values in times.values())


@pytest.mark.parametrize("tries, status", [
    ([2.0, 1.2], 0), ([2.0, 2.0, 1.9, 1.2], 1),
], ids=["a slow moment", "slow"])
def test_slow_ones_fail_a_quick_run(tmp_path, capsys, monkeypatch, tries, status):
    """After three tries; the reason is printed."""
    left = iter(tries + [1.0] * 100)

    def time_batches(calls, rounds):
        ours = next(left)
        return {name: [ours if name == OURS else 1.0] * rounds for name in calls}

    monkeypatch.setattr(small, "time_batches", time_batches)
    monkeypatch.setattr(run, "peak_bytes_each", lambda prepare, cases, meter: [2**20] * len(cases))
    monkeypatch.setattr(run, "time_interleaved", lambda calls, *_: {n: [1.0] for n in calls})
    arguments = ["--op", "gumbel_argmax", "--quick", "--no-verify", "--out", str(tmp_path)]
    assert run.main(arguments) == status
    assert ("too slow: gumbel_argmax N=1 K=10" in capsys.readouterr().out) == bool(status)
    with (tmp_path / "gumbel_argmax-cpu-small.csv").open() as file:
        first = next(csv.DictReader(file))
    assert (first["threads"], first["baseline"]) == ("1", "multinomial")
    assert float(first["ratio_to_baseline"]) == min(tries[:3])
