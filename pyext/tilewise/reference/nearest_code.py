"""Nearest code as the contract defines it: every distance in float64, in one fixed order."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise.reference._precision import exact_dtype, no_autocast
from tilewise.reference._shapes import rows

_CHUNK = 2**21  # distances at a time


class NearestCode(NamedTuple):
    """Which codes are nearest, and how far they are; see `tilewise.nearest_code`."""

    index: Tensor  # type: ignore[assignment]  # tuple.index, which nobody needs here
    distance: Tensor


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    metric: str = "l2",
    k: int | None = None,
    mask: Tensor | None = None,
) -> NearestCode:
    """What `tilewise.nearest_code` computes; arguments and results are the same.

    Cost: time O(N * K * D) in float64, memory O(K) times a fixed number of rows.
    """
    with no_autocast(x):
        count = k or 1
        codes = codebook.to(exact_dtype(codebook))
        if codes.dim() == 2:
            codes = codes.unsqueeze(0)  # (H, K, D)
        x_rows = rows(x.to(codes.dtype), len(codes))  # (H, N, D)
        index = _search(x_rows.detach(), codes.detach(), metric, count)  # (H, N, k)
        head = torch.arange(len(codes), device=x.device)[:, None, None]
        distance = _distance(x_rows.unsqueeze(2), codes[head, index], metric)  # (H, N, k)
        if mask is not None:
            drop = ~mask.expand(x.shape[:-1]).reshape(*index.shape[:2], 1)
            index, distance = index.masked_fill(drop, -1), distance.masked_fill(drop, 0.0)
        shape = x.shape[:-1] if k is None else (*x.shape[:-1], count)
        return NearestCode(index.reshape(shape), distance.reshape(shape).float())


def _search(x: Tensor, codes: Tensor, metric: str, k: int) -> Tensor:
    """The k nearest codes of each row, in order: (H, N, D), (H, K, D) -> (H, N, k)."""
    step = max(1, _CHUNK // max(1, codes.shape[0] * codes.shape[1]))
    chunks = [
        _first(_distance(chunk.unsqueeze(2), codes.unsqueeze(1), metric), k)
        for chunk in x.split(step, dim=1)
    ]
    if not chunks:
        return x.new_zeros(*x.shape[:2], k, dtype=torch.long)
    return torch.cat(chunks, dim=1)


def _first(distance: Tensor, k: int) -> Tensor:
    """The k smallest, the lowest index among equals, NaN after everything else."""
    if k > 1:
        return distance.sort(dim=-1, stable=True).indices[..., :k]
    nan = distance.isnan()
    best = distance.masked_fill(nan, float("inf")).argmin(-1, keepdim=True)
    # Where nothing is finite, a NaN may stand before the first infinity.
    return torch.where(nan.gather(-1, best), (~nan).long().argmax(-1, keepdim=True), best)


def _distance(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """Distances over the last dimension; the others broadcast."""
    if metric == "l2":
        return _lane_sum(lambda a, b: (a - b).square(), x, codes)
    dot = _lane_sum(torch.mul, x, codes)
    if metric == "dot":
        return -dot
    x_norm, code_norm = (_lane_sum(torch.mul, v, v) for v in (x, codes))
    zero = ((x_norm == 0) | (code_norm == 0)) & ~dot.isnan()
    # The square root of 0 has no gradient.
    x_norm, code_norm = (_sqrt(v.masked_fill(v == 0, 1)) for v in (x_norm, code_norm))
    return torch.where(zero, 1.0, 1 - dot / (x_norm * code_norm))


def _sqrt(x: Tensor) -> Tensor:
    """The square root, correctly rounded: torch's own on CPU may be the float next to it (MKL)."""
    root = x.sqrt()
    if x.device.type != "cpu" or torch._C._functorch.peek_interpreter_stack() is not None:
        return root  # inside a torch.func transform numpy sees no values
    exact = torch.from_numpy(np.sqrt(x.detach().numpy()))
    return torch.where(root == exact, root, root + (exact - root).detach())


def _lane_sum(term, a: Tensor, b: Tensor) -> Tensor:
    """Sum of term(a, b): element d goes to lane d mod 8, then the lanes are added in a tree."""
    pad = -a.shape[-1] % 8
    a, b = F.pad(a, (0, pad)), F.pad(b, (0, pad))
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    lanes = a.new_zeros(*shape, 8)
    for d in range(0, a.shape[-1], 8):
        lanes = lanes + term(a[..., d : d + 8], b[..., d : d + 8])
    four = lanes[..., :4] + lanes[..., 4:]
    two = four[..., :2] + four[..., 2:]
    return two[..., 0] + two[..., 1]
