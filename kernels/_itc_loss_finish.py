"""itc_loss between and after its passes: parts are merged, means become the loss and gradients.

Three small launches, and every sum has an order that depends on sizes alone.
"""

import triton
import triton.language as tl

from tilewise.kernels._contrast import LOWEST, of_scale, with_parts
from tilewise.kernels._finish import matched_rows, total

MERGED, PARTS = 32, 64  # rows of a program that merges parts, and parts at a time
FINISHED = 1024  # elements of d_query, or of sums, that a program has at a time: they are float64


@triton.jit(do_not_specialize=["rows", "parts", "padded"])
def merge_parts(
    parts_ptr,  # see `with_parts`
    scale_ptr,  # one float32
    state_ptr,  # out: (2, rows) float32, largest x and sums of exponentials
    rows, parts, padded,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):
    """Merges the parts of BLOCK rows, from the first to the last."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < rows
    _, rate = of_scale(tl.load(scale_ptr))
    none = tl.full((BLOCK,), LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    largest, exponentials = with_parts(
        none[0], none[1], parts_ptr, i, inside, padded, parts, rate, PARTS
    )
    tl.store(state_ptr + i, largest, mask=inside)
    tl.store(state_ptr + rows + i, exponentials, mask=inside)


@triton.jit
def sum_of_parts(parts_ptr, i, inside, padded, parts, PARTS: tl.constexpr):
    """(len(i),) float64 sums over the first axis of (parts, padded) float32; 1 where not inside."""
    sums = tl.zeros(i.shape, tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        at = part.to(tl.int64) * padded + i[None, :]
        x = tl.load(parts_ptr + at, mask=(part < parts) & inside[None, :], other=0.0)
        sums += tl.sum(x.to(tl.float64), 0)
    return tl.where(inside, sums, 1.0)


@triton.jit(do_not_specialize=["first", "rows", "all_rows", "student", "rest", "parts", "padded"])
def finish_queries(
    scale_ptr, alpha_ptr,  # one float32 each
    count_ptr,  # (all_rows,) int64: matches of each query of the call
    matched_ptr,  # (all_rows, depth): the mean of these, rows `matched_stride` apart
    features_ptr,  # the chunk's rows, of the teacher and then, from row `student` on, the student's
    state_ptr,  # (2, student + rows) float32: their largest x and sums of exponentials
    mean_ptr,  # (.., depth) float32: candidates times weights, and from `rest` on times their rests
    sums_ptr,  # (2, parts, padded) float32: parts of the sums of weights, of weight * (x - largest)
    d_query_ptr,  # out: (all_rows, depth) float32; or None
    terms_ptr,  # out: (2, all_rows) float64: what each query adds to the loss and to d_scale
    first, rows, all_rows,  # the chunk's first query and how many it has, of how many
    student, rest, parts, padded, depth, matched_stride, features_stride, mean_stride,
    TEACHER: tl.constexpr, SPLIT: tl.constexpr,  # weights of the teacher's rows have rests
    NEED_MEAN: tl.constexpr,  # the student's is there, for gradients
    EXPONENT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    PARTS: tl.constexpr,  # that are summed at a time
):
    """ROWS queries' terms of the loss and of d_scale, and their d_query.

    A mean is divided by the sum of what the weights were rounded to, so that rounding shifts
    weight between candidates and adds none: the mean of equal candidates is what they are, and
    where one has nearly all of the weight, the others' keep their digits.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i < rows
    scale = tl.load(scale_ptr).to(tl.float64)
    alpha = tl.load(alpha_ptr).to(tl.float64)
    sign = tl.where(scale < 0, -1.0, 1.0)
    has_match = tl.load(count_ptr + first + i, mask=inside, other=0) > 0
    matched = tl.maximum(matched_rows(count_ptr, all_rows), 1)
    weight = tl.where(has_match, 1.0 / matched.to(tl.float64), 0.0)
    if TEACHER:
        of_teacher = alpha / sum_of_parts(sums_ptr, i, inside, padded, parts, PARTS)
    if NEED_MEAN:
        own = student + i
        of_student = 1.0 / sum_of_parts(sums_ptr, own, inside, padded, parts, PARTS)
        moments_ptr = sums_ptr + padded.to(tl.int64) * parts
        moment = sum_of_parts(moments_ptr, own, inside, padded, parts, PARTS)
    dots = tl.zeros((ROWS,), tl.float64)
    row = i[:, None].to(tl.int64)
    for begin in range(0, depth, COLS):
        col = begin + tl.arange(0, COLS)[None, :]
        keep = inside[:, None] & (col < depth)
        at = (first + row) * matched_stride + col
        target = tl.load(matched_ptr + at, mask=keep, other=0.0).to(tl.float64)
        if TEACHER:
            at = row * mean_stride + col
            soft = tl.load(mean_ptr + at, mask=keep, other=0.0).to(tl.float64)
            if SPLIT:
                at += rest.to(tl.int64) * mean_stride
                soft += tl.load(mean_ptr + at, mask=keep, other=0.0)
            target = soft * of_teacher[:, None] + (1.0 - alpha) * target
        at = (student + row) * features_stride + col
        query = tl.load(features_ptr + at, mask=keep, other=0.0).to(tl.float64)
        dots += tl.sum(query * target, 1)
        if d_query_ptr is not None:
            at = (student + row) * mean_stride + col
            mean = tl.load(mean_ptr + at, mask=keep, other=0.0).to(tl.float64)
            gradient = (mean * of_student[:, None] - target) * (weight * scale)[:, None]
            at = (first + row) * depth + col
            tl.store(d_query_ptr + at, gradient.to(tl.float32), mask=keep)
    state_ptr += student + i
    largest = tl.load(state_ptr, mask=inside, other=0.0).to(tl.float64)
    exponentials = tl.load(state_ptr + student + rows, mask=inside, other=1.0).to(tl.float64)
    away = largest - sign * dots
    # A query without a match may be NaN, and is of no account.
    loss = tl.where(has_match, weight * (sign * scale * away + tl.log(exponentials)), 0.0)
    tl.store(terms_ptr + first + i, loss, mask=inside)
    if NEED_MEAN:
        of_weights: tl.constexpr = 2.0**-EXPONENT
        away += moment * of_weights / exponentials
        terms_ptr += all_rows
        tl.store(terms_ptr + first + i, sign * weight * away, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def finish_loss(
    terms_ptr,  # (2, rows) float64, as `finish_queries` leaves them
    loss_ptr, d_scale_ptr,  # out: one float32 each; or None
    rows,
):
    """The sums over all queries."""
    tl.store(loss_ptr, total(terms_ptr, rows, 1).to(tl.float32))
    if d_scale_ptr is not None:
        tl.store(d_scale_ptr, total(terms_ptr + rows, rows, 1).to(tl.float32))
