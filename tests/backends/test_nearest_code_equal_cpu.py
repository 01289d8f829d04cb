"""The C++ backend of nearest_code where codes equal one another, or nearly so: exact, and fast."""

import copy

import pytest
import torch

import tilewise as tw
from tests.ops.test_nearest_code import METRICS, check

ROWS = [2, 20, 110]  # one by one, without packing, and packed
KS = [None, 3, 16]


@pytest.fixture(autouse=True)
def cpu_backends():
    with tw.backend("cpu"):
        yield


def equal(count, distinct, dim=9, seed=0):
    """Each of a few codes many times, in no order."""
    torch.manual_seed(seed)
    return torch.randn(distinct, dim)[torch.randint(distinct, (count,))]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("distinct", [1, 2, 40, 299])
@pytest.mark.parametrize("rows", ROWS)
def test_equal_codes_answer_in_the_order_of_their_indices(rows, distinct, metric):
    codebook = equal(300, distinct)
    for k in KS:
        check(torch.randn(rows, 9), codebook, metric, k)
        check(codebook[:rows].clone(), codebook, metric, k)
        check(torch.randn(rows, 9).double(), codebook.double(), metric, k)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", ROWS)
def test_zeros_of_both_signs_are_equal_numbers(rows, metric):
    codebook = torch.zeros(300, 5)
    codebook[::2] = -0.0
    codebook[::3, 2] = 1.0
    codebook[1::6, 0] = -0.0
    for k in KS:
        check(torch.randn(rows, 5), codebook, metric, k)


@pytest.mark.parametrize("rows", ROWS)
def test_codes_that_one_large_number_makes_alike_are_not_equal(rows):
    """A sum of them rounds what tells them apart away, and the difference of two does not."""
    codebook = torch.randn(300, 9)
    codebook[:, 3] = 1e30
    x = codebook[torch.randint(300, (rows,))].clone()
    assert torch.equal(x, codebook[tw.nearest_code(x, codebook).index])
    for k in KS:
        check(x, codebook, "l2", k)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", ROWS)
def test_equal_codes_among_nan_and_infinity(rows, metric):
    codebook = equal(300, 7)
    codebook[::5, 3] = float("nan")
    for k in KS:
        check(torch.randn(rows, 9), codebook, metric, k)
    codebook[1::5, 4] = float("inf")
    for k in KS:
        check(torch.randn(rows, 9), codebook, metric, k)
    codebook[::2] = float("nan")
    codebook[8:] = float("nan")  # one code has none, of 300
    check(torch.randn(rows, 9), codebook, metric, 5)


def test_heads_whose_equal_codes_differ():
    codebook = torch.stack([equal(200, 3), equal(200, 200, seed=1), torch.zeros(200, 9)])
    for rows in ROWS:
        x = torch.randn(3, rows, 9)
        for k in KS:
            check(x, codebook, "l2", k)
            prepared = tw.prepare_codebook(codebook)
            for ready in (prepared, copy.deepcopy(prepared)):
                assert torch.equal(tw.nearest_code(x, ready, k=k).index,
                                   tw.reference.nearest_code(x, codebook, k=k).index)


def test_masked_rows_of_equal_codes():
    x, codebook = torch.randn(110, 9), equal(300, 3)
    check(x, codebook, "l2", 4, torch.rand(110) < 0.5)


def test_equal_weighted_sums_of_different_codes():
    """What equal codes are found by may agree where the codes do not."""
    codebook = torch.zeros(300, 3000, dtype=torch.float64)
    codebook[:, 0] = torch.arange(300) % 50 * 1e-14  # lost in the sum beside the last element
    codebook[:, -1] = 1.0
    check(torch.randn(110, 3000, dtype=torch.float64), codebook, "l2", 3)


def clusters(codes, dim, count, spread):
    torch.manual_seed(codes)
    centres = torch.randn(count, dim)
    return centres[torch.arange(codes) % count] * (1 + spread * torch.randn(codes, dim))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("spread", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("rows", ROWS)
def test_nearly_equal_codes(rows, spread, metric):
    codebook = clusters(400, 24, 3, spread)
    near = codebook[torch.randint(400, (rows,))] * (1 + spread * torch.randn(rows, 24))
    for x in (torch.randn(rows, 24), near, torch.zeros(rows, 24)):
        check(x, codebook, metric)
        check(x, codebook, metric, 3)
    wide = codebook.double() * (1 + 1e-13 * torch.randn(400, 24, dtype=torch.float64))
    check(near.double(), wide, metric)
    check(near, wide, metric)


@pytest.mark.parametrize("rows", ROWS)
def test_nearly_equal_codes_at_the_limits_of_float32(rows):
    """Squares overflow, or vanish, and differences of codes are denormal."""
    for scale in (1e-40, 1e-25, 1e17, 1e30):
        codebook, x = clusters(300, 12, 2, 1e-6) * scale, torch.randn(rows, 12) * scale
        check(x, codebook)
        check(x / scale, codebook)
        check(x, codebook, "dot")
    codebook = clusters(300, 12, 2, 1e-6)
    codebook[7], codebook[9, 3] = 3e38, -3e38
    check(torch.randn(rows, 12), codebook)
    check(torch.randn(rows, 12) * 3e38, codebook)


def test_rows_in_lanes_beside_rows_that_no_bound_serves():
    codebook = clusters(300, 12, 2, 1e-6)
    x = torch.randn(37, 12)
    x[3], x[4, 2], x[20] = float("nan"), float("inf"), 1e25
    for metric in METRICS:
        check(x, codebook, metric)
        check(x, codebook, metric, 3)


@pytest.mark.alone
@pytest.mark.parametrize("rows", ROWS)
def test_same_for_every_thread_count(threads, rows):
    """More threads than cores: few rows are shared by codes, and results merged by index."""
    for codebook in (clusters(9000, 12, 3, 1e-6), equal(9000, 5, 12)):
        x = torch.randn(rows, 12)
        threads(1)
        expected = tw.nearest_code(x, codebook, k=3)
        for count in (2, 8, 16):
            threads(count)
            ours = tw.nearest_code(x, codebook, k=3)
            assert torch.equal(ours.index, expected.index)
            assert torch.equal(ours.distance, expected.distance)
            assert torch.equal(tw.nearest_code(x, codebook).index, expected.index[:, 0])
