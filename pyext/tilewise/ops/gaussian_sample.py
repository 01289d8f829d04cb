"""Reparameterised Gaussian samples and their divergence from N(0, 1), in one pass."""

import math

import torch
from torch import Tensor

from tilewise import _backend, reference
from tilewise.ops import _arguments
from tilewise.ops._register import register
from tilewise.reference._precision import accumulate_dtype
from tilewise.reference.gaussian_sample import GaussianSample


def gaussian_sample(
    mean: Tensor,
    logvar: Tensor,
    seed: Tensor | int | None = None,
    row_offset: int = 0,
    *,
    logvar_range: tuple[float, float] | None = None,
) -> GaussianSample:
    r"""A sample of N(mean, exp(logvar)) that gradients pass through, and the divergence.

        z = mean + exp(logvar / 2) * e,    e standard normal
        kl_i = sum over the elements of row i of (mean^2 + exp(logvar) - 1 - logvar) / 2,

    the Kullback-Leibler divergence of the row's distribution from N(0, 1).

    The noise e is float32 whatever the dtype, and never stored: the backward pass makes it again.

    Args:
        mean: (B, ...), float16, bfloat16, float32 or float64. A row is what the first dimension
            counts.
        logvar: log of the variance; same dtype and device, a shape that broadcasts with mean's.
        seed: an int or an int64 tensor of one element; equal seeds give equal samples. None draws
            one from torch's default generator, which `torch.manual_seed` governs.
        row_offset: the number of the first row: parts of a batch, each with its offset, get the
            noise that the whole would get.
        logvar_range: (lowest, highest): logvar is clamped to it first. Diffusion autoencoders take
            (-30, 20).

    Returns:
        (z, kl): z as `mean`, kl (B,) float32 (float64 for float64), a sum over all dimensions but
        the first.

    Differentiable in `mean` and `logvar`, any number of times. Autocast changes nothing.

    Cost: one reading of each input, one writing of z; the backward pass keeps the inputs alone.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, named in the text.
        RuntimeError: inside a torch.func transform.

    Paper: Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014.
    """
    _check(mean, logvar)
    low, high = _range(logvar_range)
    row_offset = _arguments.row_offset(row_offset)
    seed = _arguments.seed(seed, mean.device)

    op = _backend.operator("gaussian_sample", mean.device, mean.dtype)
    if op is None:
        return reference.gaussian_sample(
            mean, logvar, seed, row_offset, logvar_range=logvar_range
        )
    if mean.shape != logvar.shape:
        mean, logvar = torch.broadcast_tensors(mean, logvar)
    return GaussianSample(*op(mean, logvar, seed, row_offset, low, high))


def _check(mean: Tensor, logvar: Tensor) -> None:
    _arguments.check_floating("mean", mean)
    _arguments.check_floating("logvar", logvar)
    if logvar.dtype != mean.dtype:
        raise TypeError(f"logvar: expected {mean.dtype} like mean, got {logvar.dtype}")
    if logvar.device != mean.device:
        raise ValueError(f"logvar: expected on {mean.device} like mean, got {logvar.device}")
    if mean.dim() == 0:
        raise ValueError("mean: expected (B, ...), got ()")
    try:
        if mean.shape != logvar.shape:
            torch.broadcast_shapes(mean.shape, logvar.shape)
    except RuntimeError:
        raise ValueError(
            f"logvar: expected to broadcast with {tuple(mean.shape)}, got {tuple(logvar.shape)}"
        ) from None


def _range(logvar_range: tuple[float, float] | None) -> tuple[float, float]:
    if logvar_range is None:
        return -math.inf, math.inf
    try:
        low, high = map(float, logvar_range)
    except (TypeError, ValueError):
        raise TypeError(f"logvar_range: expected two floats, got {logvar_range!r}") from None
    if not low <= high:
        raise ValueError(f"logvar_range: expected (lowest, highest), got {logvar_range}")
    return low, high


def _fake(mean, logvar, seed, row_offset, low, high):
    dtype = accumulate_dtype(mean)
    return (
        torch.empty_like(mean, memory_format=torch.contiguous_format),
        mean.new_empty(mean.shape[0], dtype=dtype),
    )


def _gradients(ops, d_z, d_kl, mean, logvar, seed, row_offset, low, high):
    """The gradients by mean and logvar, of differentiable operations."""
    wide = accumulate_dtype(mean)
    m, v = mean.to(wide), logvar.to(wide).clamp(low, high)
    d_mean, d_logvar = torch.zeros_like(m), torch.zeros_like(m)
    if d_z is not None:
        zero = torch.zeros_like(mean, memory_format=torch.contiguous_format)
        noise, _ = ops.gaussian_sample(zero, zero, seed, row_offset, -math.inf, math.inf)
        d_mean = d_mean + d_z
        d_logvar = d_logvar + d_z * noise * torch.exp(v / 2) / 2
    if d_kl is not None:
        d_kl = d_kl.view(-1, *(1,) * (mean.dim() - 1))
        d_mean = d_mean + d_kl * m
        d_logvar = d_logvar + d_kl * torch.expm1(v) / 2
    outside = (logvar < low) | (logvar > high)
    return d_mean.to(mean.dtype), d_logvar.masked_fill(outside, 0.0).to(mean.dtype)


def _fake_backward(d_z, d_kl, mean, logvar, seed, row_offset, low, high):
    empty = torch.empty_like(mean, memory_format=torch.contiguous_format)
    return empty, torch.empty_like(empty)


register(
    "gaussian_sample",
    "(Tensor mean, Tensor logvar, Tensor seed, SymInt row_offset, float low, float high) "
    "-> (Tensor z, Tensor kl)",
    _fake,
    "(Tensor? d_z, Tensor? d_kl, Tensor mean, Tensor logvar, Tensor seed, SymInt row_offset, "
    "float low, float high) -> (Tensor d_mean, Tensor d_logvar)",
    _gradients,
    _fake_backward,
)
