"""Counts and sums of the rows that share a code, by index_add in float64."""

from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.reference._precision import accumulate_dtype, exact_dtype, no_autocast
from tilewise.reference._shapes import flat, rows


class CodeSums(NamedTuple):
    """How many rows each code has, and their sum; see `tilewise.code_sums`."""

    counts: Tensor
    sums: Tensor


def code_sums(
    x: Tensor, index: Tensor, num_codes: int, per_head: bool = False
) -> CodeSums:
    """What `tilewise.code_sums` computes; arguments and results are the same."""
    with no_autocast(x):
        x_rows = rows(x.to(exact_dtype(x)), len(x) if per_head else 1)  # (H, N, D)
        h, _, d = x_rows.shape
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            if (index >= num_codes).any():
                raise ValueError(
                    f"index: expected less than num_codes = {num_codes}, got {int(index.max())}"
                )
        # One more code takes the rows that are left out, which keeps shapes fixed.
        out = (index < 0) | (index >= num_codes)
        codes = flat(torch.where(out, num_codes, index), h)
        codes = (codes + (num_codes + 1) * torch.arange(h, device=x.device)[:, None]).flatten()
        counts = torch.zeros(h * (num_codes + 1), dtype=torch.long, device=x.device)
        counts = counts.index_add(0, codes, torch.ones_like(codes))
        sums = x_rows.new_zeros(h * (num_codes + 1), d).index_add(0, codes, x_rows.flatten(0, 1))
        counts = flat(counts, h)[:, :num_codes]  # (H, K)
        sums = rows(sums, h)[:, :num_codes]  # (H, K, D)
        sums = sums.to(accumulate_dtype(x))
        return CodeSums(counts, sums) if per_head else CodeSums(counts[0], sums[0])
