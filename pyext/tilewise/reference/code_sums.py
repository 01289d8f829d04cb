"""Counts and sums of the rows that share a code, by index_add in float64."""

import torch
from torch import Tensor

from tilewise.reference._precision import exact_dtype, no_autocast


def code_sums(
    x: Tensor, index: Tensor, num_codes: int, heads: bool = False
) -> tuple[Tensor, Tensor]:
    """What `tilewise.code_sums` computes; arguments and results are the same."""
    with no_autocast(x):
        rows = x.to(exact_dtype(x)).reshape(len(x) if heads else 1, -1, x.shape[-1])  # (H, N, D)
        h, _, d = rows.shape
        # One more code takes the rows that are left out, which keeps shapes fixed.
        codes = torch.where(index < 0, num_codes, index).reshape(h, -1)
        codes = (codes + (num_codes + 1) * torch.arange(h, device=x.device)[:, None]).flatten()
        counts = torch.zeros(h * (num_codes + 1), dtype=torch.long, device=x.device)
        counts = counts.index_add(0, codes, torch.ones_like(codes))
        sums = rows.new_zeros(h * (num_codes + 1), d).index_add(0, codes, rows.reshape(-1, d))
        counts = counts.reshape(h, -1)[:, :num_codes]  # (H, K)
        sums = sums.reshape(h, -1, d)[:, :num_codes]  # (H, K, D)
        sums = sums.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        return (counts, sums) if heads else (counts[0], sums[0])
