"""What every op of the Triton backend promises, in the interpreter; adapters.py says of each how.

Contracts of the ops over all image-text pairs, which share an engine, are in the second half.
"""

import inspect
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.backends.adapters import ADAPTERS, Adapter
from tests.backends.contrast_adapters import CONTRASTS, NEGATIVES, Contrast
from tests.common.contrastive_cases import unrelated
from tests.triton_tools.checker import checked
from tilewise import _backend
from tilewise.kernels import _common, _contrast, _contrast_tiles

HALF, SINGLE = torch.bfloat16, torch.float32
OPERATORS = [
    name for op in _backend.ops() for name in (op, f"{op}_backward")
    if hasattr(torch.ops.tilewise_triton, name)
]


def by_op(entry):
    return getattr(entry, "op", None)


every_op = pytest.mark.parametrize("adapter", ADAPTERS, ids=by_op)
every_contrast = pytest.mark.parametrize("contrast", CONTRASTS.values(), ids=by_op)


@pytest.fixture
def small_chunks(request, monkeypatch):
    """Small problems have many chunks."""
    entry = request.getfixturevalue("contrast" if "contrast" in request.fixturenames else "adapter")
    for name, value in entry.small.items():
        monkeypatch.setattr(entry.kernels, name, value)


def test_every_op_has_an_adapter():
    assert sorted(adapter.op for adapter in ADAPTERS) == sorted(_backend.ops())


@pytest.mark.parametrize("name", OPERATORS)
def test_takes_the_operators_arguments(name):
    operator = getattr(torch.ops.tilewise, name).default._schema.arguments
    kernels = next(a.kernels for a in ADAPTERS if name.removesuffix("_backward") == a.op)
    assert [a.name for a in operator] == list(inspect.signature(getattr(kernels, name)).parameters)


@every_op
def test_float64_is_refused(adapter: Adapter):
    for name in adapter.refused:
        tensors = adapter.problem(SINGLE)
        tensors[name] = tensors[name].double()
        with pytest.raises(TypeError, match=f"^{name}: expected float16.*float64"):
            adapter.run(tensors)


@every_op
def test_runs_below_autograd_and_autocast(adapter: Adapter):
    tensors = adapter.problem(SINGLE)
    plain = adapter.run(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = adapter.run({name: x.requires_grad_() for name, x in tensors.items()})
    assert all(map(torch.equal, plain, values)) and not any(x.requires_grad for x in values)


@every_op
def test_same_bits_on_every_run(small_chunks, adapter: Adapter):
    tensors = adapter.problem(HALF)
    assert all(map(torch.equal, adapter.run(tensors), adapter.run(tensors)))


def far_apart(x: torch.Tensor, columns_apart: int, path: Path) -> torch.Tensor:
    """The same in a sparse file, where the last row of a matrix starts after 2^31 elements."""
    strides = [columns_apart, -(-(2**31) // (16 * (x.shape[-2] - 1))) * 16]
    for length in x.shape[-2:0:-1]:
        strides.append(length * strides[-1])
    size = strides[1] * math.prod(x.shape[:-1])
    file = np.memmap(path, x.numpy().dtype, "w+", shape=(size,))
    return torch.from_numpy(file).as_strided(x.shape, strides[::-1]).copy_(x)


@pytest.mark.parametrize("dtype", [torch.float16, SINGLE], ids=str)
@every_op
def test_offsets_beyond_31_bits(tmp_path, adapter: Adapter, dtype):
    """One tensor after another: kernels with an int32 somewhere read another row of it."""
    near = adapter.problem(dtype)
    far = {
        name: far_apart(x, adapter.columns_apart, tmp_path / name) for name, x in near.items()
    }
    assert all(map(torch.equal, adapter.run(far), adapter.run(near)))


# Of all image-text pairs. Float32 takes every case; in half precision programs read, write and
# merge the same elements, so that the first cases do.


@triton.jit
def store_corners(out_ptr, rows, cols):
    row, col = _contrast.tile_corner(rows, cols, 16, 32)
    tl.store(out_ptr + 2 * tl.program_id(0), row)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, col)


@pytest.mark.parametrize("down, across", [(1, 1), (8, 3), (19, 3), (7, 5), (9, 1)])
def test_every_tile_is_walked_once(down, across):
    """Also where the last group of rows of tiles is smaller than the others."""
    corners = torch.full((down * across, 2), -1)
    store_corners[(down * across,)](corners, 16 * down - 3, 32 * across - 5)
    expected = itertools.product(range(0, 16 * down, 16), range(0, 32 * across, 32))
    assert sorted(map(tuple, corners.tolist())) == list(expected)


def chunked_problems():
    for contrast in CONTRASTS.values():
        for i, problem in enumerate(contrast.chunked):
            for dtype in (SINGLE, torch.bfloat16, torch.float16)[: 3 if i == 0 else 1]:
                yield pytest.param(contrast, problem, dtype,
                                   id=f"{contrast.op}-{problem.name}-{dtype}")


@pytest.mark.parametrize("contrast, problem, dtype", list(chunked_problems()))
def test_right_over_chunks(small_chunks, contrast: Contrast, problem, dtype):
    contrast.check(problem, dtype)


@pytest.mark.parametrize("shape, kind, dtype", [
    ((40, 50, 20), "half", HALF), ((40, 50, 20), "ieee", SINGLE), ((64, 64, 16), "half", HALF),
], ids=["ragged-half", "ragged-ieee", "aligned-half"])
@every_contrast
def test_descriptors_and_pointers_agree(monkeypatch, contrast: Contrast, shape, kind, dtype):
    """Whichever a tile does not use is tried here."""
    problem, tiles = contrast.make(*shape), contrast.kernels.TILES
    tensors = contrast.tensors(problem, dtype)
    usual = contrast.run(problem, tensors)
    tile = tiles["interpreter", kind]
    monkeypatch.setitem(tiles, ("interpreter", kind), tile._replace(tma=not tile.tma))
    assert all(map(torch.equal, usual, contrast.run(problem, tensors)))


@pytest.mark.parametrize("pieces", [1, 4])
@every_contrast
def test_pieces_are_put_together(monkeypatch, contrast: Contrast, pieces):
    tile = contrast.kernels.TILES["interpreter", "ieee"]._replace(pieces=pieces)
    monkeypatch.setitem(contrast.kernels.TILES, ("interpreter", "ieee"), tile)
    contrast.check(contrast.make(40, 50, 20), SINGLE)


@pytest.mark.parametrize("contrast, positives", [
    pytest.param(contrast, positives, id=f"{contrast.op}-{positives}")
    for contrast in CONTRASTS.values() for positives in contrast.offsets
])
def test_only_existing_pairs_match(contrast: Contrast, positives):
    """Tiles reach beyond the last row and column; nothing there may be taken for a match."""
    contrast.check(contrast.make(41, 41, 8, logit_bias=3.0, positives=positives), SINGLE)


@pytest.mark.parametrize("shape, by_ids, dtype", [
    ((64, 64, 32), False, SINGLE), ((64, 64, 32), True, HALF), ((33, 65, 17), True, SINGLE),
    ((33, 65, 17), False, HALF), ((1, 1, 1), False, SINGLE), ((40, 20, 0), True, HALF),
], ids=["aligned-single", "aligned-half", "ragged-single", "ragged-half", "one", "no-width"])
@every_contrast
def test_memory_accesses(contrast: Contrast, shape, by_ids, dtype):
    rows, cols, _ = shape
    candidates = cols + max(cols // 2, 1) if contrast.op == "itc_loss" else cols
    equal = torch.arange(rows) % 9, torch.arange(candidates) % 7
    problem = contrast.make(*shape, positives=equal if by_ids else 0)
    with checked(contrast.outputs) as launches:
        contrast.run(problem, contrast.tensors(problem, dtype))
    names = {k.fn.__name__ for k in contrast.outputs}
    others = {"match_ids", "begin_sides" if by_ids else "match_few_ids"}
    others |= set() if by_ids else {"begin_counted_sides"}
    assert names - {launch.kernel for launch in launches} == others & names


@every_contrast
def test_memory_accesses_over_chunks(small_chunks, contrast: Contrast):
    problem = contrast.chunked[0]
    with checked(contrast.outputs) as launches:
        contrast.run(problem, contrast.tensors(problem, HALF))
    assert max(Counter(launch.kernel for launch in launches).values()) >= 4


@every_contrast
def test_workspace_does_not_grow_with_the_batch(monkeypatch, contrast: Contrast):
    for name, value in {"CHUNK_BYTES": 8192, "CHUNK_ROWS": 64, "CHUNK_COLS": 64}.items():
        if hasattr(contrast.kernels, name):
            monkeypatch.setattr(contrast.kernels, name, value)
    with checked(contrast.outputs) as launches:
        for size in ((66, 66), (70, 70)):
            problem = contrast.make(*size, 4)
            contrast.run(problem, contrast.tensors(problem, torch.float16))
    for name, limit in contrast.workspace.items():
        tensors = [launch.arguments.get(name) for launch in launches]
        sizes = [x.untyped_storage().nbytes() for x in tensors if x is not None]
        assert max(sizes) == limit


def flags_of_gradients():
    for contrast in CONTRASTS.values():
        if contrast.gradients:
            for flags in itertools.product([False, True], repeat=contrast.gradients):
                given = "".join("01"[flag] for flag in flags)
                yield pytest.param(contrast, flags, id=f"{contrast.op}-{given}")


@pytest.mark.parametrize("contrast, flags", list(flags_of_gradients()))
def test_only_the_gradients_asked_for(contrast: Contrast, flags):
    problem = contrast.make(33, 20, 5)
    tensors = contrast.tensors(problem, HALF)
    expected = contrast.run(problem, tensors)
    with checked(contrast.outputs):
        loss, *gradients = contrast.run(problem, tensors, flags)
    assert torch.equal(loss, expected[0]) and loss.shape == ()
    for flag, gradient, full in zip(flags, gradients, expected[1:], strict=True):
        assert torch.equal(gradient, full) if flag else gradient.shape == (0,)
    storages = [x.untyped_storage() for x in (loss, *gradients)]
    pointers = [storage.data_ptr() for storage in storages if storage.nbytes()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize(
    "contrast", [c for c in CONTRASTS.values() if c is not NEGATIVES], ids=by_op
)
def test_float32_follows_torchs_precision_setting(monkeypatch, contrast: Contrast, precision):
    problem = contrast.make(64, 64, 64, logit_bias=None, make=unrelated(64, 64, 64))
    tensors = contrast.tensors(problem, SINGLE)
    truth = contrast.run(problem, tensors)[1].double()
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    got = contrast.run(problem, tensors)[1].double()
    error = ((got - truth).norm() / truth.norm()).item()
    low, high = {"highest": (0, 1e-12), "high": (1e-9, 5e-6), "medium": (1e-5, 1e-2)}[precision]
    assert low <= error < high


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_130", "gfx942", "gfx1100"])
@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16, torch.float16], ids=str)
@every_contrast
def test_every_architecture_has_a_tile(contrast: Contrast, arch, dtype):
    kind = _common.product_kind(dtype, arch)
    tiles = _contrast_tiles.tiles_for(contrast.kernels.TILES, arch, kind)
    for tile in tiles:
        assert tile.cols % (4 * tile.pieces) == 0 and tile.depth % 16 == 0
    assert tiles.large.depth % tiles.small.depth == 0 and tiles.large.depth % tiles.few.depth == 0
