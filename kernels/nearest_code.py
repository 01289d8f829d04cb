"""Exact nearest codes in Triton: a filter on matrix units, then float32, then float64.

`filter_tile` bounds the distances of every row to groups of codes; `recheck` looks, in float32,
into the groups that may hold the nearest code, and evaluates as the contract wants it, in float64,
the few codes that float32 cannot tell apart; `brute` evaluates everything, where there is little to
do, or where bounds mean nothing. Nothing depends on the order of programs, and nothing is read back
by the host.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from tilewise.kernels import _common
from tilewise.kernels._common import Tile
from tilewise.kernels._nearest_code_exact import brute, brute_shares, merge_lists
from tilewise.kernels._nearest_code_filter import (
    BOUNDS,
    LIMITS,
    MEASURING,
    centre_codes,
    filter_tile,
    measure_codes,
    pack_codes,
    pack_rows,
)
from tilewise.kernels._nearest_code_plan import Plan, plan_for
from tilewise.kernels._nearest_code_recheck import recheck

WORKSPACE_BYTES = 64 << 20  # rounded rows, and bounds of their distances to groups of codes
GROUP_SIZE = 16
MAX_HEADS = 65535  # what the second axis of a grid can hold
CENTRE_SAMPLE = 128  # no more codes than this, nor less than half, are the centre taken from
CENTRE_COLS = 16  # elements of D that a program finds medians of


# Up to this many products H * N * K * D, `brute` costs less than the launches of all the rest.
SMALL = {"interpreter": 0}
DEFAULT_SMALL = 2**24
ALONE = 2**15  # products of a row that one program makes alone: another launch costs more
SHARED = 8  # programs of `brute_shares` on a processor
STEPS = 4  # of `recheck`, at least: a share of 8,192 codes
LONGEST_SHARED = 16  # longer lists are not merged
MERGED = 64  # codes that `merge_lists` looks at, at a time
WIDEST = 2**20  # D from which bounds prove nothing
ALIGNED = 256  # bytes, where parts of a packed codebook begin; descriptors want 16


class Packed(NamedTuple):
    """A codebook as the filter reads it; see `_nearest_code_filter`."""

    centre: Tensor  # (H, D) float32
    half: Tensor  # (H, programs that measured it) float32
    norm: Tensor  # (H, K) float64
    w: Tensor  # (H, padded, depth) float16
    bias: Tensor  # (H, padded) float32
    limits: Tensor  # (H, LIMITS, groups) float32

    def to_bytes(self) -> Tensor:
        """All of it as (H, bytes)."""
        heads = len(self.centre)
        parts = [part.reshape(-1).view(torch.uint8) for part in self]
        sizes = [_common.round_up(len(part), heads * ALIGNED) for part in parts]
        padded = [F.pad(x, (0, size - len(x))) for x, size in zip(parts, sizes, strict=True)]
        return torch.cat(padded).view(heads, -1)

    @classmethod
    def from_bytes(cls, memory: Tensor, codebook: Tensor, plan: Plan) -> "Packed":
        """What `to_bytes` made of a codebook (H, K, D)."""
        heads, codes, dim = codebook.shape
        padded = _common.round_up(codes, plan.tile.cols)
        single, parts, at = torch.float32, [], 0
        for dtype, *shape in (
            (single, dim), (single, measuring(codes, plan)), (torch.float64, codes),
            (torch.float16, padded, _common.round_up(max(dim, 1), plan.tile.depth)),
            (single, padded), (single, LIMITS.value, padded // GROUP_SIZE),
        ):
            size = heads * math.prod(shape) * dtype.itemsize
            parts.append(memory.view(-1)[at : at + size].view(dtype).view(heads, *shape))
            at += _common.round_up(size, heads * ALIGNED)
        return cls(*parts)


def measuring(codes: int, plan: Plan) -> int:
    """Programs that measure a head's codes."""
    return min(triton.cdiv(codes, plan.blocks.pack_rows), MEASURING.value)


def centre_of(codebook: Tensor, metric: str) -> Tensor:
    """(H, D) float32, see `centre_codes`."""
    heads, codes, dim = codebook.shape
    centre = codebook.new_empty(heads, dim, dtype=torch.float32)
    centre_codes[(triton.cdiv(dim, CENTRE_COLS), heads)](
        codebook, centre, codes, max(codes // (CENTRE_SAMPLE // 2 - 1), 1), dim,
        *strides(codebook),
        METRIC=metric, SAMPLE=CENTRE_SAMPLE, COLS=CENTRE_COLS, WIDTH=32,
    )
    return centre


def strides(x: Tensor) -> tuple[int, int]:
    """Of heads and rows; one head has 0, whatever its size, so that sizes share binaries."""
    return x.stride(0) if len(x) > 1 else 0, x.stride(1)


def pack(codebook: Tensor, metric: str, plan: Plan) -> Packed:
    """Rounds a codebook (H, K, D) of unit stride in a row."""
    tile, blocks = plan.tile, plan.blocks
    heads, codes, dim = codebook.shape
    padded = _common.round_up(codes, tile.cols)
    depth = _common.round_up(max(dim, 1), tile.depth)
    groups = padded // GROUP_SIZE
    centre = centre_of(codebook, metric)
    norm = codebook.new_empty(heads, codes, dtype=torch.float64)
    programs = measuring(codes, plan)
    half = codebook.new_empty(heads, programs, dtype=torch.float32)
    measure_codes[(programs, heads)](
        codebook, centre, norm, half, codes, dim, *strides(codebook),
        METRIC=metric, ROWS=blocks.pack_rows, WIDTH=blocks.pack_width, **plan.options,
    )
    w = codebook.new_empty(heads, padded, depth, dtype=torch.float16)
    bias = codebook.new_empty(heads, padded, dtype=torch.float32)
    limits = codebook.new_empty(heads, LIMITS.value, groups, dtype=torch.float32)
    pack_codes[(triton.cdiv(groups, blocks.pack_groups), heads)](
        codebook, centre, norm, half, w, bias, limits, codes, padded, programs, dim,
        depth, *strides(codebook),
        METRIC=metric, TILE_N=tile.cols, SIZE=GROUP_SIZE, GROUPS=blocks.pack_groups,
        WIDTH=blocks.pack_width,
    )
    return Packed(centre, half, norm, w, bias, limits)


def launch_pack_rows(
    x: Tensor, packed: Packed, metric: str, plan: Plan
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Rounds rows (H, N, D). Returns norms (H, padded), z (H, padded, depth) and bounds."""
    heads, rows, dim = x.shape
    depth = packed.w.shape[2]
    padded = _common.round_up(rows, plan.tile.rows)
    norm = None if metric == "l2" else x.new_empty(heads, padded, dtype=torch.float64)
    z = x.new_empty(heads, padded, depth, dtype=torch.float16)
    bounds = x.new_empty(heads, BOUNDS.value, padded, dtype=torch.float32)
    pack_rows[(padded // plan.blocks.pack_rows, heads)](
        x, packed.centre, packed.half, norm, z, bounds, rows, padded,
        packed.half.shape[1], dim, depth, *strides(x),
        (dim + 8) * 2.0**-23, (depth + 64) * 2.0**-22, (dim / 8 + 16) * 2.0**-51,
        METRIC=metric, ROWS=plan.blocks.pack_rows, WIDTH=plan.blocks.pack_width, **plan.options,
    )
    return norm, z, bounds


def launch_filter(
    z: Tensor, bounds: Tensor, packed: Packed, plan: Plan, warmup: bool = False
) -> Tensor:
    """The least score of each row and group: (H, padded, groups) float32."""
    tile = plan.tile
    heads, rows, depth = z.shape
    codes = packed.w.shape[1]
    minima = z.new_empty(heads, rows, codes // GROUP_SIZE, dtype=torch.float32)
    filter_tile.run(
        _common.source(z.flatten(0, 1), tile.rows, tile, "half"),
        _common.source(packed.w.flatten(0, 1), tile.cols, tile, "half"),
        packed.bias, bounds, minima, rows, codes, depth,
        TILE_M=tile.rows, TILE_N=tile.cols, TILE_K=tile.depth, SIZE=GROUP_SIZE, GROUP=8,
        TMA=tile.tma, num_warps=tile.warps, num_stages=tile.stages,
        grid=(rows // tile.rows * (codes // tile.cols), heads), warmup=warmup,
    )
    return minima


def groups_of(rows: int, groups: int, k: int, plan: Plan, processors: int) -> int:
    """Groups that a program of `recheck` bounds, like `share_of`; at least STEPS times."""
    if k > LONGEST_SHARED:
        return groups
    step = plan.blocks.recheck_groups
    each = triton.cdiv(rows * triton.cdiv(groups, step), SHARED * processors)
    return min(max(each, STEPS) * step, groups)


def launch_recheck(
    x: Tensor, codebook: Tensor, metric: str, mask: Tensor | None, packed: Packed,
    norm: Tensor | None, bounds: Tensor, minima: Tensor, index: Tensor, distances: Tensor,
    plan: Plan, warmup: bool = False,
) -> Tensor | None:
    """Fills index and distances; returns which rows are left to `brute`, (H, N) uint8."""
    blocks = plan.blocks
    heads, rows, dim = x.shape
    groups, k = minima.shape[2], index.shape[2]
    share = groups_of(heads * rows, groups, k, plan, _common.processors(x.device, plan.arch))
    shares = triton.cdiv(groups, share)
    keys, nearest = lists(index, shares) if shares > 1 else (None, None)
    left = x.new_empty(heads, rows, shares, dtype=torch.uint8)
    recheck.run(
        x, codebook, mask, norm, packed.norm, packed.bias, minima, bounds, packed.limits,
        *((index, distances) if keys is None else (None, None)), keys, nearest, left,
        rows, minima.shape[1], codebook.shape[1], groups, share, dim,
        *strides(x), *strides(codebook),
        0 if mask is None else mask.stride(0), index.stride(0),
        (dim + 32) * 2.0**-23, dim * 2.0**-126,
        METRIC=metric, TOPK=k, SLOTS=triton.next_power_of_2(k), HAS_MASK=mask is not None,
        TILE_N=plan.tile.cols, SIZE=GROUP_SIZE, ROWS=blocks.recheck_rows,
        GROUPS=blocks.recheck_groups, WIDTH=blocks.recheck_width,
        num_warps=blocks.recheck_warps, **plan.options,
        grid=(triton.cdiv(rows, blocks.recheck_rows), heads, shares), warmup=warmup,
    )
    if keys is None or nearest is None:
        return left.view(heads, rows)
    return launch_merge(keys, nearest, mask, left, index, distances, plan, warmup)


def lists(index: Tensor, shares: int) -> tuple[Tensor, Tensor]:
    """Room for what `merge_lists` merges into (H, N, k)."""
    shape = *index.shape[:2], shares, index.shape[2]
    return index.new_empty(shape), index.new_empty(shape, dtype=torch.int32)


def launch_merge(
    keys: Tensor, nearest: Tensor, mask: Tensor | None, left: Tensor | None, index: Tensor,
    distances: Tensor, plan: Plan, warmup: bool = False,
) -> Tensor | None:
    """Fills index and distances from lists of shares of the codes; returns what all have left."""
    blocks = plan.blocks
    heads, rows, k = index.shape
    slots = triton.next_power_of_2(k)
    all_left = None if left is None else left.new_empty(heads, rows)
    merge_lists.run(
        keys, nearest, mask, left, all_left, index, distances, rows, keys.shape[2],
        0 if mask is None else mask.stride(0), index.stride(0),
        TOPK=k, SLOTS=slots, HAS_MASK=mask is not None, ROWS=blocks.recheck_rows,
        SHARES=max(MERGED // slots, 1), num_warps=blocks.recheck_warps,
        grid=(triton.cdiv(rows, blocks.recheck_rows), heads), warmup=warmup,
    )
    return all_left


def share_of(rows: int, codes: int, dim: int, k: int, plan: Plan, processors: int) -> int:
    """Codes of a program of `brute_shares`, for as many as a GPU has room for; or all."""
    blocks = plan.blocks
    if codes * dim <= ALONE or k > LONGEST_SHARED:
        return codes
    steps = triton.cdiv(rows, blocks.brute_rows) * triton.cdiv(codes, blocks.brute_codes)
    return min(triton.cdiv(steps, SHARED * processors) * blocks.brute_codes, codes)


def launch_brute(
    x: Tensor, codebook: Tensor, metric: str, mask: Tensor | None, left: Tensor | None,
    index: Tensor, distances: Tensor, plan: Plan, warmup: bool = False,
) -> None:
    """Fills index and distances, of the rows that are `left` or of all."""
    blocks = plan.blocks
    heads, rows, dim = x.shape
    codes, k = codebook.shape[1], index.shape[2]
    programs = triton.cdiv(rows, blocks.brute_rows), heads
    mask_stride = 0 if mask is None else mask.stride(0)
    options: dict[str, Any] = dict(
        METRIC=metric, TOPK=k, SLOTS=triton.next_power_of_2(k), HAS_MASK=mask is not None,
        ROWS=blocks.brute_rows, CODES=blocks.brute_codes, warmup=warmup, **plan.options,
    )
    processors = _common.processors(x.device, plan.arch)
    share = share_of(heads * rows, codes, dim, k, plan, processors)
    if left is None and share < codes:
        shares = triton.cdiv(codes, share)
        keys, nearest = lists(index, shares)
        brute_shares.run(
            x, codebook, mask, keys, nearest, rows, codes, share, dim,
            *strides(x), *strides(codebook), mask_stride, **options, grid=(*programs, shares),
        )
        launch_merge(keys, nearest, mask, None, index, distances, plan, warmup)
        return
    brute.run(
        x, codebook, mask, left, index, distances, rows, codes, dim,
        *strides(x), *strides(codebook), mask_stride, index.stride(0),
        HAS_LEFT=left is not None, **options, grid=programs,
    )


def search(
    x: Tensor, codebook: Tensor, metric: str, mask: Tensor | None, packed: Packed | None,
    index: Tensor, distances: Tensor, plan: Plan,
) -> None:
    """Fills index and distances (H, N, k) of one chunk of heads and rows."""
    rest = index, distances, plan
    if packed is None:
        launch_brute(x, codebook, metric, mask, None, *rest)
        return
    norm, z, bounds = launch_pack_rows(x, packed, metric, plan)
    minima = launch_filter(z, bounds, packed, plan)
    left = launch_recheck(x, codebook, metric, mask, packed, norm, bounds, minima, *rest)
    launch_brute(x, codebook, metric, mask, left, *rest)
    apart = [stride % 16 for stride in (*strides(x), *strides(codebook))]  # what binaries know
    kind = (
        x.device, x.dtype, codebook.dtype, len(x), *apart, codebook.shape[1:], index.shape[2],
        metric, mask is None,
    )
    if plan.arch == "interpreter" or not _common.is_new(brute, *kind, plan.tile):
        return
    # What a smaller batch launches instead is compiled now.
    for tile in plan.tiles[plan.tiles.index(plan.tile) + 1 :]:
        launch_filter(z, bounds, packed, plan.of(tile), warmup=True)
    one = slice(None), slice(1)
    single = codebook, metric, None if mask is None else mask[one]
    some = index[one], distances[one], plan
    launch_recheck(x[one], *single, packed, norm, bounds, minima, *some, warmup=True)
    launch_brute(x[one], *single, None, *some, warmup=True)


def chunks(heads: int, rows: int, packed: Packed | None, tile: Tile) -> Iterator[tuple]:
    """Slices of heads and rows whose workspace fits into WORKSPACE_BYTES, or one tile of rows."""
    padded = _common.round_up(rows, tile.rows)
    fits = padded * heads
    if packed is not None:  # z, minima, bounds, norm, left
        row_bytes = 2 * packed.w.shape[2] + 4 * (packed.limits.shape[2] + BOUNDS.value) + 9
        fits = max(WORKSPACE_BYTES // (row_bytes * tile.rows), 1) * tile.rows
    some_heads = max(fits // padded, 1)
    pieces = triton.cdiv(padded, min(fits, padded))  # of about the same size
    some_rows = _common.round_up(triton.cdiv(rows, pieces), tile.rows)
    for h in range(0, heads, some_heads):
        for r in range(0, rows, some_rows):
            yield slice(h, h + some_heads), slice(r, r + some_rows)


def _nearest_code(x, codebook, metric, k, mask, memory):
    if len(x) > MAX_HEADS:  # whose codebook is not packed before
        pieces = [slice(h, h + MAX_HEADS) for h in range(0, len(x), MAX_HEADS)]
        found = [
            _nearest_code(x[h], codebook[h], metric, k, None if mask is None else mask[h], None)
            for h in pieces
        ]
        return tuple(map(torch.cat, zip(*found, strict=True)))
    heads, rows, dim = x.shape
    index = x.new_empty(heads, rows, k, dtype=torch.int64)
    distances = x.new_empty(heads, rows, k, dtype=torch.float32)
    if heads == 0 or rows == 0:
        return index, distances
    x = x if x.stride(2) == 1 else x.contiguous()
    codebook = codebook if codebook.stride(2) == 1 else codebook.contiguous()
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    arch = _common.architecture(x.device)
    plan = plan_for(arch, k)
    packed, small = None, SMALL.get(arch, DEFAULT_SMALL)
    codes = codebook.shape[1]
    # Longer lists are not merged: one program would search all codes alone.
    shared = k <= LONGEST_SHARED or codes * dim <= ALONE
    # To pack a codebook is to compute with it in float64, too: for few rows `brute` does no more.
    few = small > 0 and memory is None and heads * rows <= plan.blocks.brute_rows
    if dim < WIDEST and x.numel() * codes > (small if shared else 0) and not (few and shared):
        packed = pack(codebook, metric, plan) if memory is None else Packed.from_bytes(
            memory, codebook, plan
        )
    processors = _common.processors(x.device, arch)
    plan = plan.of(plan.tiles.choose(rows, heads * codes, processors))
    for h, r in chunks(heads, rows, packed, plan.tile):
        search(
            x[h, r], codebook[h], metric, None if mask is None else mask[h, r],
            None if packed is None else Packed(*(part[h] for part in packed)),
            index[h, r], distances[h, r], plan,
        )
    return index, distances


def nearest_code(
    x: Tensor, codebook: Tensor, metric: str, k: int, mask: Tensor | None, packed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The k nearest codes of each row, exactly as the reference has them, without a host sync.

    Args:
        x: (H, N, D), float16, bfloat16 or float32, any strides.
        codebook: (H, K, D), the same.
        metric: "l2", "cosine" or "dot".
        mask: (H, N) bool, or None; rows where it is False get index -1 and distance 0.
        packed: what `pack_codebook` made of the codebook, or None.

    Returns:
        index (H, N, k) int64, distance (H, N, k) float32. Equal bits on every run.

    Cost: a product of N*K*D in float16 and a few distances in float32 and float64 for each row.
    Memory 2 bytes for each element of the codebook, and K / 4 + 2 * D + 25 bytes for each row (K
    and D rounded up to a tile's), of which WORKSPACE_BYTES at a time.
    """
    with _common.launching(x=x, codebook=codebook):
        memory = packed if packed is not None and packed.numel() else None
        return _nearest_code(x, codebook, metric, k, mask, memory)


def pack_codebook(codebook: Tensor, metric: str) -> Tensor:
    """A codebook (H, K, D) as the filter reads it, (H, bytes) uint8; none where it has no part."""
    with _common.launching(codebook=codebook) as arch:
        heads, _, dim = codebook.shape
        if not 0 < heads <= MAX_HEADS or dim >= WIDEST:
            return codebook.new_empty(heads, 0, dtype=torch.uint8)
        codebook = codebook if codebook.stride(2) == 1 else codebook.contiguous()
        return pack(codebook, metric, plan_for(arch, 1)).to_bytes()
