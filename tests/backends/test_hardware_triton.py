"""What hardware does otherwise than the interpreter: cut products, approximate functions."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import tilewise as tw
from tests.backends.adapters import ADAPTERS
from tests.backends.contrast_adapters import CONTRASTS, NEGATIVES
from tests.backends.test_nearest_code_triton import BY_NAME, bounds_of, errors, exact_scores, search
from tests.common.random_cases import CASES
from tests.ops import test_gaussian_sample, test_gumbel_softmax
from tests.ops.test_nearest_code import METRICS
from tests.triton_tools.approximations import ERRORS, approximate, wrong_by
from tests.triton_tools.matrix_units import UNITS, multiplying, product
from tilewise.kernels import _philox

HALF, SINGLE = torch.bfloat16, torch.float32
every_unit = pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)


# Matrix units


@every_unit
def test_units_cut_what_is_far_below_the_largest_product(unit):
    """Products of a step are aligned: of 2^-bits beside 1 all is kept, of half as much nothing."""
    ones, nothing = np.ones((unit.terms, 1)), np.zeros((1, 1))
    for more, kept in ((0, 1), (1, 0)):
        a = np.full((1, unit.terms), 2.0 ** -(unit.bits + more))
        a[0, 0] = 1
        exact = 1 + kept * (unit.terms - 1) * 2.0**-unit.bits
        rounded = np.float32(exact) if unit.apart else np.trunc(exact * 2**23) / 2**23
        assert product(unit, a, ones, nothing) == rounded


# By unit: 1 + 3 * 2^-25 and 1 - 3 * 2^-25, accumulators with one product.
SUMS = {
    "V100": (1, 1),  # the product is cut to 0
    "A100, Ada": (1, 1 - 2.0**-24),  # to 2^-24; and the sum towards 0
    "H100, B200": (1, 1 - 2.0**-23),  # the sum alone is cut
    "MI300": (1 + 2.0**-23, 1 - 2.0**-23),  # the sum is rounded to nearest even
}


@pytest.mark.parametrize("name", UNITS)
def test_units_round_sums_each_in_its_way(name):
    one = np.ones((1, 1))
    found = [product(UNITS[name], sign * 3 * 2.0**-25 * one, one, one)[0, 0] for sign in (1, -1)]
    assert tuple(found) == SUMS[name]


def factors(kind, n, d):
    """Rows and codes (n, d) as the filter packs them: float16, the largest near 2^15."""
    generator = np.random.default_rng(0)
    z, w = (generator.standard_normal((n, d)) for _ in range(2))
    if kind == "positive":
        z, w = abs(z) + 0.5, abs(w) + 0.5
    elif kind == "negative":
        z, w = abs(z) + 0.5, -abs(w) - 0.5
    elif kind == "one large term first":
        z, w = 1 + generator.random((n, d)), 2.0**-12 * (1 + generator.random((n, d)))
        w[:, 0] = 2.0**6
    elif kind == "wide":
        z, w = (x * 2.0 ** generator.integers(-12, 3, (n, d)) for x in (z, w))
    elif kind == "cancelling":
        z[:, d // 2 :], w[:, d // 2 :] = z[:, : d // 2], -w[:, : d // 2]
    for x in (z, w):
        x *= 2.0 ** (14 - np.floor(np.log2(abs(x).max(1, keepdims=True))))
        x[abs(x) < 2.0**-14] = 0
    return (x.astype(np.float16).astype(np.float64) for x in (z, w))


KINDS = ["normal", "positive", "negative", "one large term first", "wide", "cancelling"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [32, 1024])
@every_unit
def test_units_lose_less_than_the_filter_allows(unit, depth, kind):
    """`A` of _nearest_code_filter allows depth 2^-22 |z| |w|; a quarter of it is never used."""
    z, w = factors(kind, 16, depth)
    lost = abs(product(unit, z, w.T, np.zeros((16, 16))) - z @ w.T)
    bound = depth * 2.0**-22 * np.linalg.norm(z, axis=1)[:, None] * np.linalg.norm(w, axis=1)
    assert (lost <= 0.76 * bound).all()
    assert lost.max() > 0 or kind == "one large term first"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["integers", "one_cluster", "scales", "neighbouring_floats"])
@every_unit
def test_bounds_of_nearest_code_hold(unit, name, metric):
    x, codes = BY_NAME[name].tensors()
    with multiplying(unit):
        least, margin, s, t, m, group = bounds_of(x, codes, metric)
        found = search(x, codes, metric)
    exact = exact_scores(x, codes, metric, s, t, m)
    assert (errors(least, exact, group) <= margin).all()
    assert torch.equal(found.index, tw.reference.nearest_code(x, codes, metric).index)


@every_unit
@pytest.mark.parametrize("contrast", CONTRASTS.values(), ids=CONTRASTS)
def test_losses_keep_their_budgets(contrast, unit):
    problem = contrast.make(40, 50, 64)
    with multiplying(unit):
        contrast.check(problem, HALF)


# Approximate functions


def test_approximations_are_as_wrong_as_they_may_be():
    x = torch.rand(1000).numpy() + 0.5
    for error in ERRORS.values():
        off = wrong_by(error, x).astype(np.float64) / x - 1
        assert 0.99 * error < abs(off).max() <= error + 2.0**-24 and off.min() < 0 < off.max()


@pytest.mark.parametrize("contrast", CONTRASTS.values(), ids=CONTRASTS)
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_losses_keep_their_budgets_with_approximate_functions(contrast, dtype):
    with approximate() as used:
        for problem in contrast.chunked[:2]:
            contrast.check(problem, dtype)
    assert used or contrast is NEGATIVES


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gumbel_softmax_keeps_its_budget(case, hard):
    with tw.backend("triton"), approximate() as used:
        test_gumbel_softmax.check(case, SINGLE, hard)
    assert used == {"create_exp2"} or not case.logits(SINGLE).numel()


@pytest.mark.parametrize("mean, logvar", test_gaussian_sample.EXTREMES)
def test_gaussian_sample_keeps_its_budget(mean, logvar):
    normal = test_gaussian_sample.normal
    a, b = (
        (at + by * normal(4, 33, seed=i)).float() for i, (at, by) in enumerate((mean, logvar))
    )
    with tw.backend("triton"), approximate() as used:
        test_gaussian_sample.check(a, b)
    assert used == {"create_exp2"}


# Equal bits everywhere


@triton.jit
def store_variates(seed_ptr, gumbel_ptr, normal_ptr, N: tl.constexpr):
    row, seed = tl.arange(0, N).to(tl.int64), tl.load(seed_ptr)
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(gumbel_ptr + at, _philox.gumbel_tile(seed, row, 0, N))
    tl.store(normal_ptr + at, _philox.normal_tile(seed, row, 0, N))


def variates():
    out = torch.empty(2, 64, 64)
    store_variates[(1,)](torch.tensor(5), *out, N=64)
    return out


def test_variates_are_made_of_exact_operations_alone():
    """So that they have the same bits on every GPU, whatever its approximate functions."""
    expected = variates()
    with approximate() as used:
        assert torch.equal(variates(), expected)
    assert not used


def test_indices_of_samples_do_not_depend_on_approximate_functions():
    adapter = next(a for a in ADAPTERS if a.op == "gumbel_argmax")
    tensors = adapter.problem(SINGLE)
    expected = adapter.run(tensors)
    with approximate() as used:
        found = adapter.run(tensors)
    assert used == {"create_exp2"}  # of log-probabilities
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs) or ours.is_floating_point()
