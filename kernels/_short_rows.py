"""Rows that one tile holds whole, whatever their width: each takes the pieces that it needs.

A tile is (ROWS, COLS): ROWS pieces of COLS columns, of which a row has a power of two. So few
binaries serve all widths, and noise, which is made for whole tiles, is thrown away as little as if
each power of two had a tile of its own. What the pieces of a row have in common is `of_rows`.
"""

from collections.abc import Iterable
from typing import NamedTuple

import triton
import triton.language as tl

from tilewise.kernels import _common, _philox, _rows

NARROW = 64  # columns up to which pieces have 4, and not 128
LONG = 4096  # from so many on a row is one piece
WHOLE = tl.constexpr(8192)  # columns of that


class Tile(NamedTuple):
    """How rows are cut, and how many programs take them."""

    rows: int  # pieces
    cols: int  # of one
    unit: int  # that the number of columns and strides of rows are multiples of: 16 or 1
    warps: int
    programs: int
    limit: dict[str, int]  # what keeps ptxas from taking more registers than two programs have

    def units(self, *sizes: int) -> list[int]:
        """What kernels take: they multiply by `unit`, and so know what is aligned."""
        return [n // self.unit for n in sizes]

    def constants(self) -> dict[str, int]:
        tile = {"ROWS": self.rows, "COLS": self.cols, "UNIT": self.unit, "num_warps": self.warps}
        return tile | self.limit


def choose_tile(rows: int, cols: int, strides: Iterable[int], arch: str) -> Tile | None:
    """For rows of `cols` columns, `strides` apart; None if they are too long."""
    # Kernels multiply by `unit` in 32 bits.
    aligned = all(n % 16 == 0 and n < 2**31 for n in (cols, *strides))
    if cols > (_rows.LONGEST if aligned else _rows.LONGEST // 2):
        return None
    whole = WHOLE.value, WHOLE.value
    width, elements = (4, 2048) if cols <= NARROW else (128, 4096) if cols <= LONG else whole
    warps = elements // 16 // _common.warp_size(arch)
    limit = {"maxnreg": 128} if arch.startswith("sm_") and elements == 4096 else {}
    if arch == "interpreter":  # which pays by the program
        elements = _rows.INTERPRETER_ELEMENTS
    pieces = triton.next_power_of_2(max(triton.cdiv(cols, width), 1))
    programs = triton.cdiv(rows, elements // width // pieces)
    unit = 16 if aligned and width > 4 else 1
    return Tile(elements // width, width, unit, warps, programs, limit)


@triton.jit
def place(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Of each piece its row, int64; which one of the row it is; how many columns it has, if any.

    (ROWS,) each. And the logarithm of how many pieces a row has.
    """
    shift = 0
    for i in tl.static_range(5):
        shift += (cols > COLS << i).to(tl.int32)
    slot = tl.arange(0, ROWS)
    owner, piece = slot >> shift, slot & ((1 << shift) - 1)
    row = tl.program_id(0).to(tl.int64) * (ROWS >> shift) + owner
    return row, piece, tl.where(row < rows, cols - piece * COLS, 0), shift


@triton.jit
def columns(at, COLS: tl.constexpr):
    """(ROWS, COLS) int32."""
    return at[1][:, None] * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def first_pieces(at):
    """(ROWS,): those that speak for a row that there is."""
    return (at[1] == 0) & (at[2] > 0)


@triton.jit
def pointers(ptr, at, row_stride, col_stride, COLS: tl.constexpr):
    """(ROWS, 1): where each piece begins."""
    first = at[1].to(tl.int64) * COLS
    return ptr + (at[0] * row_stride + first * col_stride)[:, None]


@triton.jit
def load(
    ptr, at, row_stride, col_stride, OTHER: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr,
):
    """(ROWS, COLS) float32, OTHER outside.

    Rows that are not aligned are loaded and stored as noise is made, four columns to a thread. Left
    alone, the compiler gives a thread a column of many rows, whose sums and addresses cost more.
    """
    ptr = pointers(ptr, at, row_stride, col_stride, COLS)
    left = at[2][:, None]
    if UNIT > 1:
        col = tl.arange(0, COLS)[None, :]
        x = tl.load(ptr + col.to(tl.int64) * col_stride, mask=col < left, other=OTHER)
    else:
        col = 4 * tl.arange(0, COLS // 4)[None, :]
        ptr += col.to(tl.int64) * col_stride
        a = tl.load(ptr, mask=col < left, other=OTHER)
        b = tl.load(ptr + col_stride, mask=col < left - 1, other=OTHER)
        c = tl.load(ptr + 2 * col_stride, mask=col < left - 2, other=OTHER)
        d = tl.load(ptr + 3 * col_stride, mask=col < left - 3, other=OTHER)
        x = _philox.in_columns(a, b, c, d)
    return x.to(tl.float32)


@triton.jit
def store(ptr, at, cols, values, COLS: tl.constexpr, UNIT: tl.constexpr):
    """Into (rows, cols), contiguous."""
    ptr = pointers(ptr, at, cols, 1, COLS)
    left = at[2][:, None]
    values = values.to(ptr.dtype.element_ty)
    if UNIT > 1:
        col = tl.arange(0, COLS)[None, :]
        tl.store(ptr + col, values, mask=col < left)
    else:
        col = 4 * tl.arange(0, COLS // 4)[None, :]
        even, odd = tl.split(tl.reshape(values, (values.shape[0], COLS // 4, 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        tl.store(ptr + col, a, mask=col < left)
        tl.store(ptr + col + 1, b, mask=col < left - 1)
        tl.store(ptr + col + 2, c, mask=col < left - 2)
        tl.store(ptr + col + 3, d, mask=col < left - 3)


@triton.jit
def reduced(x, OP: tl.constexpr):
    """Over the last dimension of two."""
    if OP == "max":
        x = tl.max(x, 1)
    elif OP == "min":
        x = tl.min(x, 1)
    else:
        x = tl.sum(x, 1)
    return x


@triton.jit
def of_rows(x, at, OP: tl.constexpr):
    """The largest, smallest or sum of all that a row has of x (ROWS, COLS), at each piece: (ROWS,).

    A row has the same bits wherever in the tile it is. There are no branches: compilers fail on
    reductions in them.
    """
    ROWS: tl.constexpr = x.shape[0]
    NONE: tl.constexpr = float("-inf") if OP == "max" else 2147483647 if OP == "min" else 0.0
    parts = reduced(x, OP)
    if x.shape[1] == 4:
        together = parts
        for i in tl.static_range(1, 5):
            together = reduced(tl.reshape(together, (ROWS >> i, 2)), OP)
            spread = tl.broadcast_to(together[:, None], (ROWS >> i, 1 << i))
            parts = tl.where(at[3] == i, tl.reshape(spread, (ROWS,)), parts)
    elif x.shape[1] < WHOLE:
        owner = tl.arange(0, ROWS) >> at[3]
        parts = reduced(tl.where(owner[:, None] == owner[None, :], parts[None, :], NONE), OP)
    return parts
