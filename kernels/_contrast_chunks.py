"""The parts of the logits that losses over all image-text pairs compute one after another."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from tilewise.kernels import _common
from tilewise.kernels._common import Tile

CACHED_BYTES, CACHED_COLS, WIDE = 32 << 20, 4096, 768  # see `in_cache`


class Chunk(NamedTuple):
    """A part of the logits that is computed by one launch."""

    rows: slice
    cols: slice
    image: Tensor  # of these rows
    text: Tensor  # of these columns
    offset: int  # row i of the chunk matches column i + offset of it
    image_ids: Tensor | None  # of these rows and columns: equal ones match instead
    text_ids: Tensor | None
    dots: Tensor | None = None  # (rows, cols) float32 <image_i, text_j>, if kernels just read them

    @property
    def matches(self) -> tuple[int, Tensor | None, Tensor | None]:
        return self.offset, self.image_ids, self.text_ids


def in_cache(image: Tensor, text: Tensor, cols: int, size: int) -> tuple[int, int]:
    """Columns and bytes of a chunk of gradients, for `chunk_size`: these, or what stays in L2.

    Smaller chunks are more launches. Where one chunk has all logits that costs a good part of a
    call, and where features are narrow a product does not outlast the launches of the next. Else
    it costs nothing: a product of a square chunk of CACHED_BYTES and WIDE features fills a GPU and
    takes some tens of microseconds. An H100 has an L2 of 50 MB, which holds the features as well.
    """
    several = len(image) * len(text) * image.element_size() > size
    if several and image.shape[1] >= WIDE:
        return min(cols, CACHED_COLS), min(size, CACHED_BYTES)
    return cols, size


def chunk_size(image: Tensor, text: Tensor, tile: Tile, cols: int, size: int) -> tuple[int, int]:
    """Rows and columns of a chunk whose gradients take `size` bytes.

    At most `cols` columns, or all that fit beside few rows. Both axes are cut, so that neither
    makes the workspace grow.
    """
    height = _common.round_up(max(len(image), 1), tile.rows) * image.element_size()
    chunk_cols = min(max(size // height // tile.cols * tile.cols, cols), max(len(text), 1))
    width = _common.round_up(chunk_cols, tile.cols)
    chunk_rows = max(size // (width * image.element_size() * tile.rows), 1) * tile.rows
    return min(chunk_rows, max(len(image), 1)), chunk_cols


def chunks(
    image: Tensor, text: Tensor, positives: int | None, ids: tuple[Tensor, Tensor] | None,
    size: tuple[int, int],
) -> Iterator[Chunk]:
    """All chunks; those of the same columns follow one another."""
    for c in range(0, len(text), size[1]):
        y = text[c : c + size[1]]
        for r in range(0, len(image), size[0]):
            x = image[r : r + size[0]]
            # From len(y) on there is no match.
            offset = len(y) if positives is None else r + positives - c
            offset = min(max(offset, -len(x)), len(y))
            rows, cols = slice(r, r + len(x)), slice(c, c + len(y))
            here = (ids[0][rows], ids[1][cols]) if ids else (None, None)
            yield Chunk(rows, cols, x, y, offset, *here)
