"""The backward pass of a rotated straight-through estimator in Triton, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common, _rows

WIDEST = 1024  # columns of a tile
# Elements of one, of which three are in registers: more would spill where rows are not aligned.
ELEMENTS, INTERPRETER_ELEMENTS = 1024, 16384
THREADS = 128


@triton.jit
def load_three(pointers, row, first, rows, cols, strides, COLS: tl.constexpr):
    """A tile of grad, of x and of q: three times (ROWS, COLS) float32."""
    col = first + tl.arange(0, COLS)
    g = _rows.load_tile(pointers[0], row, col, rows, cols, strides[0], strides[1], 0.0)
    x = _rows.load_tile(pointers[1], row, col, rows, cols, strides[2], strides[3], 0.0)
    q = _rows.load_tile(pointers[2], row, col, rows, cols, strides[4], strides[5], 0.0)
    return g, x, q


# Rows are not specialised on: every batch runs the same binary.
@triton.jit(do_not_specialize=["rows"])
def rotate_tile(
    grad_ptr, x_ptr, q_ptr,  # (rows, cols)
    pull_ptr,  # one float32; None stands for 0
    keep_ptr,  # (rows,) uint8: 0 where the result is 0, whatever the row is; or None
    out_ptr,  # out: (rows, cols), contiguous
    rows: tl.int64, cols, grad_stride, grad_col, x_stride, x_col, q_stride, q_col, keep_stride,
    smallest,  # a norm below it counts as this
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """R^T grad + pull * (x - q) of ROWS rows, COLS columns at a time."""
    row = _rows.row_numbers(ROWS)
    pointers = grad_ptr, x_ptr, q_ptr
    strides = grad_stride, grad_col, x_stride, x_col, q_stride, q_col
    zero = tl.zeros((ROWS,), tl.float32)
    xx, qq, gx, gq, xq = zero, zero, zero, zero, zero
    for first in range(0, cols, COLS):
        g, x, q = load_three(pointers, row, first, rows, cols, strides, COLS)
        xx += tl.sum(x * x, 1)
        qq += tl.sum(q * q, 1)
        gx += tl.sum(g * x, 1)
        gq += tl.sum(g * q, 1)
        xq += tl.sum(x * q, 1)
    x_norm, q_norm = tl.sqrt(xx), tl.sqrt(qq)
    x_inv = 1.0 / tl.where(x_norm < smallest, smallest, x_norm)  # NaN stays
    q_inv = 1.0 / tl.where(q_norm < smallest, smallest, q_norm)
    along_x, along_q = gx * x_inv, gq * q_inv
    a, b = x_norm * x_inv, q_norm * q_inv
    squared = a * a + b * b + 2.0 * (xq * x_inv * q_inv)
    least = smallest * smallest
    along_w = 2.0 * (along_x + along_q) / tl.where(squared < least, least, squared)
    stretch = q_norm * x_inv
    x_factor = stretch * x_inv * (2.0 * along_q - along_w)
    q_factor = stretch * q_inv * -along_w
    if pull_ptr is not None:
        pull = tl.load(pull_ptr).to(tl.float32)
        x_factor += pull
        q_factor -= pull
    keep = row < rows
    if keep_ptr is not None:
        keep = tl.load(keep_ptr + row * keep_stride, mask=keep, other=0) != 0
    for first in range(0, cols, COLS):
        g, x, q = load_three(pointers, row, first, rows, cols, strides, COLS)
        d = g * stretch[:, None] + x * x_factor[:, None] + q * q_factor[:, None]
        d = tl.where(keep[:, None], d, 0.0)
        _rows.store_tile(out_ptr, row, first + tl.arange(0, COLS), rows, cols, d)


def rotate_back(
    grad: Tensor, rows: Tensor, quantized: Tensor, pull: Tensor | None, keep: Tensor | None,
    smallest: float,
) -> Tensor:
    """As that of `nn.quantizers._straight_through`, in one launch.

    Args:
        grad, rows, quantized: (M, D), float16, bfloat16 or float32, any strides.
        pull: one float32, or None for 0.
        keep: (M, 1) bool, False where the result is 0; or None.
        smallest: a norm below it counts as this.

    Returns:
        (M, D) as `rows`, contiguous. Equal bits on every run.
    """
    with _common.launching(grad=grad, rows=rows, quantized=quantized) as arch:
        m, cols = rows.shape
        out = rows.new_empty(m, cols)
        if out.numel():
            width = min(max(triton.next_power_of_2(cols), 16), WIDEST)
            height = (INTERPRETER_ELEMENTS if arch == "interpreter" else ELEMENTS) // width
            rotate_tile[(triton.cdiv(m, height),)](
                grad, rows, quantized, pull,
                None if keep is None else keep.view(torch.uint8), out, m, cols,
                *grad.stride(), *rows.stride(), *quantized.stride(),
                0 if keep is None else keep.stride(0), smallest,
                ROWS=height, COLS=width, num_warps=THREADS // _common.warp_size(arch),
                # All there are: left alone, ptxas spills a register of some to save others.
                **({"maxnreg": 255} if arch.startswith("sm_") else {}),
            )
        return out
