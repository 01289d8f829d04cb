"""tilewise.code_sums: counts and sums against float64, deterministic, NaN where it belongs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilewise as tw
from tests.common.budget import assert_within_budget
from tests.common.concurrency import assert_same_bits
from tests.common.contrastive_cases import DEVICE

BACKENDS = ["cpu", "triton"] if DEVICE == "cpu" else ["triton"]
OPERATORS = {"cpu": torch.ops.tilewise, "triton": torch.ops.tilewise_triton}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with tw.backend(request.param):
        yield request.param


def index_add(x, index, num_codes):
    """What people write: index_add in float32."""
    keep = index >= 0
    sums = torch.zeros(num_codes, x.shape[-1]).index_add(0, index[keep], x[keep].float())
    return sums.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def check(x, index, num_codes):
    counts, sums = tw.code_sums(x, index, num_codes)
    exact_counts, exact = tw.reference.code_sums(x.double(), index, num_codes)
    assert torch.equal(counts, exact_counts)
    size = tw.reference.code_sums(x.double().abs(), index, num_codes)[1]
    magnitude = float(size.max()) if size.numel() else 0.0
    assert_within_budget(
        {"sums": sums}, {"sums": index_add(x, index, num_codes)}, {"sums": exact},
        {"sums": magnitude},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, codes, dim", [
    (0, 5, 3), (1, 1, 1), (50, 7, 5), (100, 300, 64), (130, 3, 65), (70, 1, 129), (9, 4, 0),
    (5, 0, 3),
])
def test_within_error_budget(backend, rows, codes, dim, dtype):
    torch.manual_seed(rows + codes)
    index = torch.randint(-1, codes, (rows,)) if codes else torch.full((rows,), -1)
    check(torch.randn(rows, dim).to(dtype) + 100, index, codes)


def test_one_code_takes_nearly_everything(backend):
    torch.manual_seed(0)
    index = torch.where(torch.rand(900) < 0.95, 3, torch.randint(0, 6, (900,)))
    check(torch.randn(900, 20), index, 6)


@given(
    rows=st.integers(0, 60), codes=st.integers(1, 20), dim=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**20),
)
def test_random_problems(rows, codes, dim, dtype, seed):
    torch.manual_seed(seed)
    check(torch.randn(rows, dim).to(dtype), torch.randint(-1, codes, (rows,)), codes)


def test_nan_stays_in_its_code(backend):
    x, index = torch.randn(40, 6), torch.arange(40) % 5
    x[7], x[8, 1] = float("nan"), float("inf")
    index[9] = -1
    x[9] = float("nan")
    _, sums = tw.code_sums(x, index, 5)
    assert sums[2].isnan().all() and sums[3, 1] == float("inf")
    assert not sums[[0, 1, 4]].isnan().any()


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_heads(name):
    x, index = torch.randn(3, 4, 5, 6), torch.randint(-1, 7, (3, 4, 5))
    index[:, 0] = torch.tensor([-1, 0, 3, 6, -1])  # what one head leaves out is no other's
    with tw.backend(name):
        check_heads(x, index)


def check_heads(x, index):
    counts, sums = tw.code_sums(x, index, 7, per_head=True)
    assert counts.shape == (3, 7) and sums.shape == (3, 7, 6)
    for head in range(3):
        expected = tw.code_sums(x[head], index[head], 7)
        assert torch.equal(counts[head], expected[0]) and torch.equal(sums[head], expected[1])


def test_strides_and_repeats(backend):
    wide = torch.randn(40, 31)
    index = torch.randint(0, 5, (40, 2))[:, 1]
    for x in (wide[:, 3::2], wide.T[:40].T, wide[:1].expand(40, -1)):
        first = tw.code_sums(x, index, 5)
        assert torch.equal(first[1], tw.code_sums(x.contiguous(), index.contiguous(), 5)[1])
        assert torch.equal(first[1], tw.code_sums(x, index, 5)[1])


def test_gradients(backend):
    x = torch.randn(20, 4, requires_grad=True)
    index = torch.randint(-1, 6, (20,))
    weights = torch.randn(6, 4)
    _, sums = tw.code_sums(x, index, 6)
    gradient, = torch.autograd.grad((sums * weights).sum(), x, create_graph=True)
    expected = torch.where(index[:, None] < 0, 0.0, weights[index.clamp(min=0)])
    assert torch.equal(gradient, expected)
    _, sums = tw.code_sums(x, index, 6)
    gradient, = torch.autograd.grad(sums.square().sum(), x, create_graph=True)
    gradient.sum().backward()  # differentiable again
    counts = torch.bincount(index[index >= 0], minlength=6)
    expected = torch.where(index < 0, 0, 2 * counts[index.clamp(min=0)])
    torch.testing.assert_close(x.grad, expected[:, None].expand(-1, 4).float())


def test_compiled(backend):
    torch._dynamo.reset()
    compiled = torch.compile(tw.code_sums, fullgraph=True, backend="aot_eager")
    for rows in (16, 16, 19):
        x, index = torch.randn(rows, 4, requires_grad=True), torch.randint(0, 5, (rows,))
        ours, eager = compiled(x, index, 5), tw.code_sums(x, index, 5)
        assert torch.equal(ours[0], eager[0]) and torch.equal(ours[1], eager[1])
        ours[1].sum().backward()
        assert torch.equal(x.grad, torch.ones(rows, 4))


X, INDEX = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)


def test_no_codes(backend):
    """All rows are left out, and have a gradient of zero."""
    for name in (backend, "reference"):
        with tw.backend(name):
            x = torch.ones(3, 4, requires_grad=True)
            counts, sums = tw.code_sums(x, torch.full((3,), -1), 0)
            sums.sum().backward()
        assert counts.shape == (0,) and sums.shape == (0, 4) and (x.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_index_of_any_integers(dtype):
    x, index = torch.randn(9, 4), torch.arange(9) % 4
    assert all(map(torch.equal, tw.code_sums(x, index.to(dtype), 5), tw.code_sums(x, index, 5)))


def test_index_beyond_the_codes_raises():
    for name in ("cpu", "reference"):
        with tw.backend(name), pytest.raises(ValueError, match=r"index.*5.*got 5"):
            tw.code_sums(X, INDEX + 5, 5)


@pytest.mark.skipif(DEVICE != "cpu", reason="the C++ backend's")
def test_same_bits_for_every_thread_count(threads):
    torch.manual_seed(0)
    x, index = torch.randn(5000, 70), torch.randint(0, 300, (5000,))
    assert_same_bits(threads, lambda: tw.code_sums(x, index, 300))
    check(x.double(), index, 300)


@pytest.mark.skipif(DEVICE != "cpu", reason="the C++ backend")
def test_the_cpu_adds_in_float64():
    """In float32 nothing comes of 2^24 + 1."""
    x = torch.ones(9, 1)
    x[0] = 2**24
    sums = tw.code_sums(x, torch.zeros(9, dtype=torch.int64), 1).sums
    assert sums.item() == 2**24 + 8
