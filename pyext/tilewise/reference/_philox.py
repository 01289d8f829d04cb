"""The random stream of every backend: Philox4x32-10, and the variates that are made of its words.

A word depends on the seed, its row and column, and the op that asks, on nothing else: Salmon et
al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
"""

import math

import torch
from torch import Tensor

GUMBEL, GAUSSIAN, NEGATIVE_TEXTS, NEGATIVE_IMAGES = 0, 1, 2, 3  # last word of the counter

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW = 2**32 - 1


def philox4x32(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Four random words for each counter of four words and key of two, all int64 below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p, q = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # the sign bit is one of the 64
        c0, c1, c2, c3 = (q >> 32 & _LOW) ^ c1 ^ k0, q & _LOW, (p >> 32 & _LOW) ^ c3 ^ k1, p & _LOW
        k0, k1 = k0 + _KEY_STEPS[0] & _LOW, k1 + _KEY_STEPS[1] & _LOW
    return [c0, c1, c2, c3]


def words(seed: Tensor, rows: int, cols: int, row_offset: int, op: int) -> Tensor:
    """The stream's words for rows row_offset, row_offset + 1, ...: (rows, cols)."""
    row = torch.arange(rows, device=seed.device)[:, None] + row_offset
    call = torch.arange(-(-cols // 4), device=seed.device)[None, :]  # makes four columns
    row, call = torch.broadcast_tensors(row, call)
    counter = [call, row & _LOW, row >> 32 & _LOW, torch.full_like(row, op)]
    block = philox4x32(counter, [seed & _LOW, seed >> 32 & _LOW])
    return torch.stack(block, dim=-1).flatten(1)[:, :cols]


def uniform(words: Tensor) -> Tensor:
    """Float32 in [2^-33, 1 - 2^-24]: never 0 or 1, and dense near 0."""
    return (words.float() * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24)


def gumbel(seed: Tensor, rows: int, cols: int, row_offset: int, op: int = GUMBEL) -> Tensor:
    """Standard Gumbel variates, float32 rounded from float64: (rows, cols)."""
    u = uniform(words(seed, rows, cols, row_offset, op)).double()
    # An exponential variate that is dense near 0, so that its -log is dense where it is large.
    return -torch.log(-torch.log1p(-u)).float()


def gaussian(seed: Tensor, rows: int, cols: int, row_offset: int) -> Tensor:
    """Standard normal variates by Box and Muller, two of each two words, rounded likewise."""
    pairs = words(seed, rows, -(-cols // 2) * 2, row_offset, GAUSSIAN).unflatten(1, (-1, 2))
    first, second = uniform(pairs).double().unbind(-1)
    radius, angle = torch.sqrt(-2 * torch.log(first)), 2 * math.pi * second
    both = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return both.flatten(1)[:, :cols].float()
