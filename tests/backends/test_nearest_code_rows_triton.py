"""Rows of nearest_code that one program must not search alone: few of many codes, and with NaN."""

import math
from unittest import mock

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import tilewise as tw
from tests.ops.test_nearest_code import METRICS, assert_same
from tests.triton_tools.checker import checked
from tests.triton_tools.launches import counted
from tilewise.kernels import _common, _nearest_code_plan
from tilewise.kernels import nearest_code as kernels
from tilewise.kernels._nearest_code_exact import merge_lists
from tilewise.kernels._nearest_code_recheck import recheck
from tilewise.reference.nearest_code import NearestCode

SHARES = ["key_ptr", "nearest_ptr", "left_ptr"]
ALL_MERGED = ["index_ptr", "distance_ptr", "all_left_ptr"]
NAN, INF = float("nan"), float("inf")


def programs_of(rows, codes, dim, k=1, heads=1):
    """How many programs each kernel that does most of the work has on an H100."""
    programs = {}

    def note(kernel, *args, grid, warmup, **options):
        if not warmup:
            programs[kernel.fn.__name__] = math.prod(grid)

    x, codebook = (torch.empty(heads, n, dim, device="meta") for n in (rows, codes))
    with (
        mock.patch.object(_common, "architecture", lambda device: "sm_90"),
        mock.patch.object(InterpretedFunction, "run", note),
        mock.patch.object(JITFunction, "run", note),
    ):
        kernels._nearest_code(x, codebook, "l2", k, None, None)
    return programs


@pytest.mark.parametrize("dim", [64, 4096])
@pytest.mark.parametrize("codes", [64, 1024, 16384, 262144])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_few_rows_have_many_programs(rows, codes, dim):
    """As many as codes allow, up to several a processor: 16 codes a row, or a tile for 128."""
    programs = programs_of(rows, codes, dim)
    if "filter_tile" in programs:
        assert rows > 4 and rows * codes * dim > kernels.DEFAULT_SMALL
        assert programs["filter_tile"] == -(-codes // 128)
        assert programs["recheck"] >= min(rows * codes // 2**13, 132)
    elif codes * dim > kernels.ALONE:
        assert programs["brute_shares"] >= min(-(-rows // 4) * codes // 32, 4 * 132)
    else:
        assert programs == {"brute": -(-rows // 4)}


@pytest.mark.parametrize("k", [17, 32])
@pytest.mark.parametrize("codes, dim", [(512, 64), (513, 64), (262144, 64), (8192, 4096)])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_long_lists_are_not_searched_alone(rows, codes, dim, k):
    """One program would search all codes, since lists are not merged: the filter shares them."""
    programs = programs_of(rows, codes, dim, k)
    if codes * dim > kernels.ALONE:
        assert programs["filter_tile"] == -(-codes // 128)
    else:
        assert programs == {"brute": -(-rows // 4)}


@pytest.mark.parametrize("heads", [1, 2])
def test_batches_are_prepared_for_once(monkeypatch, heads):
    """Whatever their rows; for a codebook of another size, whose codes may be shared, again."""
    monkeypatch.setattr(_common, "prepared", set())
    for codes in (1000, 32768):
        before = len(_common.prepared)
        for rows in (3000, 2999, 3001):
            programs_of(rows, codes, 64, heads=heads)
            assert len(_common.prepared) == before + 1


@pytest.mark.parametrize("k", [1, 3, 16, 17])
@pytest.mark.parametrize("metric", METRICS)
def test_shares_of_codes_are_merged(monkeypatch, metric, k):
    """Of equal codes in several shares the lowest comes first; rows that have NaN, and masked."""
    monkeypatch.setitem(kernels.SMALL, "interpreter", 2**30)
    monkeypatch.setattr(kernels, "ALONE", 0)
    x, codebook = torch.randn(1, 9, 6), torch.randn(1, 70, 6).repeat(1, 6, 1)
    x[0, 2], x[0, 3, 1], x[0, 5] = 0, NAN, INF
    codebook[0, ::50] = NAN
    mask = torch.arange(9)[None] != 4
    found = kernels.nearest_code(x, codebook, metric, k, mask, None)
    exact = tw.reference.nearest_code(x[0], codebook[0], metric, k, mask[0])
    assert_same(NearestCode(*(part[0] for part in found)), exact)
    plan = kernels.plan_for("interpreter", k)
    assert (kernels.share_of(9, 420, 6, k, plan, 2) < 420) == (k <= 16)


@pytest.fixture
def shared_groups(monkeypatch):
    """Shares of 4 groups, 64 codes."""
    blocks = _nearest_code_plan.INTERPRETER_BLOCKS._replace(recheck_groups=4)
    monkeypatch.setattr(_nearest_code_plan, "INTERPRETER_BLOCKS", blocks)
    monkeypatch.setattr(kernels, "STEPS", 1)
    monkeypatch.setattr(kernels, "SHARED", 64)


SPOILT = {
    "plain": lambda codes: codes,
    "equal": lambda codes: codes.index_fill(1, torch.arange(60, 200), 0.0),
    "a share of NaN": lambda codes: codes.index_fill(1, torch.arange(64, 130), NAN),
    "a share of infinities": lambda codes: codes.index_fill(1, torch.arange(64), INF),
    "the first NaN": lambda codes: codes.index_fill(1, torch.tensor([0, 70]), NAN),
    "huge": lambda codes: codes.index_fill(1, torch.arange(64, 200), 3e38),
    "all NaN": lambda codes: codes * NAN,
}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("spoil", SPOILT)
@pytest.mark.parametrize("metric", METRICS)
def test_shares_of_groups_are_merged(shared_groups, metric, spoil, k):
    """Rows of zeros, with NaN, with infinities, that overflow, and one that is masked."""
    x, codebook = torch.randn(1, 12, 6), SPOILT[spoil](torch.randn(1, 260, 6))
    x[0, 2], x[0, 3, 1], x[0, 5, 0], x[0, 6], x[0, 7] = 0, NAN, INF, 3e38, codebook[0, 250]
    mask = torch.arange(12)[None] != 4
    with checked({recheck: SHARES, merge_lists: ALL_MERGED}) as seen:
        found = kernels.nearest_code(x, codebook, metric, k, mask, None)
    assert [launch.kernel for launch in seen] == ["recheck", "merge_lists"]
    assert seen[0].arguments["key_ptr"].shape == (1, 12, 5, k)
    exact = tw.reference.nearest_code(x[0], codebook[0], metric, k, mask[0])
    assert_same(NearestCode(*(part[0] for part in found)), exact)


@pytest.mark.parametrize("rows, size", [(1, "few"), (16, "few"), (17, "small"), (65, "large")])
def test_tiles_of_the_filter(rows, size):
    """All read one packed codebook; of few rows less is computed and kept."""
    x, codebook = torch.randn(1, rows, 20), torch.randn(1, 60, 20)
    plan, shapes = kernels.plan_for("interpreter", 2), []
    launch = kernels.launch_filter

    def note(z, bounds, packed, plan, **options):
        shapes.append((plan.tile, z.shape[1] - rows))
        return launch(z, bounds, packed, plan, **options)

    packed = kernels.pack_codebook(codebook, "l2")
    with mock.patch.object(kernels, "launch_filter", note):
        found = kernels.nearest_code(x, codebook, "l2", 2, None, packed)
    assert_same(
        NearestCode(*(part[0] for part in found)),
        tw.reference.nearest_code(x[0], codebook[0], "l2", 2),
    )
    (tile, padding), = shapes
    assert tile == getattr(plan.tiles, size) and padding < tile.rows


def left_over(*arguments):
    """What the kernels find, and which rows `brute` has to do."""
    left = []
    launch = kernels.launch_recheck

    def note(*args):
        left.append(launch(*args))
        return left[-1]

    with mock.patch.object(kernels, "launch_recheck", note):
        found = kernels.nearest_code(*arguments, None)
    return found, torch.cat(left, 1)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("metric", METRICS)
def test_rows_without_a_distance_are_not_searched(metric, k):
    """All distances of a row with a NaN are NaN, and by "cosine" of one with an infinity."""
    x, codebook = torch.randn(1, 40, 9), torch.randn(1, 70, 9)
    x[0, 3, 2], x[0, 7], x[0, 9, 0] = NAN, NAN, INF
    x[0, 11, 1], x[0, 11, 5] = NAN, INF
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[0, 7] = False
    for codes in (codebook, codebook.index_fill(1, torch.tensor([0, 5]), INF)):
        (index, distance), left = left_over(x, codes, metric, k, mask)
        assert left.nonzero().tolist() == ([] if metric == "cosine" else [[0, 9]])
        exact = tw.reference.nearest_code(x[0], codes[0], metric, k, mask[0])
        assert_same(NearestCode(index[0], distance[0]), exact)


@pytest.mark.parametrize("heads, codes, dim", [(1, 130, 20), (3, 65, 16)])
@pytest.mark.parametrize("metric", METRICS)
def test_packed_codebooks_are_what_a_search_packs(metric, heads, codes, dim):
    x, codebook = torch.randn(heads, 50, dim), torch.randn(heads, codes, dim)
    packed = kernels.pack_codebook(codebook, metric)
    assert packed.shape[0] == heads and packed.dtype == torch.uint8
    plan = kernels.plan_for("interpreter", 1)
    parts = kernels.Packed.from_bytes(packed, codebook, plan)
    for ours, theirs in zip(parts, kernels.pack(codebook, metric, plan), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() % 16 == 0
    with mock.patch.object(kernels, "pack", side_effect=AssertionError("packed again")):
        found = kernels.nearest_code(x, codebook, metric, 2, None, packed)
    again = kernels.nearest_code(x, codebook, metric, 2, None, None)
    assert all(map(torch.equal, found, again))


def test_a_prepared_codebook_saves_launches():
    x, codebook = torch.zeros(4096, 64), torch.zeros(8192, 64)
    with counted() as count:
        prepared = tw.prepare_codebook(codebook)
        packing = count.triton.total()
        tw.nearest_code(x, prepared)
    assert packing == 3 and count.triton.total() - packing == 4


def test_each_backend_reads_what_it_packed():
    x, codebook = torch.randn(9, 8), torch.randn(30, 8)
    expected = tw.reference.nearest_code(x, codebook)
    for packing in ("cpu", "triton", "reference"):
        with tw.backend(packing):
            prepared = tw.prepare_codebook(codebook)
        for searching in ("cpu", "triton", "reference"):
            with tw.backend(searching):
                assert_same(tw.nearest_code(x, prepared), expected)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_130", "gfx942", "gfx1100"])
def test_every_architecture_has_a_plan(arch):
    plan = kernels.plan_for(arch, 1)
    for size in plan.tiles:
        tile, blocks = plan.of(size).tile, plan.of(size).blocks
        assert tile.rows % blocks.pack_rows == 0 and tile.depth % blocks.pack_width == 0
        assert tile.rows % blocks.recheck_rows == 0
        assert tile.cols % (kernels.GROUP_SIZE * blocks.pack_groups) == 0
        assert (tile.cols, tile.depth) == (plan.tile.cols, plan.tile.depth)  # of the codebook
    assert plan.options["enable_fp_fusion"] is False


def test_masked_rows_of_small_problems(monkeypatch):
    monkeypatch.setitem(kernels.SMALL, "interpreter", 2**30)
    x, codes = torch.randn(2, 33, 7), torch.randn(2, 20, 7)
    mask = torch.rand(2, 33) < 0.5
    found = kernels.nearest_code(x, codes, "cosine", 3, mask, None)
    assert_same(NearestCode(*found), tw.reference.nearest_code(x, codes, "cosine", 3, mask))
