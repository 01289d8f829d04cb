"""nearest_code: what programs work on at a time, on each architecture."""

from typing import NamedTuple

from tilewise.kernels import _common
from tilewise.kernels._common import Tile, Tiles


class Blocks(NamedTuple):
    """What one program works on at a time, in the kernels without matrix products.

    A tile of the filter has a whole number of pack_rows, recheck_rows and pack_groups, and its
    depth is one of pack_width: padded operands have room for whole programs.
    """

    pack_rows: int
    pack_groups: int
    pack_width: int  # elements of D
    recheck_rows: int
    recheck_groups: int
    recheck_width: int
    recheck_warps: int
    brute_rows: int
    brute_codes: int


class Plan(NamedTuple):
    """How an architecture runs the kernels."""

    arch: str
    tile: Tile
    blocks: Blocks
    options: dict[str, object]  # of kernels whose roundings count
    tiles: Tiles  # those that `tile` may be: all read the same packed codebook

    def of(self, tile: Tile) -> "Plan":
        """With programs that are no taller than the tile."""
        blocks = self.blocks
        pack, recheck = min(blocks.pack_rows, tile.rows), min(blocks.recheck_rows, tile.rows)
        blocks = blocks._replace(pack_rows=pack, recheck_rows=recheck)
        return self._replace(tile=tile, blocks=blocks)


BLOCKS = Blocks(
    pack_rows=16, pack_groups=1, pack_width=32,
    # A warp for each row: rows have different numbers of groups to look into.
    recheck_rows=1, recheck_groups=128, recheck_width=32, recheck_warps=1,
    brute_rows=4, brute_codes=32,
)
INTERPRETER_BLOCKS = Blocks(
    pack_rows=64, pack_groups=4, pack_width=32,
    recheck_rows=64, recheck_groups=16, recheck_width=32, recheck_warps=1,
    brute_rows=64, brute_codes=32,
)
# static_gate.csv has the figures.
TILES = {
    ("sm_80", "half"): Tile(128, 128, 32, pieces=1, warps=8, stages=4),
    ("sm_90", "half"): Tile(128, 128, 64, pieces=1, warps=8, stages=3, tma=True),
    ("sm_100", "half"): Tile(128, 128, 64, pieces=1, warps=8, stages=3, tma=True),
    ("sm_120", "half"): Tile(128, 128, 32, pieces=1, warps=8, stages=3, tma=True),
    ("gfx942", "half"): Tile(128, 128, 32, pieces=1, warps=8, stages=2),
    ("gfx90a", "half"): Tile(128, 128, 32, pieces=1, warps=8, stages=2),
    ("interpreter", "half"): Tile(64, 64, 32, pieces=1, warps=1, stages=1, tma=True),
}
DEFAULT_TILES = {"half": Tile(128, 128, 32, pieces=1, warps=8, stages=3)}


def plan_for(arch: str, k: int) -> Plan:
    options: dict[str, object] = {"enable_fp_fusion": False}
    if arch.startswith("sm_"):
        # Without a limit ptxas takes far more to unroll loops, or spills some to save as many.
        options["maxnreg"] = 128 if k == 1 else 168
    blocks = INTERPRETER_BLOCKS if arch == "interpreter" else BLOCKS
    large = _common.choose_tile(TILES, DEFAULT_TILES, arch, "half")
    small, few = (
        large._replace(rows=large.rows // n, warps=max(large.warps // 2, 1)) for n in (2, 4)
    )
    return Plan(arch, large, blocks, options, Tiles(large, small, few))
