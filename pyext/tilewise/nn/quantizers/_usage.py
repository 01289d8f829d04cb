"""How a batch used the codes of a codebook."""

from typing import NamedTuple

import torch
from torch import Tensor


class CodeUsage(NamedTuple):
    """How a batch used the codes; for H separate codebooks with a dimension H in front.

    counts: (K) int64, rows of this process that chose each code.
    perplexity: () float32, exp(-sum_k p_k log p_k): how many codes seem to be in use, 1 to K.
    used: () float32, the fraction of codes that were chosen at all.
    """

    counts: Tensor
    perplexity: Tensor
    used: Tensor

    @classmethod
    def of(cls, counts: Tensor) -> "CodeUsage":
        """That of counts (K), or (H, K)."""
        p = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        entropy = -torch.xlogy(p, p).sum(-1)
        return cls(counts, entropy.exp(), (counts > 0).float().mean(-1))


def count_codes(index: Tensor, size: int) -> Tensor:
    """How often each of `size` codes occurs in index, whatever its shape; negative ones do not."""
    index = torch.where(index < 0, size, index).reshape(-1)
    return index.new_zeros(size + 1).index_add(0, index, torch.ones_like(index))[:size]
