"""Float32 without matrix units, which the library multiplies: tiles read dots and write over them.

Every other test of float32 takes that way too; here is what it alone can break.
"""

import pytest
import torch

from tests.backends.contrast_adapters import CONTRASTS, Contrast
from tests.common.contrastive_cases import ids
from tests.triton_tools.checker import checked
from tilewise.kernels import _common
from tilewise.kernels._contrast import Launch
from tilewise.kernels._contrast_chunks import Chunk
from tilewise.kernels._contrast_tiles import TILES, tiles_for

every_contrast = pytest.mark.parametrize(
    "contrast", CONTRASTS.values(), ids=lambda contrast: contrast.op
)


def make(contrast: Contrast, rows: int, cols: int):
    """Ragged, and matched by ids."""
    candidates = cols + max(cols // 2, 1) if contrast.op == "itc_loss" else cols
    return contrast.make(rows, cols, 18, positives=ids(rows, candidates, 9))


@pytest.mark.parametrize("arch, kind, expected", [
    ("sm_90", "ieee", True), ("sm_90", "tf32x3", False), ("sm_90", "half", False),
    ("gfx942", "ieee", False), ("interpreter", "ieee", True),
])
def test_only_where_there_are_no_matrix_units(arch, kind, expected):
    tiles = tiles_for(TILES, arch, kind)
    assert Launch(arch, kind, tiles, tiles.large).by_library == expected
    assert (len(set(tiles)) == 1) == (expected and arch != "interpreter")


class Warmed:
    """In place of a kernel: which tiles are compiled beside the one that is launched."""

    arg_names = ()

    def __init__(self):
        self.tiles = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: None

    def warmup(self, *arguments, TILE_M, TILE_N, **options):
        self.tiles.append((TILE_M, TILE_N))


@pytest.mark.parametrize("kind, full, ragged", [
    ("ieee", [(64, 64)], []), ("half", [(128, 128), (64, 64), (32, 128)], [(64, 64), (32, 128)]),
])
def test_each_smaller_tile_is_prepared_once(monkeypatch, kind, full, ragged):
    """Of batches of any size, whose dots lie any number of rows apart."""
    monkeypatch.setattr(_common, "prepared", set())
    tiles, kernel = tiles_for(TILES, "sm_80", kind), Warmed()
    launch = Launch("sm_80", kind, tiles, tiles.large)
    for expected, sizes in ((full, (128, 256)), (full + ragged, (100, 200))):
        for size in sizes:
            x = torch.empty(size, 64, device="meta")
            chunk = Chunk(slice(0, size), slice(0, size), x, x, 0, None, None)
            if launch.by_library:
                room = torch.empty(320, 64 * -(-size // 64), device="meta")
                chunk = launch.multiplied(chunk, room)
            launch.run(kernel, chunk)
        assert kernel.tiles == expected


@every_contrast
def test_kernels_multiply_where_they_should(monkeypatch, contrast: Contrast):
    """As on AMD's GPUs, whose matrix units take float32."""
    monkeypatch.setattr(Launch, "by_library", False)
    with checked(contrast.outputs) as launches:
        contrast.check(make(contrast, 45, 37), torch.float32)
    features = [x.arguments for x in launches if x.kernel.endswith("_tile")]
    assert features and all(list(x.values())[1] is not None for x in features)


@every_contrast
def test_dots_take_no_more_memory_than_a_chunk(monkeypatch, contrast: Contrast):
    for name, value in {"CHUNK_BYTES": 16384, "CHUNK_ROWS": 64, "CHUNK_COLS": 64}.items():
        if hasattr(contrast.kernels, name):
            monkeypatch.setattr(contrast.kernels, name, value)
    with checked(contrast.outputs) as launches:
        contrast.check(make(contrast, 70, 70), torch.float32)
    tiles = [list(x.arguments.values())[:2] for x in launches if x.kernel.endswith("_tile")]
    assert len(tiles) >= 4
    for dots, text in tiles:
        assert text is None and dots.untyped_storage().nbytes() <= 16384


@pytest.mark.parametrize("op, passes", [("sigmoid_loss", 1), ("clip_loss", 2), ("info_nce", 2)])
@pytest.mark.parametrize("chunked", [False, True])
def test_dots_of_the_last_chunk_serve_both_passes(monkeypatch, op, passes, chunked):
    contrast = CONTRASTS[op]
    for name, value in contrast.small.items() if chunked else ():
        monkeypatch.setattr(contrast.kernels, name, value)
    products = []
    multiply = _common.add_product

    def follow(out, *arguments, **options):
        products.append(out)
        multiply(out, *arguments, **options)

    monkeypatch.setattr(_common, "add_product", follow)
    with checked(contrast.outputs) as launches:
        contrast.check(make(contrast, 70, 100), torch.float32)
    chunks = sum(launch.kernel.endswith("_tile") for launch in launches) // passes
    assert (chunks > 3) == chunked
    assert len(products) == passes * chunks - (passes - 1) + 2 * chunks
