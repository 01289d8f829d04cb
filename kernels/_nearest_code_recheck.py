"""nearest_code: what the filter leaves over, first in float32, then as the contract wants it."""

import triton
import triton.language as tl

from tilewise.kernels._nearest_code_exact import (
    distance,
    empty_lists,
    from_key,
    insert,
    insert_all,
    lane_sum,
    store_lists,
    store_share,
    to_key,
)
from tilewise.kernels._nearest_code_filter import BOUNDS, LIMITS, first_code

FEW = tl.constexpr(2)


@triton.jit
def estimate(
    x_ptr,  # (ROWS, 1)
    code_ptr,  # (ROWS, SIZE)
    keep,  # (ROWS, SIZE)
    x_norm, code_norm,  # (ROWS, 1), (ROWS, SIZE) float32; not for l2
    dim, sum_error, underflow,
    METRIC: tl.constexpr, WIDTH: tl.constexpr,
):
    """Bounds (ROWS, SIZE) of distances, in float32; infinite where a sum overflows or is NaN.

    The error of a sum of D terms is at most `sum_error` = (D + 32) 2^-23 of their absolute values,
    twice what D + 32 roundings of 2^-24 can add up to: D + 4 here, and some for norms, bounds and
    the float64 distance itself. `underflow` = D 2^-126. The terms of a product add up to no more
    than |x| |c|.
    """
    ROWS: tl.constexpr = code_ptr.shape[0]
    SIZE: tl.constexpr = code_ptr.shape[1]
    sums = tl.zeros((ROWS, SIZE, WIDTH), tl.float32)
    for d in range(0, dim, WIDTH):
        col = (d + tl.arange(0, WIDTH))[None, None, :]
        here = keep[:, :, None] & (col < dim)
        x = tl.load(x_ptr[:, :, None] + col, mask=col < dim, other=0.0).to(tl.float32)
        c = tl.load(code_ptr[:, :, None] + col, mask=here, other=0.0).to(tl.float32)
        if METRIC == "l2":
            sums = tl.fma(x - c, x - c, sums)
        else:
            sums = tl.fma(x, c, sums)
    value = tl.sum(sums, 2)
    if METRIC == "l2":
        error = value * sum_error + underflow
    elif METRIC == "dot":
        error = x_norm * code_norm * sum_error + underflow
        value = -value
    else:
        # A norm of 0 leads to NaN here, one that is infinite in float32 to 0 (or NaN). Where the
        # scale is subnormal its error is up to 2^-150, that of a finite sum times it 2^-22.
        scale = (1.0 / x_norm) * (1.0 / code_norm)
        error = tl.where(scale > 0, scale * underflow + sum_error, float("inf"))
        value = 1.0 - value * scale
    known = (tl.abs(value) < float("inf")) & (error < float("inf"))
    return (
        tl.where(known, value - error, float("-inf")),
        tl.where(known, value + error, float("inf")),
    )


@triton.jit
def upper_float32(x):
    """A float32 that is not below the float64 x, unless that is NaN or -inf: then NaN."""
    y = x.to(tl.float32)
    return y + (tl.abs(y) * 2.0**-22 + 2.0**-126)


@triton.jit
def search_group(
    keys, codes,  # the lists so far
    x_ptr,  # (ROWS, 1)
    base_ptr, norm_ptr,  # of the head's codebook and norms
    first, here,  # (ROWS,): the first code of a group, and whether to look into it
    x_norm,  # (ROWS,)
    count, dim, code_stride, sum_error, underflow,
    METRIC: tl.constexpr, TOPK: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Puts into the lists what belongs there of a group of codes, another one for each row."""
    member = tl.arange(0, SIZE)[None, :]
    code = first[:, None] + STEP * member
    todo = here[:, None] & (code < count)
    code_ptr = base_ptr + code.to(tl.int64) * code_stride
    code_norm = tl.zeros(code.shape, tl.float64)
    if METRIC != "l2":
        code_norm = tl.load(norm_ptr + code, mask=todo, other=0.0)
    lower, upper = estimate(
        x_ptr, code_ptr, todo, x_norm[:, None].to(tl.float32), code_norm.to(tl.float32),
        dim, sum_error, underflow, METRIC, WIDTH,
    )
    limit = upper_float32(from_key(tl.max(keys, 1)))  # NaN while the list is not full
    if TOPK == 1:
        best = tl.min(tl.where(todo, upper, float("inf")), 1)
        limit = tl.where(limit < best, limit, best)
    todo = todo & ~(lower > limit[:, None])
    most = tl.max(tl.sum(todo.to(tl.int32), 1))
    if most > FEW:  # float32 does not help: all at once
        sums = lane_sum(
            x_ptr[:, :, None], here[:, None, None], code_ptr[:, :, None], todo[:, :, None],
            dim, METRIC,
        )
        sums = tl.reshape(sums, (code.shape[0], SIZE))
        key = to_key(distance(sums, x_norm[:, None], code_norm, METRIC))
        keys, codes = insert_all(keys, codes, key, code, todo, TOPK)
    else:  # one for each row at a time: a group's float64 distances cost SIZE times as much
        for _ in range(most):
            pick = tl.min(tl.where(todo, member, SIZE), 1)
            this = pick < SIZE
            one = first + STEP * pick
            sums = lane_sum(
                x_ptr, this[:, None], base_ptr + one[:, None].to(tl.int64) * code_stride,
                this[:, None], dim, METRIC,
            )
            one_norm = x_norm
            if METRIC == "cosine":
                one_norm = tl.load(norm_ptr + one, mask=this, other=0.0)
            key = to_key(distance(sums, x_norm, one_norm, METRIC))
            keys, codes = insert(keys, codes, key, one, this)
            todo = todo & (member != pick[:, None])
    return keys, codes


@triton.jit
def score_bounds(minima_ptr, bounds, limits_ptr, group, groups):
    """Bounds (ROWS, GROUPS) of the scores of each row and group; infinite outside of `groups`."""
    real = (group < groups)[None, :]
    beta, a, b, c = bounds
    p = tl.load(limits_ptr + group[None, :], mask=real, other=0.0)
    q = tl.load(limits_ptr + groups + group[None, :], mask=real, other=0.0)
    t = tl.load(limits_ptr + 2 * groups + group[None, :], mask=real, other=0.0)
    least = tl.load(minima_ptr + group[None, :], mask=real, other=float("inf"))
    margin = tl.fma(a[:, None], p, tl.fma(b[:, None], q, tl.fma(beta[:, None], t, c[:, None])))
    upper = least + margin
    # NaN: infinite bounds cancelled.
    return least - margin, tl.where(upper < float("inf"), upper, float("inf"))


# Sizes are not specialised on: every batch runs the same binary.
@triton.jit(
    do_not_specialize=["rows", "padded", "codes", "groups", "share", "mask_stride", "out_stride"]
)
def recheck(
    x_ptr,  # (H, rows, dim), unit stride in a row
    code_ptr,  # (H, codes, dim), the same
    mask_ptr,  # (H, rows) uint8, if HAS_MASK
    x_norm_ptr,  # (H, padded) float64, unless l2
    norm_ptr,  # (H, codes) float64
    bias_ptr,  # (H, groups * SIZE) float32: not finite where the code is not
    minima_ptr,  # (H, padded, groups) float32
    bounds_ptr,  # (H, BOUNDS, padded) float32
    limits_ptr,  # (H, LIMITS, groups) float32
    index_ptr, distance_ptr,  # out: (H, rows, TOPK) int64 and float32; None: lists of shares
    key_ptr, nearest_ptr,  # out: what `merge_lists` takes; or None
    left_ptr,  # out: (H, rows, shares) uint8: 1 where `brute` is to do the row
    rows, padded, codes, groups, share,  # groups of a program
    dim,
    x_head_stride, x_stride, code_head_stride, code_stride, mask_stride, out_stride,
    sum_error, underflow,
    METRIC: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, HAS_MASK: tl.constexpr,
    TILE_N: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):
    """The nearest codes of ROWS rows, out of a share's groups that the bounds leave over.

    In a share without a finite upper bound all groups are searched, but for infinite lower bounds:
    where another share has a finite upper one these groups hold nothing, and where none has the
    row is left to `brute`.
    """
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    wanted = inside
    if HAS_MASK:
        wanted = tl.load(mask_ptr + head * mask_stride + row, mask=inside, other=0) != 0
    x_ptr += head * x_head_stride + tl.where(inside, row, 0)[:, None].to(tl.int64) * x_stride
    code_ptr += head * code_head_stride
    groups = tl.multiple_of(groups, TILE_N // SIZE)  # so that loads can be wide
    norm_ptr += head * codes
    bounds_ptr += head * BOUNDS * padded + row
    limits_ptr += head * LIMITS * groups
    minima_ptr += (head * padded + row[:, None]) * groups
    c = tl.load(bounds_ptr + 3 * padded)
    unknown = wanted & (c == float("-inf"))  # all distances are NaN
    wanted = wanted & ~unknown
    bounds = (
        tl.load(bounds_ptr), tl.load(bounds_ptr + padded), tl.load(bounds_ptr + 2 * padded),
        tl.where(unknown, float("inf"), c),
    )

    # TOPK groups have an upper bound of `limit` or less, so TOPK codes have such a distance. Groups
    # are taken in GROUPS classes, so the limit of a list of several may be a little too high.
    least = tl.full((ROWS, GROUPS), float("inf"), tl.float32)
    begin = tl.program_id(2) * share
    end = min(begin + share, groups)  # but for the last, a multiple of GROUPS
    for g in range(begin, end, GROUPS):
        group = g + tl.arange(0, GROUPS)
        lower, upper = score_bounds(minima_ptr, bounds, limits_ptr, group, groups)
        least = tl.minimum(least, upper)
    limit = tl.min(least, 1)
    for _ in range(1, TOPK):
        least = tl.where(least <= limit[:, None], float("inf"), least)
        limit = tl.min(least, 1)
    found = wanted & (limit < float("inf"))
    left = (wanted & ~found).to(tl.uint8)
    at = (head * rows + row) * tl.num_programs(2) + tl.program_id(2)
    tl.store(left_ptr + at, left, mask=inside)
    searched = found
    if index_ptr is None:
        searched = wanted & (c < float("inf"))

    x_norm = tl.zeros((ROWS,), tl.float64)
    every = searched
    if METRIC != "l2":
        # All codes are equally far from a row of zeros, unless they are not finite.
        x_norm = tl.load(x_norm_ptr + head * padded + row)
        slot = tl.arange(0, SLOTS)
        bias = tl.load(bias_ptr + head * groups * SIZE + slot, mask=slot < TOPK, other=0.0)
        broken = tl.sum((bias == float("inf")).to(tl.int32))
        every = searched & (tl.where(x_norm > 0, 1, broken) > 0)

    keys, nearest = empty_lists(ROWS, SLOTS, TOPK)
    for g in range(begin, end, GROUPS):
        group = g + tl.arange(0, GROUPS)
        lower, upper = score_bounds(minima_ptr, bounds, limits_ptr, group, groups)
        early = first_code(group, TILE_N, SIZE) < TOPK
        todo = searched[:, None] & (group < groups)[None, :] & ~(lower > limit[:, None])
        if index_ptr is None:
            todo = todo & (lower != float("inf"))
        todo = todo & (every[:, None] | early[None, :])
        more = tl.max(todo.to(tl.int32))
        while more > 0:
            pick = tl.min(tl.where(todo, group[None, :], groups), 1)
            todo = todo & (group[None, :] != pick[:, None])
            keys, nearest = search_group(
                keys, nearest, x_ptr, code_ptr, norm_ptr,
                first_code(pick, TILE_N, SIZE), pick < groups, x_norm,
                codes, dim, code_stride, sum_error, underflow,
                METRIC, TOPK, SIZE, TILE_N // SIZE, WIDTH,
            )
            more = tl.max(todo.to(tl.int32))
    place = tl.arange(0, SLOTS)[None, :]
    first = unknown[:, None] & (place < TOPK) & (tl.program_id(2) == 0)
    nan = to_key(tl.full((1, 1), float("nan"), tl.float64))
    keys, nearest = tl.where(first, nan, keys), tl.where(first, place, nearest)
    if index_ptr is None:
        store_share(keys, nearest, key_ptr, nearest_ptr, head, row, inside, rows, TOPK)
    else:
        out = head * out_stride + row[:, None].to(tl.int64) * TOPK
        known = found | unknown
        store_lists(keys, nearest, index_ptr + out, distance_ptr + out, known, inside, TOPK)
