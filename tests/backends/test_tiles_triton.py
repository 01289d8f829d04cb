"""Which tile kernels take, and that each is right: the edges of the rule, in the interpreter."""

from collections import Counter

import pytest
import torch

from tests.backends.contrast_adapters import CONTRASTS, Contrast
from tests.common.contrastive_cases import ids
from tests.triton_tools.checker import checked
from tilewise.kernels import _common, _contrast_chunks, _contrast_tiles, sigmoid_loss
from tilewise.kernels._common import Tiles

HALF, SINGLE = torch.bfloat16, torch.float32
# Of logits, the size of the interpreter's tile: few have 16 rows, large ones 32 x 32, or 64 x 64,
# and two of these are enough.
EDGES = [
    (1, 1, "few"), (16, 70, "few"), (17, 30, "small"), (32, 32, "small"), (33, 20, "large"),
    (20, 65, "large"),
]
# Those that launch other kernels: info_nce's are clip_loss's.
OTHERS = [contrast for name, contrast in CONTRASTS.items() if name != "info_nce"]
every_contrast = pytest.mark.parametrize("contrast", OTHERS, ids=lambda contrast: contrast.op)


@pytest.fixture
def taken(monkeypatch):
    """The sizes of the tiles that launches choose."""
    names = []
    choose = Tiles.choose

    def follow(tiles, rows, cols, processors):
        tile = choose(tiles, rows, cols, processors)
        names.append(next(name for name in Tiles._fields if getattr(tiles, name) is tile))
        return tile

    monkeypatch.setattr(Tiles, "choose", follow)
    return names


@pytest.mark.parametrize("rows, cols, size", EDGES)
@every_contrast
def test_every_tile_is_right(taken, contrast: Contrast, rows, cols, size):
    """Results within their budgets, and no access out of bounds, at both sides of every edge."""
    candidates = cols
    if contrast.op == "itc_loss":  # teacher and student have a row each
        rows, candidates = -(-rows // 2), cols + max(cols // 2, 1)
    if contrast.op == "hard_negatives" and size == "large" and cols <= 64:
        size = "small"
    dtype = HALF if size == "large" else SINGLE
    problem = contrast.make(rows, cols, 18, positives=ids(rows, candidates, 9))
    with checked(contrast.outputs):
        contrast.check(problem, dtype)
    assert set(taken) == {size}


@pytest.mark.parametrize("size", ["small", "few"])
@every_contrast
def test_tiles_in_chunks(taken, monkeypatch, contrast: Contrast, size):
    """In float16, whose gradients are kept in other units; matches by offset."""
    for name, value in contrast.small.items():
        monkeypatch.setattr(contrast.kernels, name, value // 2)
    rows, processors = (7, 2) if size == "few" else (40, 10**6)
    monkeypatch.setattr(_common, "processors", lambda device, arch: processors)
    with checked(contrast.outputs) as launches:
        contrast.check(contrast.make(rows, 150, 20, positives=5), torch.float16)
    assert set(taken) == {size}
    assert max(Counter(launch.kernel for launch in launches).values()) > 1


@pytest.mark.parametrize("contrast", OTHERS[:2], ids=lambda contrast: contrast.op)
def test_gradients_stay_in_cache(monkeypatch, contrast: Contrast):
    """Of wide features, whose logits need several chunks: the pass without gradients keeps its."""
    for name, value in contrast.small.items():
        monkeypatch.setattr(contrast.kernels, name, value)
    kernels = [kernel for kernel in contrast.outputs if kernel.fn.__name__.endswith("_tile")]
    counts = []
    for wide in (32, 33):
        monkeypatch.setattr(_contrast_chunks, "WIDE", wide)
        monkeypatch.setattr(_contrast_chunks, "CACHED_COLS", 33)
        monkeypatch.setattr(_contrast_chunks, "CACHED_BYTES", 32 * 64 * 2)
        with checked(contrast.outputs) as launches:
            contrast.check(contrast.make(70, 100, 32), torch.float16)
        names = Counter(launch.kernel for launch in launches)
        counts.append([names[kernel.fn.__name__] for kernel in kernels])
    *sums, gradients = zip(*counts, strict=True)
    assert gradients[0] > gradients[1] > 1 and all(one == other for one, other in sums)


@pytest.mark.parametrize("sizes, depth, expected", [
    ((8192, 8192), 1024, (8192, 8192)), ((32768, 32768), 768, (4096, 4096)),
    ((32768, 32768), 512, (8192, 8192)), ((100, 10**6), 1024, (100, 131072)),
], ids=["one chunk", "cached", "narrow", "few rows"])
def test_chunks_of_gradients(monkeypatch, sizes, depth, expected):
    tile = _contrast_tiles.TILES["sm_90", "half"]
    image, text = (torch.empty(n, depth, dtype=HALF, device="meta") for n in sizes)
    most = _contrast_chunks.in_cache(image, text, sigmoid_loss.CHUNK_COLS, sigmoid_loss.CHUNK_BYTES)
    assert _contrast_chunks.chunk_size(image, text, tile, *most) == expected


def test_the_rule_of_an_architecture():
    """One large tile a processor; the others may have any number."""
    tiles = _contrast_tiles.tiles_for(_contrast_tiles.TILES, "sm_90", "half")
    processors = _common.processors(torch.device("cpu"), "sm_90")
    large, small, few = tiles
    full = 12 * large.rows, 11 * large.cols
    assert processors == 12 * 11
    assert tiles.choose(*full, processors) is large
    assert tiles.choose(full[0], full[1] - large.cols, processors) is small
    assert tiles.choose(full[0] - large.rows + 1, full[1] - large.cols + 1, processors) is large
    for rows, tile in ((1, few), (few.rows, few), (few.rows + 1, large)):
        assert tiles.choose(rows, 2**18, processors) is tile
    assert tiles.choose(few.rows + 1, 1, processors) is small


@pytest.mark.parametrize("arch, like", [("sm_103", "sm_100"), ("gfx950", "gfx942")])
def test_relatives_have_as_many_processors(arch, like):
    cpu = torch.device("cpu")
    assert _common.processors(cpu, arch) == _common.processors(cpu, like)
