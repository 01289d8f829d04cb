"""Means of the candidates that match by id: what the kernel finds is what sorting finds."""

import pytest
import torch

import tilewise as tw
from tests.triton_tools.checker import checked
from tilewise.kernels import _matched
from tilewise.ops import _matched as op

OUTPUTS = {_matched.match_rows: ["mean_ptr", "count_ptr"]}
SIZES = [(5, 5, 30, 8), (1, 1, None, 1), (4, 0, 70, 19), (9, 70, 0, 33)]  # rows, K, Q, D
IDS = {
    "repeated": lambda rows, n: (torch.arange(rows) * 3 % 7, torch.arange(n) * 5 % 11),
    "none": lambda rows, n: (torch.arange(rows), -1 - torch.arange(n)),
    "all": lambda rows, n: (torch.full((rows,), 7), torch.full((n,), 7)),
    "large": lambda rows, n: (-(2**40) - torch.arange(rows), -(2**40) - torch.arange(n) // 2),
    "zeros": lambda rows, n: (torch.arange(rows), torch.arange(n) % 2 * 9),  # as outside is read
}


def problem(rows, keys, queue, dim, names, dtype):
    generator = torch.Generator().manual_seed(rows + keys)
    both = torch.randn(keys + (queue or 0), dim, generator=generator).to(dtype)
    parts = both[:keys], None if queue is None else both[keys:]
    return both, (*parts, *IDS[names](rows, len(both)))


def assert_right(found, both, query_ids, candidate_ids):
    mean, count = found
    same = query_ids[:, None] == candidate_ids
    assert count.dtype == torch.int64 and torch.equal(count, same.sum(1))
    assert mean.dtype == torch.float32
    terms = same.double() @ both.double().abs()
    error = (mean - same.double() @ both.double() / count.clamp(min=1)[:, None]).abs()
    assert (error <= 1e-7 * (terms + 1e-30)).all()


@pytest.mark.parametrize("sizes, names, dtype", [
    *((sizes, names, torch.float32) for sizes in SIZES for names in IDS),
    *((SIZES[0], "repeated", dtype) for dtype in (torch.bfloat16, torch.float16)),
], ids=str)
def test_matches_are_those_that_sorting_finds(monkeypatch, sizes, names, dtype):
    """Over many steps of few candidates; a piece begins among keys and ends in the queue."""
    monkeypatch.setattr(_matched, "STEP", 32)
    monkeypatch.setattr(_matched, "ELEMENTS", 256)
    both, arguments = problem(*sizes, names, dtype)
    with tw.backend("triton"), checked(OUTPUTS) as launches:
        found = op.matched_by_ids(*arguments)
        again = op.matched_by_ids(*arguments)
    assert len(launches) == 2 and all(map(torch.equal, found, again))
    assert_right(found, both, *arguments[2:])
    _, count = op._matched_by_sorting(*arguments)
    assert torch.equal(found[1], count)


def test_what_does_not_match_is_not_read():
    """A NaN or an infinity beside what matches changes nothing."""
    keys = torch.randn(40, 5)
    keys[1::2] = torch.tensor([float("nan"), float("inf")] * 10)[:, None]
    ids = torch.arange(40)
    mean, _ = _matched.matched_by_ids(keys, None, ids[::2], ids)
    assert torch.equal(mean, keys[::2])


def test_any_strides_and_wide_rows():
    keys = torch.randn(1100, 12).t()
    queue = torch.randn(20, 2200)[:, ::2]
    ids = torch.arange(64)[::2] % 3
    with checked(OUTPUTS):
        found = _matched.matched_by_ids(keys, queue, ids[:3], ids)
    assert_right(found, torch.cat([keys, queue]), ids[:3], ids)


def test_nothing_to_match():
    none = torch.zeros(0, dtype=torch.int64)
    mean, count = _matched.matched_by_ids(torch.zeros(0, 4), None, torch.arange(3), none)
    assert torch.equal(mean, torch.zeros(3, 4)) and torch.equal(count, torch.zeros(3).long())
    mean, count = _matched.matched_by_ids(torch.ones(3, 4), None, none, torch.arange(3))
    assert mean.shape == (0, 4) and count.shape == (0,)


def test_very_many_pairs_are_sorted(monkeypatch):
    both, arguments = problem(9, 9, 20, 4, "repeated", torch.float32)
    monkeypatch.setattr(op, "COMPARED", 9 * 29 - 1)
    with tw.backend("triton"), checked(OUTPUTS) as launches:
        found = op.matched_by_ids(*arguments)
    assert "match_rows" not in {launch.kernel for launch in launches}
    assert_right(found, both, *arguments[2:])
