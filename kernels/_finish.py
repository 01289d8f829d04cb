"""What is left when a loss has its products: sums of parts, and gradients to be scaled. One launch.

Program 0 of a loss's own kernel makes its scalars with `total`; the others take a block of rows of
one of two gradients each, by `scale_one`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096  # of a block of a gradient
WIDEST = 1024  # columns of it


@triton.jit
def total(parts_ptr, count, stride, STEP: tl.constexpr = 1024):
    """The sum of `count` parts, `stride` elements apart, in float64 and in one order."""
    sums = tl.zeros((STEP,), tl.float64)
    for first in range(0, count, STEP):
        i = first + tl.arange(0, STEP)
        sums += tl.load(parts_ptr + i.to(tl.int64) * stride, mask=i < count, other=0.0)
    return tl.sum(sums)


@triton.jit
def matched_rows(count_ptr, rows, STEP: tl.constexpr = 1024):
    """How many of the `rows` have a match, from the number of each one's; int32."""
    matched = tl.zeros((STEP,), tl.int32)
    for first in range(0, rows, STEP):
        i = first + tl.arange(0, STEP)
        matched += (tl.load(count_ptr + i, mask=i < rows, other=0) > 0).to(tl.int32)
    return tl.sum(matched)


@triton.jit
def scale_block(block, in_ptr, out_ptr, rows, stride, depth, factor, ROWS: tl.constexpr,
                COLS: tl.constexpr):
    """out = in * factor for ROWS rows; in (rows, >= depth), out (rows, depth) contiguous."""
    row = (block * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    for first in range(0, depth, COLS):
        col = first + tl.arange(0, COLS)[None, :]
        keep = (row < rows) & (col < depth)
        x = tl.load(in_ptr + row * stride + col, mask=keep)
        tl.store(out_ptr + row * depth + col, x * factor, mask=keep)


@triton.jit
def scale_one(block, gradients, depth, factor, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A block of rows of the first or of the second of `Gradients`."""
    a_ptr, a_out_ptr, a_rows, b_ptr, b_out_ptr, b_rows, stride = gradients
    a_blocks = tl.cdiv(a_rows, ROWS)
    if block < a_blocks:
        if a_ptr is not None:
            scale_block(block, a_ptr, a_out_ptr, a_rows, stride, depth, factor, ROWS, COLS)
    else:
        if b_ptr is not None:
            block -= a_blocks
            scale_block(block, b_ptr, b_out_ptr, b_rows, stride, depth, factor, ROWS, COLS)


class Gradients(NamedTuple):
    """Two products (rows, D rounded up) float32, or None, and room for them as they are returned.

    That is in their own place, where D was not rounded up.
    """

    products: tuple[Tensor | None, Tensor | None]
    results: tuple[Tensor, Tensor]  # (rows, D), or empty
    depth: int

    @classmethod
    def of(
        cls, products: tuple[Tensor | None, Tensor | None], depth: int, like: Tensor
    ) -> "Gradients":
        def room(x: Tensor | None) -> Tensor:
            if x is None:
                return like.new_empty(0, dtype=torch.float32)
            return x if x.shape[1] == depth else x.new_empty(len(x), depth)

        return cls(products, (room(products[0]), room(products[1])), depth)

    @property
    def arguments(self) -> tuple:
        """Of each its product, its result and its rows; then the products' stride, and `depth`."""
        sides = []
        stride = 0
        for x, out in zip(self.products, self.results, strict=True):
            sides += [x, out, 0] if x is None else [x, out, len(x)]
            stride = stride if x is None else x.stride(0)
        return *sides, stride, self.depth

    @property
    def constants(self) -> dict[str, int]:
        cols = min(triton.next_power_of_2(max(self.depth, 16)), WIDEST)
        return {"ROWS": ELEMENTS // cols, "COLS": cols}

    @property
    def programs(self) -> int:
        """Of the kernel: one for scalars, and those that scale."""
        rows = self.constants["ROWS"]
        return 1 + sum(triton.cdiv(len(x), rows) for x in self.products if x is not None)
