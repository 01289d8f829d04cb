"""The tiles of the kernels over all image-text pairs, of three sizes: see `Tiles.choose`."""

from tilewise.kernels import _common
from tilewise.kernels._common import Tile, Tiles

# By architecture and kind of product. Two programs or more fit on one SM, without spills:
# static_gate.csv has the figures.
TILES = {
    ("sm_80", "half"): Tile(128, 128, 32, pieces=4, warps=8, stages=4),
    ("sm_90", "half"): Tile(128, 128, 64, pieces=8, warps=8, stages=3, tma=True),
    ("sm_100", "half"): Tile(128, 128, 64, pieces=4, warps=8, stages=3, tma=True),
    ("sm_120", "half"): Tile(64, 128, 64, pieces=4, warps=8, stages=3, tma=True),
    ("gfx942", "half"): Tile(128, 128, 32, pieces=1, warps=8, stages=2),
    ("gfx90a", "half"): Tile(128, 128, 32, pieces=1, warps=8, stages=2),
    ("sm_90", "tf32"): Tile(128, 128, 32, pieces=8, warps=8, stages=3, tma=True),
    ("sm_100", "tf32"): Tile(128, 128, 32, pieces=4, warps=8, stages=3, tma=True),
    ("sm_120", "tf32"): Tile(128, 64, 16, pieces=4, warps=8, stages=3),
    ("sm_100", "tf32x3"): Tile(64, 64, 16, pieces=1, warps=4, stages=3),
    ("interpreter", "half"): Tile(32, 32, 16, pieces=2, warps=1, stages=1, tma=True),
    ("interpreter", "ieee"): Tile(32, 32, 16, pieces=2, warps=1, stages=1),
    ("interpreter", "tf32"): Tile(32, 32, 16, pieces=2, warps=1, stages=1, tma=True),
    ("interpreter", "tf32x3"): Tile(32, 32, 16, pieces=2, warps=1, stages=1),
}
# Smaller, or in more pieces, for epilogues that need more registers than sigmoid_loss's.
SMALLER_TILES = TILES | {
    ("sm_100", "half"): Tile(128, 128, 64, pieces=8, warps=8, stages=3, tma=True),
    ("sm_100", "tf32"): Tile(128, 128, 32, pieces=8, warps=8, stages=3, tma=True),
    ("gfx942", "half"): Tile(128, 64, 32, pieces=1, warps=8, stages=2),
}
DEFAULT_TILES = {
    "half": Tile(128, 128, 32, pieces=4, warps=8, stages=3),
    "tf32": Tile(128, 64, 32, pieces=2, warps=8, stages=3),
    "tf32x3": Tile(128, 64, 16, pieces=2, warps=8, stages=3),
    "ieee": Tile(64, 64, 32, pieces=1, warps=4, stages=2),
}
# Of every kernel, compiled for rows and columns that need not fill them: see `Tiles.choose`.
SMALL_TILES = {
    ("interpreter", kind): Tile(16, 16, 16, pieces=1, warps=1, stages=1) for kind in DEFAULT_TILES
}
DEFAULT_SMALL_TILES = {
    "half": Tile(64, 64, 32, pieces=2, warps=4, stages=3),
    "tf32": Tile(64, 64, 16, pieces=2, warps=4, stages=3),
    "tf32x3": Tile(64, 64, 16, pieces=1, warps=4, stages=2),
    "ieee": Tile(32, 64, 32, pieces=1, warps=4, stages=2),
}
FEW_TILES = {
    ("interpreter", kind): Tile(16, 32, 16, pieces=2, warps=1, stages=1) for kind in DEFAULT_TILES
}
DEFAULT_FEW_TILES = {
    "half": Tile(32, 128, 32, pieces=2, warps=4, stages=3),
    "tf32": Tile(32, 128, 16, pieces=2, warps=4, stages=3),
    "tf32x3": Tile(32, 64, 16, pieces=1, warps=4, stages=3),
    "ieee": Tile(32, 64, 32, pieces=1, warps=4, stages=2),
}


def tiles_for(large: dict[tuple[str, str], Tile], arch: str, kind: str) -> Tiles:
    """A kernel's tiles, of which the large ones are its own.

    Where the library multiplies, one is enough: its own products fit all sizes.
    """
    own = _common.choose_tile(large, DEFAULT_TILES, arch, kind)
    if kind == "ieee" and arch.startswith("sm_"):
        return Tiles(own, own, own)
    return Tiles(
        own,
        _common.choose_tile(SMALL_TILES, DEFAULT_SMALL_TILES, arch, kind),
        _common.choose_tile(FEW_TILES, DEFAULT_FEW_TILES, arch, kind),
    )
