"""Of each query, the mean of the candidates that match (B, D), and how many do (B,) int64."""

import torch
from torch import Tensor

from tilewise import _backend
from tilewise.ops._register import define
from tilewise.ops.code_sums import code_sums
from tilewise.reference._precision import accumulate_dtype

COMPARED = 1 << 28  # so many pairs of ids a kernel of Triton compares sooner than it sorts them


def matched_by_offset(
    keys: Tensor, queue: Tensor | None, offset: int, rows: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Query i matches candidate i + offset, if there is one; means of `dtype`, else of float32."""
    dtype = accumulate_dtype(keys) if dtype is None else dtype
    if 0 <= offset <= len(keys) - rows:  # as nearly always: nothing to fill, every launch counts
        mean = keys[offset : offset + rows].to(dtype).contiguous()
        return mean, keys.new_ones(rows, dtype=torch.int64)
    mean = keys.new_zeros((rows, keys.shape[1]), dtype=dtype)
    count = keys.new_zeros(rows, dtype=torch.int64)
    for part in (keys, queue):
        if part is not None:
            first, end = max(-offset, 0), min(len(part) - offset, rows)  # of the queries
            if first < end:
                mean[first:end] = part[first + offset : end + offset]
                count[first:end] = 1
            offset -= len(part)
    return mean, count


def matched_by_ids(
    keys: Tensor, queue: Tensor | None, query_ids: Tensor, candidate_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Equal ids match; means of float32, or float64."""
    kernel = _backend.triton_operator("matched_by_ids", keys.device, keys.dtype)
    if kernel is not None and len(query_ids) * len(candidate_ids) <= COMPARED:
        return kernel(keys, queue, query_ids, candidate_ids)
    return _matched_by_sorting(keys, queue, query_ids, candidate_ids)


def _matched_by_sorting(
    keys: Tensor, queue: Tensor | None, query_ids: Tensor, candidate_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Equal ids are a codebook of the queries' ids, whose rows `code_sums` adds."""
    query_ids, candidate_ids = query_ids.contiguous(), candidate_ids.contiguous()
    known = query_ids.sort().values
    group = torch.searchsorted(known, candidate_ids)  # the first of equals
    rows = len(query_ids)
    found = known.new_zeros(len(candidate_ids), dtype=torch.bool)
    if rows:
        found = known[group.clamp(max=rows - 1)] == candidate_ids
    group = group.masked_fill(~found, -1)  # matches no query
    count, total = code_sums(keys, group[: len(keys)], rows)
    if queue is not None:
        more, rest = code_sums(queue, group[len(keys) :], rows)
        count, total = count + more, total + rest
    mean = total / count.clamp(min=1).unsqueeze(1)
    own = torch.searchsorted(known, query_ids)
    return mean[own], count[own]


def _fake(keys, queue, query_ids, candidate_ids):
    mean = keys.new_empty((len(query_ids), keys.shape[1]), dtype=accumulate_dtype(keys))
    return mean, query_ids.new_empty(len(query_ids))


define(
    "matched_by_ids",
    "(Tensor keys, Tensor? queue, Tensor query_ids, Tensor candidate_ids) "
    "-> (Tensor mean, Tensor count)",
    _fake,
    module="_matched",
)
