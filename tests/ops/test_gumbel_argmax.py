"""tilewise.gumbel_argmax: the reference's samples, up to ties that no float32 can tell apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilewise as tw
from tests.common import random_cases as cases
from tests.common.budget import assert_within_budget
from tests.common.random_cases import BY_NAME, CASES, INF, NAN, Case, backends, masked, normal

backend = pytest.fixture(cases.serve)
NO_CATEGORY = ("no-columns",)


def check(case: Case, dtype, k=None):
    """Indices against the perturbed logits in float64, log-probabilities within the budget."""
    x = case.logits(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z = (x.double() + cases.gumbel(x, **case.sampling)).movedim(case.dim, -1)
    index, value = tw.gumbel_argmax(x, k, log_prob=True, **case.sampling)
    assert torch.equal(index, tw.gumbel_argmax(x, k, **case.sampling))
    assert index.dtype == torch.int64 and value.dtype == wide and index.shape == value.shape
    if k is None:
        index, value = index.unsqueeze(case.dim), value.unsqueeze(case.dim)
    check_order(index.movedim(case.dim, -1), z, k or 1)
    check_log_prob(value, x, index, case.dim)


def check_order(index, z, k):
    """The k largest, distinct and in order; only what rounding can't tell apart may be swapped."""
    assert index.shape == (*z.shape[:-1], k)
    assert ((index >= 0) & (index < z.shape[-1])).all()
    assert (index.sort(-1).values.diff(dim=-1) > 0).all()
    z = z.masked_fill(z.isnan(), -INF)
    order = z.sort(dim=-1, descending=True, stable=True)
    best = order.values[..., :k]
    finite = best.isfinite()
    assert torch.equal(index[~finite], order.indices[..., :k][~finite])
    deficit = (best - z.gather(-1, index))[finite].abs()
    assert (deficit <= 2e-6 * (1 + best[finite].abs())).all(), deficit.max()


def check_log_prob(value, x, index, dim):
    """The log-probabilities of the chosen, -inf and NaN where they belong."""
    exact = torch.log_softmax(x.double(), dim).gather(dim, index)
    eager = torch.log_softmax(x.to(value.dtype), dim).gather(dim, index)
    assert torch.equal(value == -INF, exact == -INF)
    assert torch.equal(value.isnan(), exact.isnan())
    results = [{"log_prob": v[exact.isfinite()]} for v in (value, eager, exact)]
    assert_within_budget(*results, {"log_prob": 1 + cases.largest(exact.abs())})


SERVED = [p for p in cases.SERVED if p[2].name not in NO_CATEGORY]


@pytest.mark.parametrize(
    "backend, dtype, case", SERVED, indirect=["backend"],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_same_samples(backend, dtype, case):
    check(case, dtype)


@pytest.mark.parametrize("backend, k", cases.in_backends(5, 1, 2, "all"), indirect=["backend"])
@pytest.mark.parametrize("name", ["typical", "ties", "masked", "not-finite", "4d-dim1", "strided"])
def test_without_replacement(backend, name, k):
    case = BY_NAME[name]
    categories = case.make().shape[case.dim]
    k = categories if k == "all" else min(k, categories)
    check(case, torch.float32, k)
    x = case.logits(torch.float32)
    first = tw.gumbel_argmax(x, k, **case.sampling).select(case.dim, 0)
    assert torch.equal(first, tw.gumbel_argmax(x, **case.sampling))


@cases.cpu_backends
@pytest.mark.parametrize("case", [c for c in CASES if c.name not in NO_CATEGORY],
                         ids=lambda case: case.name)
def test_float64(backend, case):
    for k in (None, min(3, case.make().shape[case.dim])):
        check(case, torch.float64, k)


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3), dim=st.integers(0, 2),
    spread=st.floats(0, 100), mask=st.booleans(), k=st.none() | st.integers(1, 9),
    dtype=st.sampled_from(cases.DTYPES), seed=st.integers(-(2**63), 2**63 - 1),
)
def test_random_problems(shape, dim, spread, mask, k, dtype, seed):
    def make():
        x = spread * normal(*shape, seed=seed % 1000)
        return torch.where(normal(*shape, seed=1) < 0, -INF, x) if mask else x

    case = Case("random", make, dim=dim % len(shape), row_offset=seed)
    check(case, dtype, k and min(k, shape[case.dim]))


@backends
def test_each_prefix_of_a_draw_is_the_draw_of_fewer(backend):
    x = normal(4, 33).float()
    whole = tw.gumbel_argmax(x, 33, seed=3)
    assert torch.equal(whole.sort(-1).values, torch.arange(33).expand(4, -1))
    for k in (1, 2, 3, 8, 31, 32):
        assert torch.equal(tw.gumbel_argmax(x, k, seed=3), whole[:, :k])


@backends
def test_masked_categories_come_last(backend):
    x = masked(5, 33).float()
    whole = tw.gumbel_argmax(x, 33, seed=3)
    chosen_masked = x.gather(-1, whole) == -INF
    assert (chosen_masked.sort(-1).values == chosen_masked).all()
    for row, mask in zip(whole, chosen_masked, strict=True):
        assert (row[mask].diff() > 0).all()  # equal values in the order of their indices
    assert (whole[-1] == torch.arange(33)).all()


@backends
@pytest.mark.parametrize("k", [None, 1, 4])
def test_rows_without_anything_to_choose(backend, k):
    for value in (-INF, NAN):
        index, log_prob = tw.gumbel_argmax(torch.full((3, 4), value), k, seed=1, log_prob=True)
        expected = torch.zeros(3, 1) if k is None else torch.arange(k).expand(3, k)
        assert torch.equal(index.view(3, -1), expected.long()) and log_prob.isnan().all()


@backends
def test_nan_never_wins(backend):
    x = normal(200, 5).float()[:40]
    x[:, 2] = NAN
    assert (tw.gumbel_argmax(x, seed=1) != 2).all()
    assert (tw.gumbel_argmax(x, 4, seed=1) != 2).all()
    x[:, 3] = INF
    assert (tw.gumbel_argmax(x, seed=1) == 3).all()


@backends
def test_shapes(backend):
    x = normal(2, 3, 5).float()
    for dim, size in ((0, 2), (1, 3), (2, 5), (-1, 5)):
        rest = [s for i, s in enumerate(x.shape) if i != dim % 3]
        assert list(tw.gumbel_argmax(x, dim=dim, seed=1).shape) == rest
        for k in (1, size):
            shape = list(x.shape)
            shape[dim] = k
            assert list(tw.gumbel_argmax(x, k, dim, seed=1).shape) == shape
    assert tw.gumbel_argmax(x[0, 0], seed=1).shape == ()
    assert tw.gumbel_argmax(x[:0], seed=1).shape == (0, 3)
    assert tw.gumbel_argmax(x[:0], 2, seed=1).shape == (0, 3, 2)
    assert tw.gumbel_argmax(x[..., :0], dim=0, seed=1).shape == (3, 0)


@pytest.mark.parametrize("backend, name", cases.in_backends("typical", "4d-dim1", "4d-strided"),
                         indirect=["backend"])
@pytest.mark.parametrize("start", [0, 2**32 - 2, -3])
def test_parts_of_a_batch_are_the_whole(backend, name, start):
    case = BY_NAME[name]
    x = case.logits(torch.float32)
    whole, log_prob = tw.gumbel_argmax(x, 2, case.dim, 9, start, log_prob=True)
    rows = x.movedim(case.dim, -1).flatten(0, -2)  # (rows, K)
    parts = [tw.gumbel_argmax(row, 2, -1, 9, start + i, log_prob=True)
             for i, row in enumerate(rows.split(1))]
    for ours, theirs in zip(zip(*parts, strict=True), (whole, log_prob), strict=True):
        assert torch.equal(torch.cat(ours), theirs.movedim(case.dim, -1).flatten(0, -2))


@backends
def test_seeds(backend):
    x = torch.zeros(8, 1000)
    first = tw.gumbel_argmax(x, seed=7)
    assert torch.equal(tw.gumbel_argmax(x, seed=torch.tensor([7])), first)
    for seed in (8, -7, 7 + 2**32, -(2**63)):
        assert (tw.gumbel_argmax(x, seed=seed) != first).sum() >= 6
    torch.manual_seed(3)
    first, second = tw.gumbel_argmax(x), tw.gumbel_argmax(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(tw.gumbel_argmax(x), first) and torch.equal(tw.gumbel_argmax(x), second)


def log_prob_gradients(function, x, index, dim):
    """First and second derivatives of a weighted sum of log-probabilities."""
    x = x.detach().requires_grad_()
    value = function(x)
    weights = normal(*index.shape, seed=4).to(value.dtype)
    first, = torch.autograd.grad((value * weights).sum(), x, create_graph=True)
    second, = torch.autograd.grad(first.square().sum(), x)
    return first.detach(), second


@pytest.mark.parametrize("backend, dtype", cases.in_backends(*cases.DTYPES),
                         indirect=["backend"], ids=str)
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("name", ["typical", "offset-up", "masked", "4d-dim1"])
def test_gradients_of_the_log_probabilities(backend, name, k, dtype):
    case = BY_NAME[name]
    x = case.logits(dtype)

    def ours(x):
        return tw.gumbel_argmax(x, k, log_prob=True, **case.sampling)[1]

    index = tw.gumbel_argmax(x, k, **case.sampling)

    def exact(x):
        chosen = index.unsqueeze(case.dim) if k is None else index
        return torch.log_softmax(x, case.dim).gather(case.dim, chosen).view(index.shape)

    results = log_prob_gradients(ours, x, index, case.dim)
    truth = log_prob_gradients(exact, x.double(), index, case.dim)
    for value, expected in zip(results, truth, strict=True):
        assert value.dtype == dtype
        size = float(expected.abs().max())
        rounding = 8 * max(torch.finfo(dtype).eps, 1.2e-7)
        torch.testing.assert_close(value.double(), expected, rtol=rounding, atol=rounding * size)


@cases.exact_backends
def test_gradcheck(backend):
    def log_prob(x):
        return tw.gumbel_argmax(x, 2, dim=0, seed=5, log_prob=True)[1]

    x = normal(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(log_prob, x)
    assert torch.autograd.gradgradcheck(log_prob, x)


@backends
def test_indices_have_no_gradient(backend):
    x = normal(4, 9).float().requires_grad_()
    assert not tw.gumbel_argmax(x, seed=1).requires_grad
    index, log_prob = tw.gumbel_argmax(x, seed=1, log_prob=True)
    assert log_prob.requires_grad and not index.requires_grad
    with torch.no_grad():
        assert not tw.gumbel_argmax(x, seed=1, log_prob=True)[1].requires_grad
