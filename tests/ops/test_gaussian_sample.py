"""tilewise.gaussian_sample: every backend against float64, within the error of the eager lines."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilewise as tw
from tests.common import random_cases as cases
from tests.common.budget import assert_within_budget
from tests.common.random_cases import DTYPES, HALVES, INF, NAN, backends, kernels, normal
from tilewise.reference import _philox

backend = pytest.fixture(cases.serve)
DIFFUSERS = (-30.0, 20.0)


def noise_for(shape, seed, row_offset):
    """The reference's noise, float32, for means of a shape."""
    cols = torch.Size(shape[1:]).numel()
    return _philox.gaussian(torch.tensor(seed), shape[0], cols, row_offset).view(shape)


def outputs(function, mean, logvar, grads, **options):
    """Sample, divergence and the gradients of a weighted sum of both."""
    mean, logvar = (x.detach().requires_grad_() for x in (mean, logvar))
    z, kl = function(mean, logvar, **options)
    weights = [g.to(x.dtype) for g, x in zip(grads, (z, kl), strict=True)]
    d_mean, d_logvar = torch.autograd.grad((z, kl), (mean, logvar), weights)
    return {"z": z.detach(), "kl": kl.detach(), "d_mean": d_mean, "d_logvar": d_logvar}


def exactly(mean, logvar, noise, logvar_range=None):
    """The equations, where a variance of almost 1 loses nothing."""
    v = logvar if logvar_range is None else cases.clamped(logvar, *logvar_range)
    z = mean + torch.exp(v / 2) * noise
    terms = (mean.square() + torch.expm1(v) - v) / 2
    return z, cases.row_sums(terms.expand(z.shape))


def magnitudes(mean, logvar, noise, grads, logvar_range):
    """Size of each output: the sums of the terms' absolute values, with what roundings do."""
    v = logvar if logvar_range is None else logvar.clamp(*logvar_range)
    mean, v = torch.broadcast_tensors(mean.abs(), v)
    spread = torch.exp(v / 2) * (1 + noise.abs()) * (1 + v.abs() / 2)
    variance = v.exp() * (1 + v.abs()) + 1
    d_z, d_kl = (g.double().abs() for g in grads)
    d_kl = d_kl.view(-1, *(1,) * (noise.dim() - 1))
    terms = mean.square() + variance + v.abs()
    return {
        "z": cases.largest(mean + spread),
        "kl": cases.largest(cases.row_sums(terms) / 2),
        "d_mean": cases.largest(d_z + d_kl * mean),
        "d_logvar": cases.largest((d_z * spread + d_kl * variance) / 2),
    }


def check(mean, logvar, seed=5, row_offset=0, logvar_range=None, noise=None):
    dtype = mean.dtype
    shape = torch.broadcast_shapes(mean.shape, logvar.shape)
    noise = noise_for(shape, seed, row_offset) if noise is None else noise
    grads = normal(*shape, seed=3).to(dtype), normal(shape[0], seed=4).float()
    ours = outputs(tw.gaussian_sample, mean, logvar, grads, seed=seed, row_offset=row_offset,
                   logvar_range=logvar_range)
    assert ours["z"].dtype == ours["d_mean"].dtype == ours["d_logvar"].dtype == dtype
    assert ours["kl"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    options = dict(noise=noise, logvar_range=logvar_range)
    eager = outputs(cases.eager_gaussian_sample, mean, logvar, grads, **options)
    exact = mean.double(), logvar.double()
    truth = outputs(exactly, *exact, grads, **options)
    size = magnitudes(*exact, noise, grads, logvar_range)
    for name, x in (("d_mean", mean), ("d_logvar", logvar)):
        size[name] *= max(noise.numel() // max(x.numel(), 1), 1)  # a sum, where it was broadcast
    assert_within_budget(ours, eager, truth, size)


SHAPES = [(0, 5), (3, 0), (1, 1), (5,), (4, 33), (3, 1025), (2, 5000), (2, 3, 4, 5), (2, 7, 1)]


def served(shapes):
    return [(backend, dtype, shape) for backend in cases.BACKENDS for dtype in DTYPES
            for shape in shapes
            if dtype == torch.float32 or backend == "cpu" or shape == (4, 33)]


@pytest.mark.parametrize("backend, dtype, shape", served(SHAPES), indirect=["backend"], ids=str)
def test_within_error_budget(backend, dtype, shape):
    check(normal(*shape).to(dtype), normal(*shape, seed=1).to(dtype))


EXTREMES = [  # of mean and logvar: offset, and spread
    ((1e4, 1.0), (0.0, 1.0)), ((0.0, 1e-3), (0.0, 1e-3)), ((0.0, 1.0), (-40.0, 5.0)),
    ((0.0, 1.0), (20.0, 5.0)), ((-1e3, 100.0), (-80.0, 0.0)), ((0.0, 0.0), (0.0, 0.0)),
]


@backends
@pytest.mark.parametrize("mean, logvar", EXTREMES)
def test_within_error_budget_far_from_the_prior(backend, mean, logvar):
    a, b = ((at + by * normal(4, 33, seed=i)).float()
            for i, (at, by) in enumerate((mean, logvar)))
    check(a, b)


@cases.cpu_backends
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64(backend, shape):
    """Exact to float64 for the noise of the backend, which is the reference's but for ulps."""
    mean, logvar = normal(*shape), normal(*shape, seed=1)
    zero = torch.zeros_like(mean)
    noise, _ = tw.gaussian_sample(zero, zero, seed=5)
    torch.testing.assert_close(noise, noise_for(shape, 5, 0).double(), rtol=5e-7, atol=5e-7)
    check(mean, logvar, noise=noise)


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4), spread=st.floats(0, 4),
    dtype=st.sampled_from(DTYPES), clamp=st.none() | st.just((-1.0, 2.0)),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_random_problems(shape, spread, dtype, clamp, seed):
    if dtype == torch.float16:  # whose largest number is small
        spread /= 2
    mean, logvar = (spread * normal(*shape, seed=seed % 1000 + i) for i in (0, 1))
    check(mean.to(dtype), logvar.to(dtype), seed, seed // 2, clamp)


LAYOUTS = {
    "strided": cases.strided, "transposed": cases.transposed,
    "expanded": lambda x: x[:1].expand(x.shape), "column": lambda x: x[:, :1].expand(x.shape),
}


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend, layout):
    mean, logvar = (LAYOUTS[layout](normal(4, 3, 5, seed=i).float()) for i in (0, 1))
    ours = tw.gaussian_sample(mean, logvar, seed=3)
    expected = tw.gaussian_sample(mean.contiguous(), logvar.contiguous(), seed=3)
    assert all(map(torch.equal, ours, expected))
    check(mean, logvar)
    check(mean, logvar.contiguous())


@backends
@pytest.mark.parametrize("mean, logvar", [
    ((4, 3, 5), (5,)), ((4, 3, 5), (1, 3, 1)), ((4, 3, 5), ()), ((4, 3, 5), (4, 1, 1)),
    ((1, 5), (4, 5)), ((5,), (4, 5)), ((4, 1), (1, 5)),
], ids=str)
def test_broadcasting(backend, mean, logvar):
    """Gradients come in the shapes of what was given."""
    check(normal(*mean).float(), normal(*logvar, seed=1).float())


@backends
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_has_float32_noise(backend, dtype):
    """Rounded once, at the end; the divergence is not rounded at all."""
    mean, logvar = (normal(4, 33, seed=i).to(dtype) for i in (0, 1))
    z, kl = tw.gaussian_sample(mean, logvar, seed=5)
    expected, divergence = tw.gaussian_sample(mean.float(), logvar.float(), seed=5)
    assert torch.equal(z, expected.to(dtype)) and torch.equal(kl, divergence)


@pytest.mark.parametrize(
    "backend, bounds", cases.in_backends((-1.0, 0.5), DIFFUSERS, (0.25, 0.25), (-INF, 0.0)),
    indirect=["backend"], ids=str,
)
def test_clamp(backend, bounds):
    logvar = 3 * normal(4, 33, seed=1).float()
    logvar[0, :4] = torch.tensor([*bounds, -50.0, 50.0]).clamp(-60, 60)
    mean = normal(4, 33).float()
    check(mean, logvar, logvar_range=bounds)
    leaf = logvar.clone().requires_grad_()
    z, kl = tw.gaussian_sample(mean, leaf, seed=5, logvar_range=bounds)
    inside = tw.gaussian_sample(mean, logvar.clamp(*bounds), seed=5)
    assert torch.equal(z, inside[0]) and torch.equal(kl, inside[1])
    (z.sum() + kl.sum()).backward()
    outside = (logvar < bounds[0]) | (logvar > bounds[1])
    assert outside.any() and not leaf.grad[outside].any()
    assert leaf.grad[0, :2].any()  # at the bounds, whatever torch's clamp does


@backends
def test_divergence_of_the_prior_is_zero_and_never_negative(backend):
    zero = torch.zeros(3, 40)
    assert not tw.gaussian_sample(zero, zero, seed=1)[1].any()
    for size in (1e-8, 1e-4, 1e-2):
        kl = tw.gaussian_sample(zero, size * normal(3, 40).float(), seed=1)[1]
        exact = (size * normal(3, 40)).square().sum(1) / 4
        assert (kl >= 0).all()
        torch.testing.assert_close(kl.double(), exact, rtol=2 * size + 1e-5, atol=0)


@backends
def test_no_variance_gives_the_mean(backend):
    mean = normal(3, 40).float()
    z, kl = tw.gaussian_sample(mean, torch.full_like(mean, -INF), seed=1)
    assert torch.equal(z, mean) and (kl == INF).all()


@backends
def test_nan_stays_where_it_is(backend):
    mean, logvar = normal(4, 9).float(), normal(4, 9, seed=1).float()
    mean[1, 2], logvar[2, 5] = NAN, NAN
    z, kl = tw.gaussian_sample(mean, logvar, seed=1)
    assert torch.equal(z.isnan(), mean.isnan() | logvar.isnan())
    assert kl.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("backend, shape", cases.in_backends((6, 3, 7), (6, 33), (6,)),
                         indirect=["backend"],
                         ids=str)
@pytest.mark.parametrize("start", [0, 2**32 - 2, -3])
def test_parts_of_a_batch_are_the_whole(backend, shape, start):
    """Bit for bit, values and gradients."""
    mean, logvar = (normal(*shape, seed=i).float() for i in (0, 1))
    grads = normal(*shape, seed=3).float(), normal(6, seed=4).float()
    whole = outputs(tw.gaussian_sample, mean, logvar, grads, seed=9, row_offset=start)
    for size in (1, 4):
        parts = [
            outputs(tw.gaussian_sample, *pair[:2], pair[2:], seed=9, row_offset=start + size * i)
            for i, pair in enumerate(zip(*(x.split(size) for x in (mean, logvar, *grads)),
                                         strict=True))
        ]
        for name, value in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), value), name


@backends
def test_seeds(backend):
    mean, logvar = normal(3, 9).float(), normal(3, 9, seed=1).float()

    def sample(**options):
        return tw.gaussian_sample(mean, logvar, **options)[0]

    first = sample(seed=7)
    assert torch.equal(sample(seed=torch.tensor([7])), first)
    others = [sample(seed=s) for s in (8, -7, 7 + 2**32, 2**63 - 1)]
    others += [sample(seed=7, row_offset=r) for r in (1, 2**32, -1)]
    for i, z in enumerate(others):
        assert not any(torch.allclose(z, other) for other in [first, *others[:i]])
    torch.manual_seed(3)
    first, second = sample(), sample()
    assert not torch.allclose(first, second)
    torch.manual_seed(3)
    assert torch.equal(sample(), first) and torch.equal(sample(), second)


@kernels
def test_backward_keeps_its_inputs_only(backend):
    mean, logvar = (normal(40, 33, seed=i).float().requires_grad_() for i in (0, 1))
    saved = cases.Saved()
    with saved:
        tw.gaussian_sample(mean, logvar, seed=2)
    assert saved.tensors and saved.bytes_beyond(mean, logvar) <= 64


@backends
@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=str)
@pytest.mark.parametrize("output", [0, 1])
def test_only_the_gradients_asked_for(backend, needed, output):
    """Through the sample alone, or the divergence alone."""
    leaves = [normal(4, 9, seed=i).float().requires_grad_(n) for i, n in enumerate(needed)]
    tw.gaussian_sample(*leaves, seed=3)[output].sum().backward()
    whole = [normal(4, 9, seed=i).requires_grad_() for i in (0, 1)]
    with tw.backend("reference"):
        tw.gaussian_sample(*whole, seed=3)[output].sum().backward()
    for leaf, need, exact in zip(leaves, needed, whole, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def second_derivatives(mean, logvar, output, bounds):
    leaves = [x.detach().requires_grad_() for x in (mean, logvar)]
    value = tw.gaussian_sample(*leaves, seed=6, logvar_range=bounds)[output]
    weights = normal(*value.shape, seed=8).to(value.dtype)
    first = torch.autograd.grad((value * weights).sum(), leaves, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves,
                                         allow_unused=True, materialize_grads=True)]


@backends
@pytest.mark.parametrize("bounds", [None, (-1.0, 0.5)], ids=str)
@pytest.mark.parametrize("output", [0, 1])
def test_double_backward(backend, output, bounds):
    mean, logvar = normal(4, 9), normal(4, 9, seed=1)
    ours = second_derivatives(mean.float(), logvar.float(), output, bounds)
    with tw.backend("reference"):
        exact = second_derivatives(mean, logvar, output, bounds)
    for value, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=2e-6)


@cases.exact_backends
def test_gradcheck(backend):
    def sample(mean, logvar):
        return tw.gaussian_sample(mean, logvar, seed=5, logvar_range=(-1.0, 1.0))

    inputs = [normal(3, 4, seed=i).requires_grad_() for i in (0, 1)]
    assert torch.autograd.gradcheck(sample, inputs)
    assert torch.autograd.gradgradcheck(sample, inputs)


def test_reference_is_the_published_divergence():
    """kl of one row by torch.distributions."""
    mean, logvar = normal(3, 9), normal(3, 9, seed=1)
    law = torch.distributions.Normal(mean, torch.exp(logvar / 2))
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(law, prior).sum(1)
    torch.testing.assert_close(tw.reference.gaussian_sample(mean, logvar, seed=1)[1], expected)
