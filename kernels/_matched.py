"""Means of the candidates that have a query's id in Triton: ids are compared, nothing is sorted.

A program has one query. What matches is rare, so features are read where ids were found alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common

STEP = 2048  # candidates whose ids are compared at a time
ELEMENTS = 1024  # of the features that are then read at a time
WIDEST = 1024  # columns of these


@triton.jit
def sum_of_matches(
    same, mine, begin, ids_ptr, keys_ptr, queue_ptr, keys, candidates, col, depth,
    keys_stride, queue_stride, STEP: tl.constexpr, PIECE: tl.constexpr,
):
    """(COLS,) float32 sums of the candidates begin to begin + STEP - 1 that are the `same`."""
    sums = tl.zeros(col.shape, tl.float32)
    inside = (col < depth)[None, :]
    j = begin + tl.arange(0, STEP)
    at = tl.min(tl.where(same, j, candidates))
    while at < candidates:
        first = at // PIECE * PIECE
        i = first + tl.arange(0, PIECE)
        hit = (tl.load(ids_ptr + i, mask=i < candidates, other=0) == mine) & (i < candidates)
        row = i[:, None].to(tl.int64)
        keep = (hit & (i < keys))[:, None] & inside
        at_keys = row * keys_stride + col[None, :]
        x = tl.load(keys_ptr + at_keys, mask=keep, other=0.0).to(tl.float32)
        if queue_ptr is not None:
            keep = (hit & (i >= keys))[:, None] & inside
            at_queue = (row - keys) * queue_stride + col[None, :]
            x += tl.load(queue_ptr + at_queue, mask=keep, other=0.0).to(tl.float32)
        sums += tl.sum(x, 0)
        at = tl.min(tl.where(same & (j >= first + PIECE), j, candidates))
    return sums


@triton.jit(do_not_specialize=["keys", "candidates"])
def match_rows(
    query_ids_ptr, candidate_ids_ptr,  # (rows,), (candidates,) int64
    keys_ptr, queue_ptr,  # (keys, depth), (candidates - keys, depth), unit stride in a row; or None
    mean_ptr, count_ptr,  # out: (rows, depth) float32, (rows,) int64
    keys, candidates, depth, keys_stride, queue_stride,
    STEP: tl.constexpr, PIECE: tl.constexpr, COLS: tl.constexpr,
):
    """Of one query and COLS columns, the mean of the candidates that have its id; their number.

    Candidates are added in their order, those of STEP to a sum of their own.
    """
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mine = tl.load(query_ids_ptr + row)
    count = 0
    sums = tl.zeros((COLS,), tl.float32)
    for begin in range(0, candidates, STEP):
        j = begin + tl.arange(0, STEP)
        ids = tl.load(candidate_ids_ptr + j, mask=j < candidates, other=0)
        same = (ids == mine) & (j < candidates)
        found = tl.sum(same.to(tl.int32))
        if found > 0:
            count += found
            sums += sum_of_matches(
                same, mine, begin, candidate_ids_ptr, keys_ptr, queue_ptr, keys, candidates, col,
                depth, keys_stride, queue_stride, STEP, PIECE,
            )
    mean = tl.div_rn(sums, tl.maximum(count, 1).to(tl.float32))
    tl.store(mean_ptr + row * depth + col, mean, mask=col < depth)
    if tl.program_id(1) == 0:
        tl.store(count_ptr + row, count.to(tl.int64))


def matched_by_ids(
    keys: Tensor, queue: Tensor | None, query_ids: Tensor, candidate_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Of each query, the mean of the keys and then the queue's rows that have its id.

    Args:
        keys: (K, D), float16, bfloat16 or float32, any strides.
        queue: (Q, D), the same; or None.
        query_ids, candidate_ids: int64 (B,) and (K + Q,).

    Returns:
        mean (B, D) float32, 0 where nothing matches; count (B,) int64. Equal bits on every run.

    Cost: B * (K + Q) comparisons, and of each query the traffic of what matches; one launch.
    """
    with _common.launching(keys=keys) as arch:
        rows, depth = len(query_ids), keys.shape[1]
        mean = keys.new_empty(rows, depth, dtype=torch.float32)
        count = query_ids.new_empty(rows)
        if rows:
            keys = keys if keys.stride(1) == 1 else keys.contiguous()
            if queue is not None and queue.stride(1) != 1:
                queue = queue.contiguous()
            cols = min(triton.next_power_of_2(max(depth, 16)), WIDEST)
            match_rows[(rows, max(triton.cdiv(depth, cols), 1))](
                query_ids.contiguous(), candidate_ids.contiguous(), keys, queue, mean, count,
                len(keys), len(candidate_ids), depth, keys.stride(0),
                0 if queue is None else queue.stride(0),
                STEP=STEP, PIECE=ELEMENTS // cols, COLS=cols,
                # Left alone, ptxas spills a register of some to save others.
                **({"maxnreg": 128} if arch.startswith("sm_") else {}),
            )
        return mean, count
