"""The Triton backend of code_sums, in the interpreter: what no other op promises."""


import pytest
import torch

import tilewise as tw
from tests.triton_tools.checker import checked
from tilewise.kernels import code_sums as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager(x, index, num_codes):
    """index_add in float32, over the rows that are not left out."""
    sums = torch.zeros(len(x), num_codes, x.shape[2])
    for head, (rows, codes) in enumerate(zip(x.float(), index, strict=True)):
        keep = (codes >= 0) & (codes < num_codes)
        sums[head].index_add_(0, codes[keep], rows[keep])
    return sums


def check(x, index, num_codes):
    """Counts are right; sums are no further off than eager ones, and an ulp of the terms."""
    counts, sums = kernels.code_sums(x, index, num_codes)
    inside = index.masked_fill(index >= num_codes, -1)
    exact_counts, _ = tw.reference.code_sums(x, inside, num_codes, per_head=True)
    assert torch.equal(counts, exact_counts)
    _, exact = tw.reference.code_sums(x.double(), inside, num_codes, per_head=True)
    _, terms = tw.reference.code_sums(x.double().abs(), inside, num_codes, per_head=True)
    assert sums.shape == exact.shape and sums.dtype == torch.float32
    ours, theirs = ((s - exact).abs() for s in (sums, eager(x, index, num_codes)))
    assert (ours <= 2.0**-23 * terms + theirs.amax()).all()
    assert ours.square().mean() <= theirs.square().mean() + (2.0**-24 * terms).square().mean()


@pytest.fixture(params=[256, 4], ids=["part-256", "part-4"])
def part(request, monkeypatch):
    monkeypatch.setattr(kernels, "PART", request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, rows, dim, codes", [
    (1, 1, 1, 1), (1, 70, 19, 50), (3, 100, 33, 7), (1, 300, 8, 3),
])
def test_no_worse_than_eager(part, heads, rows, dim, codes, dtype):
    x = torch.randn(heads, rows, dim).to(dtype)
    check(x, torch.randint(-2, codes + 2, (heads, rows)), codes)


def test_one_code_has_nearly_all_rows(part):
    index = torch.randint(20, (1, 3000))
    index[:, ::10] = 7
    index[:, 300:] = 7
    check(1 + torch.rand(1, 3000, 5), index, 20)


@pytest.mark.parametrize("heads, rows, dim, codes", [
    (1, 0, 4, 5), (2, 7, 3, 0), (1, 5, 0, 4), (0, 5, 3, 4), (1, 0, 0, 0),
])
def test_nothing_to_add(heads, rows, dim, codes):
    index = torch.zeros(heads, rows, dtype=torch.int64)
    counts, sums = kernels.code_sums(torch.randn(heads, rows, dim), index, codes)
    assert torch.equal(counts, torch.tensor([[rows] + [0] * 4]).expand(heads, -1)[:, :codes])
    assert torch.equal(sums, torch.zeros(heads, codes, dim))


@pytest.mark.parametrize("index", [[-1, -(2**62), -5], [9, 2**62, 2**31 + 1]])
def test_rows_without_a_code_are_left_out(index):
    x = torch.full((1, 3, 4), float("nan"))
    counts, sums = kernels.code_sums(x, torch.tensor([index]), 9)
    assert not counts.any() and not sums.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_its_own_code(part, value):
    x, index = torch.randn(2, 50, 6), torch.arange(100).view(2, 50) % 12
    clean = kernels.code_sums(x, index, 12)[1]
    x[1, 13, 2] = value
    sums = kernels.code_sums(x, index, 12)[1]
    spoilt = torch.zeros_like(sums, dtype=torch.bool)
    spoilt[1, index[1, 13], 2] = True
    assert torch.equal(~sums.isfinite(), spoilt)
    assert torch.equal(sums[~spoilt], clean[~spoilt])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads, rows, dim, codes", [(1, 64, 32, 16), (2, 37, 19, 11), (1, 1, 1, 1)]
)
def test_memory_accesses(part, heads, rows, dim, codes, dtype):
    x = torch.randn(heads, rows, dim).to(dtype)
    index = torch.randint(-1, codes + 1, (heads, rows))
    outputs = {
        kernels.code_keys: ["key_ptr"],
        kernels.code_starts: ["start_ptr", "count_ptr", "parts_ptr"],
        kernels.sum_parts: ["sums_ptr"], kernels.sum_codes: ["sums_ptr"],
    }
    with checked(outputs) as launches:
        kernels.code_sums(x, index, codes)
    assert [launch.kernel for launch in launches] == [k.fn.__name__ for k in outputs]


def test_codes_of_several_blocks_and_many_rows():
    x, index = torch.randn(2, 1500, 3), torch.randint(-9, 400, (2, 1500))
    check(x, index, 350)


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded", "same row"])
def test_layouts(layout):
    x, index = torch.randn(3, 40, 10), torch.randint(9, (3, 40))
    x = {
        "transposed": lambda: x.transpose(1, 2).contiguous().transpose(1, 2),
        "strided": lambda: x.repeat_interleave(2, 1)[:, ::2],
        "offset": lambda: torch.cat([x[..., :1], x], -1)[..., 1:],
        "expanded": lambda: x[:1].expand(3, -1, -1),
        "same row": lambda: x[:, :1].expand(-1, 40, -1),
    }[layout]()
    check(x, index, 9)
    check(x, index.t().contiguous().t(), 9)
    check(x, index[:1].expand(3, -1), 9)


def test_same_bits_on_every_run_and_for_every_split_of_heads():
    x, index = torch.randn(3, 200, 7), torch.randint(4, (3, 200))
    counts, sums = kernels.code_sums(x, index, 4)
    again = kernels.code_sums(x, index, 4)
    alone = [kernels.code_sums(x[h : h + 1], index[h : h + 1], 4) for h in range(3)]
    assert torch.equal(again[0], counts) and torch.equal(again[1], sums)
    assert torch.equal(torch.cat([s for _, s in alone]), sums)


def test_parts_do_not_grow_with_codes_that_have_no_rows():
    with checked({kernels.sum_parts: ["sums_ptr"]}) as launches:
        kernels.code_sums(torch.ones(1, 10, 1), torch.zeros(1, 10, dtype=torch.int64), 1000)
    assert launches[0].arguments["parts"] == 10


def test_public_function_is_differentiable():
    x, index = torch.randn(30, 6, requires_grad=True), torch.randint(-1, 5, (30,))
    with tw.backend("triton"):
        counts, sums = tw.code_sums(x, index, 5)
    weights = torch.randn(5, 6)
    (sums * weights).sum().backward()
    expected = weights[index.clamp(min=0)] * (index >= 0)[:, None]
    assert torch.equal(x.grad, expected) and counts.sum() == (index >= 0).sum()
