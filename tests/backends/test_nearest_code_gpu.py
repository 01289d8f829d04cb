"""nearest_code and code_sums on a real GPU: what an interpreter is too slow for, or cannot show."""

import pytest
import torch

import tilewise as tw
from benchmarks.harness.measure import peak_bytes
from tests.common.codebook_cases import CASES, Case, clusters, near, normal
from tests.ops.test_nearest_code import METRICS, check
from tilewise.kernels import nearest_code as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BIG = [
    Case("whole-tiles", near, (4096, 2048, 64)),
    Case("ragged", normal, (3001, 1500, 100)),
    Case("narrow", normal, (5000, 4099, 8)),
    Case("wide", near, (1000, 1000, 1030)),
    Case("clusters-of-codes", clusters, (2000, 3000, 40)),
    Case("several-chunks", normal, (40000, 4000, 16)),
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BIG, ids=lambda case: case.name)
def test_same_as_reference(case, dtype, metric):
    check(*case.tensors(dtype), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [None, 2, 16])
@pytest.mark.parametrize("case", [c for c in CASES if c.sizes[0]], ids=lambda case: case.name)
def test_filter_on_small_problems(monkeypatch, case, k, metric):
    """Which brute force would do by default. Sizes of several tiles, where a case allows it."""
    monkeypatch.setattr(kernels, "DEFAULT_SMALL", 0)
    sizes = (300, 700, 40) if case.make is not normal else None
    x, codebook = case.tensors(sizes=sizes)
    if k is None or k <= len(codebook):
        check(x, codebook, metric, k)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("make", [normal, near, clusters])
def test_filter_and_brute_force_agree(monkeypatch, make, metric):
    """On more rows than the reference is fast enough for."""
    x, codebook = Case("agree", make, (100000, 2000, 32)).tensors()
    filtered = tw.nearest_code(x, codebook, metric, 3)
    monkeypatch.setattr(kernels, "DEFAULT_SMALL", 2**62)
    exact = tw.nearest_code(x, codebook, metric, 3)
    assert torch.equal(filtered.index, exact.index)
    assert torch.equal(filtered.distance, exact.distance)


def test_heads_masks_and_rows_that_are_not_finite():
    x, codebook = torch.randn(3, 4000, 48), torch.randn(3, 1100, 48)
    x[:, ::97, 5] = float("inf")
    x[:, 1::97, 7] = float("nan")
    check(x, codebook, "cosine", 2, torch.rand(3, 4000) < 0.8)
    check(x.transpose(0, 1).contiguous().transpose(0, 1), codebook[:1].expand(3, -1, -1))


@pytest.mark.parametrize("metric", METRICS)
def test_same_bits_on_every_run(metric):
    x, codebook = Case("bits", clusters, (20000, 3000, 64)).tensors(torch.bfloat16)
    runs = [tw.nearest_code(x, codebook, metric, 4) for _ in range(3)]
    for run in runs[1:]:
        assert torch.equal(run.index, runs[0].index)
        assert torch.equal(run.distance, runs[0].distance)


def test_automatic_choice_is_the_triton_backends():
    x, codebook = Case("auto", near, (400, 700, 64)).tensors(torch.bfloat16)
    automatic = tw.nearest_code(x, codebook)
    with tw.backend("triton"):
        assert torch.equal(automatic.index, tw.nearest_code(x, codebook).index)


@pytest.mark.parametrize("small", [0, 2**62], ids=["filter", "brute"])
def test_no_host_sync(monkeypatch, small):
    monkeypatch.setattr(kernels, "DEFAULT_SMALL", small)
    x, codebook = Case("sync", near, (500, 300, 64)).tensors()
    x[7, 7] = float("inf")
    codebook.requires_grad_()

    def step():
        code = tw.nearest_code(x, codebook, "cosine", 2, mask)
        code.distance.nan_to_num().sum().backward()
        tw.code_sums(x, code.index[:, 0], 300)

    mask = torch.rand(500) < 0.9
    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def prepare_memory(rows, codes, dim, device):
    """Runs in a process of its own: see benchmarks.harness.measure.peak_bytes."""
    x = torch.randn(rows, dim, device=device, dtype=torch.bfloat16)
    codebook = torch.randn(codes, dim, device=device)

    def step(count):
        code = tw.nearest_code(x[:count], codebook)
        return tw.code_sums(x[:count], code.index, codes)

    step(64)
    return lambda: step(rows)


def test_memory_grows_like_the_rows():
    codes, dim, sizes = 4096, 64, (2**16, 2**18)
    small, large = (
        peak_bytes(prepare_memory, rows=n, codes=codes, dim=dim, device="cuda") for n in sizes
    )
    # index and distance, and what sorting takes; N * K floats would be 800 times as much
    assert large - small <= 200 * (sizes[1] - sizes[0])
    assert small <= kernels.WORKSPACE_BYTES + 200 * sizes[0] + 40 * codes * dim


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", ["even", "one code", "few codes", "no rows for most"])
def test_code_sums(spread, dtype):
    n, k, d = 100003, 1000, 72
    x = (torch.randn(2, n, d) + 1).to(dtype)
    index = {
        "even": torch.randint(k, (2, n)),
        "one code": torch.where(torch.rand(2, n) < 0.99, 3, torch.randint(k, (2, n))),
        "few codes": torch.randint(3, (2, n)),
        "no rows for most": torch.randint(-5, 5, (2, n)) * 11,
    }[spread]
    counts, sums = tw.code_sums(x, index, k, per_head=True)
    exact_counts, exact = tw.reference.code_sums(x.double(), index, k, per_head=True)
    _, terms = tw.reference.code_sums(x.double().abs(), index, k, per_head=True)
    assert torch.equal(counts, exact_counts)
    assert ((sums - exact).abs() <= 2.0**-20 * terms).all()
    again = tw.code_sums(x, index, k, per_head=True)[1]
    assert torch.equal(again, sums)


def test_code_sums_leaves_out_indices_that_are_too_large():
    x, index = torch.randn(5000, 33), torch.randint(-100, 300, (5000,))
    counts, sums = tw.code_sums(x, index, 200)
    inside = index.masked_fill(index >= 200, -1)
    exact_counts, exact = tw.reference.code_sums(x, inside, 200)
    assert torch.equal(counts, exact_counts)
    torch.testing.assert_close(sums, exact)
