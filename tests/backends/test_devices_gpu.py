"""What every op promises on a GPU, whatever it computes: streams, graphs, devices, memory, bits."""

import os

import pytest
import torch

from tests.common.device_cases import STEPS, in_small_chunks

N = int(os.environ.get("TILEWISE_TEST_ROWS", "3000"))  # of no whole number of tiles
every_op = pytest.mark.parametrize("name", STEPS)


def equal(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@every_op
def test_equal_bits_over_runs_beside_a_busy_stream(name):
    step = STEPS[name](N, "cuda")
    expected = step()
    busy, factor = torch.cuda.Stream(), torch.randn(4096, 4096)
    for _ in range(20):
        with torch.cuda.stream(busy):
            factor @ factor
        assert equal(step(), expected)
    torch.cuda.synchronize()


@every_op
def test_on_a_side_stream(name):
    step = STEPS[name](N, "cuda")
    expected = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results = step()
    torch.cuda.current_stream().wait_stream(side)
    assert equal(results, expected)


@every_op
def test_nothing_waits_for_the_device(name):
    step = STEPS[name](N, "cuda")
    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_op
def test_cuda_graph(name):
    step = STEPS[name](N, "cuda")
    expected = [x.clone() for x in step()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(3):
        for x in results:
            x.zero_()
        graph.replay()
        assert equal(results, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@every_op
def test_on_a_device_that_is_not_the_current_one(name):
    expected = STEPS[name](N, "cuda:0")()
    with torch.cuda.device(0):
        results = STEPS[name](N, "cuda:1")()
    same = torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.device.index == 1
        if same:
            assert torch.equal(ours.cpu(), theirs.cpu())


def peak(name: str, n: int) -> int:
    step = STEPS[name](n, "cuda")
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@every_op
def test_memory_grows_like_the_rows(name):
    """By some rows of 64 numbers each; a matrix of all pairs would be 100 times as much."""
    sizes = 20000, 40000
    small, large = (peak(name, n) for n in sizes)
    assert large - small <= 8 * 1024 * (sizes[1] - sizes[0])


@every_op
def test_large_and_ragged_like_small_ones(name):
    """Many tiles and chunks; results are finite, and the first run's are every run's."""
    step = STEPS[name](20011, "cuda")
    results = step()
    assert all(x.isfinite().all() for x in results if x.is_floating_point())
    assert equal(step(), results)


@every_op
def test_several_chunks_like_one(name, monkeypatch):
    step = STEPS[name](N, "cuda")
    expected = step()
    in_small_chunks(monkeypatch, N)
    for ours, one in zip(step(), expected, strict=True):
        torch.testing.assert_close(ours.double(), one.double(), rtol=1e-4, atol=1e-5)


@every_op
def test_first_rows_like_the_cpu(name):
    """The same numbers as another backend's, on another machine's arithmetic."""
    ours, cpu = (STEPS[name](300, device)() for device in ("cuda", "cpu"))
    for mine, theirs in zip(ours, cpu, strict=True):
        torch.testing.assert_close(mine.cpu().double(), theirs.double(), rtol=2e-2, atol=1e-3)
