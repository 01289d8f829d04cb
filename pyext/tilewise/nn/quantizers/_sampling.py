"""Random rows of a batch, of any process, without looking at a value on the host."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.nn import _sync


def by_head(x: Tensor, heads: int) -> Tensor:
    """(M, ...), row m of codebook m mod H, as (H, N, ...), contiguous."""
    return x.reshape(x.shape[0] // heads, heads, *x.shape[1:]).transpose(0, 1).contiguous()


class Wanted(NamedTuple):
    """Codes of a codebook that a row is to be drawn for."""

    rows: Tensor  # (M, D)
    valid: Tensor  # (M) bool
    codes: Tensor  # (H, K) bool


class Sample(NamedTuple):
    """Rows for codes of a codebook."""

    rows: Tensor  # (H, K, D), 0 where there is none
    found: Tensor  # (H, K, 1) bool
    total: Tensor  # (H), how many valid rows all processes have


def sample_rows(wanted: Sequence[Wanted], sync: bool, repeat: bool = False) -> list[Sample]:
    """For each codebook a random valid row, of any process, for each wanted code; no row twice.

    However many codebooks there are, processes exchange twice.

    Args:
        wanted: of each codebook.
        sync: whether processes share the codebooks.
        repeat: whether rows serve twice where there are fewer than codes; else these codes
            get none.
    """
    valid = [by_head(one.valid, len(one.codes)) for one in wanted]  # (H, N) each
    heads = [len(one.codes) for one in wanted]
    count = torch.cat([x.sum(-1) for x in valid])
    draws = torch.randint(2**62, (2, len(count)), device=count.device)
    total, first, draws = _sync.number_rows(count, draws, sync)
    numbers = zip(total.split(heads), first.split(heads), draws.split(heads, 1), strict=True)
    samples = []
    for one, here, (total, first, draws) in zip(wanted, valid, numbers, strict=True):
        place = systematic_sample(one.codes, total.unsqueeze(-1), draws.unsqueeze(-1), repeat)
        found = (place >= 0).unsqueeze(-1)
        rows = _rows_at(one.rows, here, place - first.unsqueeze(-1))
        samples.append(Sample(torch.where(found, rows, 0.0), found, total))
    summed = _sync.summed([sample.rows for sample in samples], sync)
    return [sample._replace(rows=x) for sample, x in zip(samples, summed, strict=True)]


def _rows_at(rows: Tensor, valid: Tensor, position: Tensor) -> Tensor:
    """The valid rows number `position` (H, K), 0 where this process has no such row."""
    h, n = valid.shape
    if n == 0:
        return rows.new_zeros(*position.shape, rows.shape[-1])
    order = valid.cumsum(-1)  # (H, N): how many valid rows there are up to each
    here = (position >= 0) & (position < order[:, -1:])
    row = torch.searchsorted(order, (position + 1).contiguous()).clamp(max=n - 1)  # (H, K)
    row = row * h + torch.arange(h, device=rows.device).unsqueeze(1)
    samples = rows.index_select(0, row.reshape(-1)).unflatten(0, position.shape)
    return torch.where(here.unsqueeze(-1), samples, 0.0)


def systematic_sample(wanted: Tensor, total: Tensor, draws: Tensor, repeat: bool) -> Tensor:
    """Different places among `total`, evenly spread from a random start, one for each wanted code.

    Args:
        wanted: (H, K) bool.
        total: (H, 1) int64, how many there are to choose from.
        draws: (2, H, 1) int64, random.
        repeat: whether places serve twice where there are fewer than codes.

    Returns:
        (H, K) int64, -1 for codes that get none.
    """
    number = wanted.sum(-1, keepdim=True)  # (H, 1)
    turn = (wanted.cumsum(-1) - 1 + draws[0] % number.clamp(min=1)) % number.clamp(min=1)  # (H, K)
    chosen = number if repeat else torch.minimum(number, total)
    start = draws[1] % total.clamp(min=1)
    place = (turn * total + start) // chosen.clamp(min=1)
    return torch.where(wanted & (turn < chosen) & (total > 0), place, -1)
