"""The Triton backend of gaussian_sample, in the interpreter: what no other op promises."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.triton_tools.checker import checked
from tilewise.kernels import _philox
from tilewise.kernels import gaussian_sample as kernels
from tilewise.reference import _philox as reference

INF, NAN = float("inf"), float("nan")
SEED = torch.tensor(-5)


def sample(mean, logvar, row_offset=0, low=-INF, high=INF):
    return kernels.gaussian_sample(mean, logvar, SEED, row_offset, low, high)


def gradients(d_z, d_kl, mean, logvar, row_offset=0, low=-INF, high=INF):
    return kernels.gaussian_sample_backward(
        d_z, d_kl, mean, logvar, SEED, row_offset, low, high
    )


def noise(rows, cols, row_offset=0):
    zero = torch.zeros(rows, cols)
    return sample(zero, zero, row_offset)[0]


@triton.jit
def store_normal(word_ptr, turn_ptr, out_ptr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    words = tl.load(word_ptr + at).to(tl.uint32), tl.load(turn_ptr + at).to(tl.uint32)
    a, b = _philox.normal_pair(words[0], words[1])
    tl.store(out_ptr + 2 * at, a)
    tl.store(out_ptr + 2 * at + 1, b)


@pytest.mark.parametrize("words", ["all", "smallest", "largest"])
def test_noise_is_exact_to_a_few_ulps(words):
    count = 2**17
    step = torch.arange(count)
    turn = step * (2**32 // count)  # quarter turns and their halves among them
    words = {
        "all": (step * 2654435769) % 2**32, "smallest": step, "largest": 2**32 - 1 - step,
    }[words]
    ours = torch.empty(count, 2)
    store_normal[(2,)](words, turn, ours, N=count // 2)
    radius = torch.sqrt(-2 * torch.log(reference.uniform(words).double()))
    angle = 2 * math.pi * reference.uniform(turn).double()
    exact = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 1)
    assert ((ours.double() - exact).abs() <= 3e-7 * radius[:, None]).all()


@pytest.mark.parametrize("row_offset", [0, -2, 2**32 - 1, -(2**63), 2**62 + 5])
@pytest.mark.parametrize("cols", [1, 2, 3, 7, 33])
def test_noise_is_the_reference_s(cols, row_offset):
    expected = reference.gaussian(SEED, 5, cols, row_offset)
    torch.testing.assert_close(noise(5, cols, row_offset), expected, rtol=3e-7, atol=1e-6)


def test_bits_depend_on_no_tile(monkeypatch):
    """Noise and samples; divergences are sums, in another order."""
    mean, logvar, d_z = torch.randn(3, 3, 45)
    z, kl = sample(mean, logvar, 4)
    expected = gradients(d_z, kl, mean, logvar, 4)
    monkeypatch.setattr(kernels, "USUAL", 16)
    again = sample(mean, logvar, 4)
    assert torch.equal(again[0], z)
    torch.testing.assert_close(again[1], kl, rtol=1e-6, atol=0)
    assert all(map(torch.equal, gradients(d_z, kl, mean, logvar, 4), expected))
    assert torch.equal(sample(mean[1:], logvar[1:], 5)[0], z[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 3, 17), (4,)], ids=str)
def test_memory_accesses(monkeypatch, shape, dtype):
    monkeypatch.setattr(kernels, "USUAL", 32)
    mean = torch.randn(*shape, 2).to(dtype)[..., 0]
    logvar = torch.randn(shape[-1:] if len(shape) > 1 else 1).to(dtype).expand(shape)
    d_z, d_kl = torch.randn(()).to(dtype).expand(shape), torch.randn(()).expand(shape[0])
    with checked({kernels.sample_tile: ["z_ptr", "kl_ptr"]}) as launches:
        sample(mean, logvar)
    outputs = ["d_mean_ptr", "d_logvar_ptr"]
    with checked({kernels.differentiate_tile: outputs}) as backward:
        gradients(d_z, d_kl, mean, logvar)
        gradients(None, d_kl, mean, logvar)
        gradients(d_z, None, mean, logvar)
    assert len(launches) == 1 and len(backward) == 3


@pytest.mark.parametrize("kind", ["small", "large", "half"])
def test_divergence_has_all_its_digits(kind):
    """exp(v) - 1 - v loses them where v is small, and is larger than float32 where it is large."""
    logvar = {
        "small": torch.logspace(-20, 0, 200) * torch.tensor([1.0, -1.0]).repeat(100),
        "large": torch.linspace(-100, 88, 200),
        "half": torch.linspace(-1.5, 1.5, 200),
    }[kind][:, None]
    _, kl = sample(torch.zeros_like(logvar), logvar)
    v = logvar.double()
    exact = torch.where(v.abs() < 1e-5, v**2 / 2 + v**3 / 6, torch.expm1(v) - v) / 2
    torch.testing.assert_close(kl.double(), exact[:, 0], rtol=4e-7, atol=1e-38)


def test_standard_deviation_has_all_its_digits():
    logvar = torch.linspace(-170, 170, 2000)[:, None]
    mean = torch.zeros_like(logvar)
    z, _ = sample(mean, logvar)
    exact = torch.exp(logvar.double() / 2) * noise(2000, 1).double()
    torch.testing.assert_close(z.double(), exact, rtol=4e-7, atol=1e-44)


@pytest.mark.parametrize("low, high", [(0.1, 0.7), (-0.1, 0.1), (-1e39, 1e39), (0.0, 0.0)])
def test_bounds_are_those_of_float64(low, high):
    """A logvar that is the bound rounded to float32 may lie outside, and has no gradient then."""
    edges = [e for b in (low, high) for e in (np.float32(b), np.nextafter(np.float32(b), 9),
                                              np.nextafter(np.float32(b), -9))]
    logvar = torch.tensor(np.array(edges + [0.3, -0.3, 5], np.float32))[:, None]
    mean = torch.ones_like(logvar)
    _, d_logvar = gradients(mean, None, mean, logvar, low=low, high=high)
    outside = (logvar.double() < low) | (logvar.double() > high)
    usual = logvar.abs() < 50  # others have no gradient for another reason
    assert not d_logvar[outside].any() and torch.equal((d_logvar == 0)[usual], outside[usual])


def test_not_finite():
    mean = torch.tensor([0.0, NAN, INF, 0, 0, 0])[:, None]
    logvar = torch.tensor([0.0, 0, 0, NAN, INF, -INF])[:, None]
    z, kl = sample(mean, logvar)
    assert z[[0, 5]].isfinite().all() and z[[1, 3]].isnan().all() and z[[2, 4]].isinf().all()
    assert z[5] == 0 and kl[[1, 3, 4]].isnan().all() and kl[[2, 5]].isinf().all() and kl[0] == 0
    z, kl = sample(mean, logvar, low=-30.0, high=20.0)
    assert z[[4, 5]].isfinite().all() and kl[[4, 5]].isfinite().all() and z[3].isnan()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (2, 0, 4)], ids=str)
def test_nothing(shape):
    x = torch.zeros(shape)
    z, kl = sample(x, x)
    assert z.shape == shape and torch.equal(kl, torch.zeros(shape[0]))
    assert all(g.shape == shape for g in gradients(x, kl, x, x))
