"""Counts and sums of the rows of each code in Triton, without atomics and without a one-hot matrix.

The rows are sorted by code. A code's rows are cut into parts of PART rows, so that a code with most
of the rows does not keep one program busy while the others wait; parts are summed, then the parts
of each code. Every sum has an order that depends on sizes alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common

PART = 256  # rows


class Blocks(NamedTuple):
    """What one program works on."""

    segments: int
    rows: int  # at a time
    cols: int
    warps: int


BLOCKS = Blocks(1, 16, 128, 4)
INTERPRETER_BLOCKS = Blocks(32, 4, 32, 1)


# Sizes are not specialised on: every batch runs the same binary.
@triton.jit(do_not_specialize=["segments", "codes", "rows"])
def segment_sums(
    x_ptr,  # rows of unit stride: (H, rows, dim) if ORDER, else (stored rows, dim)
    order_ptr,  # int64: which row stands at each position, counted through all heads, if ORDER
    start_ptr,  # (segments of the last axis + 1,) int64: where the positions of each begin
    part_ptr,  # (segments,) int64: the code that a part belongs to, if ORDER
    first_ptr,  # (H * codes + 1,) int64: the first part of each code, if ORDER
    sums_ptr,  # out: (segments, dim) float32
    segments, codes, rows, dim, head_stride, row_stride,
    ORDER: tl.constexpr, PART: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Sums of consecutive positions: of the parts of codes if ORDER, else of codes, over parts."""
    segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    real = segment < segments
    code = segment.to(tl.int64)
    if ORDER:  # the last ones may be unused: they have the code after the last, which is empty
        code = tl.load(part_ptr + segment, mask=real, other=0)
    first = tl.load(start_ptr + code, mask=real, other=0)
    last = tl.load(start_ptr + code + 1, mask=real, other=0)
    head = code * 0
    if ORDER:
        head = code // tl.maximum(codes, 1)
        first += PART * (segment - tl.load(first_ptr + code, mask=real, other=0))
        last = tl.minimum(last, first + PART)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = col < dim
    sums = tl.zeros((SEGMENTS, ROWS, COLS), tl.float32)
    for step in range(0, tl.max(last - first), ROWS):
        at = first[:, None] + step + tl.arange(0, ROWS)[None, :]
        keep = at < last[:, None]
        row = at
        if ORDER:
            row = tl.load(order_ptr + at, mask=keep, other=0) - head[:, None] * rows
        ptr = x_ptr + head[:, None] * head_stride + row * row_stride
        x = tl.load(
            ptr[:, :, None] + col[None, None, :],
            mask=keep[:, :, None] & inside[None, None, :], other=0.0,
        )
        sums += x.to(tl.float32)
    out = segment[:, None].to(tl.int64) * dim + col[None, :]
    tl.store(sums_ptr + out, tl.sum(sums, 1), mask=real[:, None] & inside[None, :])


class Sorted(NamedTuple):
    """Rows in the order of their codes; codes of all heads are numbered through, 0 to H * K - 1."""

    order: Tensor  # (H * N,) int64: rows, of all heads too; those without a code come last
    start: Tensor  # (H * K + 2,) int64: each code's first position, and an empty code at the end
    first_part: Tensor  # (H * K + 1,) int64
    part_code: Tensor  # (parts,) int64, as many as there could be: the host does not know


def sort_rows(index: Tensor, num_codes: int) -> Sorted:
    """Sorts rows by index (H, N); a stable sort, so that rows of a code keep their order."""
    heads, rows = index.shape
    codes = heads * num_codes
    dtype = torch.int32 if codes < 2**31 else torch.int64
    head = torch.arange(heads, device=index.device)[:, None]
    valid = (index >= 0) & (index < num_codes)
    key = torch.where(valid, index + head * num_codes, codes).to(dtype).flatten()
    key, order = key.sort(stable=True)
    every = torch.arange(codes + 1, dtype=dtype, device=index.device)
    start = torch.searchsorted(key, every)
    first_part = torch.zeros_like(start)
    first_part[1:] = ((start.diff() + (PART - 1)) // PART).cumsum(0)
    most = heads * rows // PART + min(heads * rows, codes)  # each code can have a part not full
    part = torch.arange(most, device=index.device)
    part_code = torch.searchsorted(first_part[1:], part, right=True)
    return Sorted(order, torch.cat([start, start[-1:]]), first_part, part_code)


def launch(
    x: Tensor, strides: tuple[int, int], sizes: tuple[int, int, int], start: Tensor,
    order: Tensor | None, part_code: Tensor | None, first_part: Tensor | None, sums: Tensor,
    blocks: Blocks,
) -> None:
    codes, rows, dim = sizes
    cols = min(blocks.cols, max(triton.next_power_of_2(dim), 16))
    segment_sums[(triton.cdiv(len(sums), blocks.segments), triton.cdiv(dim, cols))](
        x, order, start, part_code, first_part, sums, len(sums), codes, rows, dim, *strides,
        ORDER=order is not None, PART=PART, SEGMENTS=blocks.segments, ROWS=blocks.rows, COLS=cols,
        num_warps=blocks.warps,
    )


def _code_sums(x: Tensor, index: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    heads, rows, dim = x.shape
    codes = heads * num_codes
    if codes == 0 or rows == 0 or dim == 0:
        counts = torch.zeros(heads, num_codes, dtype=torch.int64, device=x.device)
        if codes and rows:
            counts = sort_rows(index, num_codes).start[:-1].diff().view(heads, num_codes)
        return counts, x.new_zeros(heads, num_codes, dim, dtype=torch.float32)
    x = x if x.stride(2) == 1 else x.contiguous()
    arch = _common.architecture(x.device)
    blocks = INTERPRETER_BLOCKS if arch == "interpreter" else BLOCKS
    by_code = sort_rows(index, num_codes)
    parts = x.new_empty(len(by_code.part_code), dim, dtype=torch.float32)
    sizes = num_codes, rows, dim
    launch(
        x, (x.stride(0) if heads > 1 else 0, x.stride(1)), sizes, by_code.start,
        by_code.order, by_code.part_code, by_code.first_part, parts, blocks,
    )
    sums = x.new_empty(codes, dim, dtype=torch.float32)
    launch(parts, (0, dim), sizes, by_code.first_part, None, None, None, sums, blocks)
    counts = by_code.start[:-1].diff()
    return counts.view(heads, num_codes), sums.view(heads, num_codes, dim)


def code_sums(x: Tensor, index: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts and sums of the rows of each code, without a host sync.

    Args:
        x: (H, N, D), float16, bfloat16 or float32, any strides.
        index: (H, N) int64. Rows whose index is negative, or num_codes or more, are left out.
        num_codes: K.

    Returns:
        counts (H, K) int64, sums (H, K, D) float32. Equal bits on every run.

    Cost: traffic of x once and of the sums three times; memory of the sums, once or twice, and 24
    bytes for each row.
    """
    with _common.launching(x=x):
        return _code_sums(x, index, num_codes)
