"""Gumbel-softmax as its equation says it."""

import torch
from torch import Tensor

from tilewise import _numbers
from tilewise.reference import _philox
from tilewise.reference._precision import exact_dtype, no_autocast


def gumbel_softmax(
    logits: Tensor,
    tau: Tensor | float = 1.0,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    seed: Tensor | int | None = None,
    row_offset: int = 0,
) -> Tensor:
    """What `tilewise.gumbel_softmax` computes; arguments and result are the same.

    Cost: a dozen matrices of the size of the logits, in int64 and float64.
    """
    with no_autocast(logits):
        z = perturbed(logits, dim, seed, row_offset)  # (..., K)
        tau = torch.as_tensor(tau, device=z.device).to(z.dtype).reshape(())
        soft = _softmax(z, torch.where(tau == 0, 1, tau))
        if z.shape[-1] == 0:
            return soft.to(logits.dtype).movedim(-1, dim)
        hot = torch.zeros_like(z).scatter(-1, z.argmax(-1, keepdim=True), 1.0)
        soft = torch.where(tau == 0, hot + 0 * soft, soft)  # 0 * soft: rows of NaN stay NaN
        result = hot + (soft - soft.detach()) if hard else soft
        return result.to(logits.dtype).movedim(-1, dim)


def _softmax(z: Tensor, tau: Tensor) -> Tensor:
    """softmax(z / tau) over the last dimension, for every tau > 0, and its gradients."""
    if z.shape[-1] == 0:
        return z / tau  # empty, and a function of both
    masked = z == -torch.inf
    shifted = (z - z.amax(-1, keepdim=True).detach()).masked_fill(masked, 0.0)
    shifted = (shifted / tau).masked_fill(masked, -torch.inf)
    return torch.softmax(shifted, dim=-1)


def perturbed(
    logits: Tensor, dim: int, seed: Tensor | int | None, row_offset: int
) -> Tensor:
    """Logits plus Gumbel noise, in float64, `dim` moved last."""
    x = logits.to(exact_dtype(logits)).movedim(dim, -1)
    rows = x.numel() // max(x.shape[-1], 1)
    noise = _philox.gumbel(_numbers.seed(seed, x.device), rows, x.shape[-1], row_offset)
    return x + noise.view(x.shape)
