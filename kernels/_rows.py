"""What the launchers of random ops share: tensors as rows of columns, and tiles of them."""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common

# Columns that one tile holds; wider rows are walked in blocks of BLOCK. Two programs fit on one SM,
# without spills: static_gate.csv has the figures.
LONGEST = 8192
BLOCK = 4096
ELEMENTS = 2048  # of a tile of short rows
INTERPRETER_ELEMENTS = 16384  # the interpreter pays by the program


class Tile(NamedTuple):
    """What one program works on, at a time."""

    rows: int
    cols: int  # a power of two
    warps: int


def longest(cols: int) -> int:
    """LONGEST; where rows are not aligned, loads go element by element, which takes registers."""
    return LONGEST if cols % 16 == 0 else LONGEST // 2


def choose_tile(cols: int, arch: str, width: int | None = None) -> Tile:
    """The tile for rows of `cols`: whole rows up to longest(cols), then a block of one row.

    `width`: columns of the tile, where the caller knows better.
    """
    if width is None:
        width = BLOCK if cols > longest(cols) else max(triton.next_power_of_2(cols), 4)
    elements = INTERPRETER_ELEMENTS if arch == "interpreter" else ELEMENTS
    rows = max(elements // width, 1) if width >= cols else 1
    threads = min(max(rows * width // 16, 128), 512)
    return Tile(rows, width, threads // _common.warp_size(arch))


def as_rows(x: Tensor, dim: int) -> Tensor:
    """(rows, columns), columns along `dim`; a view where strides allow."""
    x = x.movedim(dim, -1)
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def from_rows(x: Tensor, like: Tensor, dim: int) -> Tensor:
    """Contiguous, as `like` but for the length of `dim`, which is the number of columns."""
    shape = list(like.shape)
    shape.append(x.shape[1])
    del shape[dim]
    return x.view(shape).movedim(-1, dim).contiguous()


@triton.jit
def row_numbers(ROWS: tl.constexpr):
    """(ROWS,) int64: the rows of this program."""
    return tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)


@triton.jit
def place(cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's rows, its block of columns, and how many of these a row has."""
    blocks = tl.cdiv(cols, COLS)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, program % blocks, blocks


@triton.jit
def load_tile(ptr, row, col, rows, cols, row_stride, col_stride, OTHER: tl.constexpr):
    """(ROWS, COLS) float32, OTHER outside."""
    keep = (row < rows)[:, None] & (col < cols)[None, :]
    ptr += row[:, None] * row_stride + col[None, :].to(tl.int64) * col_stride
    return tl.load(ptr, mask=keep, other=OTHER).to(tl.float32)


@triton.jit
def store_tile(ptr, row, col, rows, cols, values):
    """Into (rows, cols), contiguous."""
    keep = (row < rows)[:, None] & (col < cols)[None, :]
    ptr += row[:, None] * cols + col[None, :]
    tl.store(ptr, values.to(ptr.dtype.element_ty), mask=keep)
