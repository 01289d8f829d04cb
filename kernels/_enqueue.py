"""Queues of features in Triton: a batch is written over the oldest rows of all queues at once."""

import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from tilewise.kernels import _common, _rows

WIDEST = 2048  # columns of a tile


@triton.jit(do_not_specialize=["first", "rows", "size"])
def write_tile(
    image_queue_ptr, text_queue_ptr,  # out: (size, cols), contiguous
    id_queue_ptr,  # out: (size,) int64
    pointer_ptr,  # one int64: where row 0 would be written
    image_ptr, text_ptr,  # (rows, cols)
    ids_ptr,  # (rows,) int64; None: `no_id`
    first, rows: tl.int64, size, cols, image_stride, image_col, text_stride, text_col, ids_stride,
    NO_ID: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Writes ROWS rows, of which the first is number `first`, and their ids."""
    row = _rows.row_numbers(ROWS)
    inside = row < rows
    place = (tl.load(pointer_ptr) + first + row) % size
    ids = tl.full((ROWS,), NO_ID, tl.int64)
    if ids_ptr is not None:
        ids = tl.load(ids_ptr + row * ids_stride, mask=inside, other=NO_ID)
    tl.store(id_queue_ptr + place, ids, mask=inside)
    for begin in range(0, cols, COLS):
        col = begin + tl.arange(0, COLS)
        keep = inside[:, None] & (col < cols)[None, :]
        at = place[:, None] * cols + col[None, :]
        image = _rows.load_tile(image_ptr, row, col, rows, cols, image_stride, image_col, 0.0)
        tl.store(image_queue_ptr + at, image.to(image_queue_ptr.dtype.element_ty), mask=keep)
        text = _rows.load_tile(text_ptr, row, col, rows, cols, text_stride, text_col, 0.0)
        tl.store(text_queue_ptr + at, text.to(text_queue_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["steps", "size"])
def advance(pointer_ptr, steps, size):
    """A launch of its own: all programs that write read the pointer as it was."""
    tl.store(pointer_ptr, (tl.load(pointer_ptr) + steps) % size)


def enqueue(
    image_queue: Tensor, text_queue: Tensor, id_queue: Tensor, pointer: Tensor,
    image: Tensor, text: Tensor, ids: Tensor | None, first: int, steps: int, no_id: int,
) -> None:
    """What `ItcLoss` does with a batch, in one launch, or in two where the pointer moves.

    Args:
        image_queue, text_queue, id_queue: (Q, D), (Q, D) and (Q,) int64, contiguous.
        pointer: () int64, the place of row 0.
        image, text, ids: (B, D) features, any strides, and (B,) int64, or None for `no_id`: rows
            `first` and on; B is at most Q.
        steps: how far the pointer then moves; 0: it stays.
    """
    queues = {"image_queue": image_queue, "text_queue": text_queue}
    with _common.launching(**queues, image=image, text=text) as arch:
        rows, cols = image.shape
        size = len(id_queue)
        if rows and size:
            tile = _rows.choose_tile(min(max(cols, 1), WIDEST), arch)
            write_tile[(triton.cdiv(rows, tile.rows),)](
                image_queue, text_queue, id_queue, pointer, image, text, ids, first, rows, size,
                cols, *image.stride(), *text.stride(), 0 if ids is None else ids.stride(0),
                NO_ID=no_id, ROWS=tile.rows, COLS=tile.cols, num_warps=tile.warps,
            )
        if steps and size:
            advance[(1,)](pointer, steps, size)
        increment_version([*queues.values(), id_queue, pointer])
