"""Rows of nearest_code that one program must not search alone: few of many codes, and with NaN."""

from unittest import mock

import pytest
import torch

import tilewise as tw
from tests.ops.test_nearest_code import METRICS, assert_same
from tests.triton_tools.launches import counted
from tilewise.kernels import nearest_code as kernels
from tilewise.reference.nearest_code import NearestCode

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("rows, codes, dim, alone", [
    (1, 8192, 256, False), (7, 262144, 64, False), (16, 512, 64, True), (1, 8192, 16, True),
])
def test_no_program_searches_many_codes_alone(rows, codes, dim, alone):
    """A row's distances to all codes are one program's work in `brute`, one after another."""
    with counted() as count:
        tw.nearest_code(torch.zeros(rows, dim), torch.zeros(codes, dim))
    assert ("filter_tile" not in count.triton) == alone


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
