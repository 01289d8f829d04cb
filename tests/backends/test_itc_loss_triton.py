"""The Triton backend of itc_loss, in the interpreter: what no other op promises."""

from dataclasses import replace

import pytest
import torch

from tests.backends.contrast_adapters import ITC, exact_itc, run_itc, truth_of_itc
from tests.backends.contrast_adapters import check_itc as check
from tests.common.budget import ROUNDINGS, error
from tests.common.contrastive_cases import Case, related, unrelated
from tests.ops.test_itc_loss import Problem, magnitudes
from tests.triton_tools.checker import MemoryFault, checked
from tilewise.kernels import _common
from tilewise.kernels import itc_loss as kernels

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
NAMES = ("loss", "d_query", "d_scale")


@pytest.fixture
def small_chunks(monkeypatch):
    for name, value in ITC.small.items():
        monkeypatch.setattr(kernels, name, value)


@pytest.mark.parametrize("name", ["query", "keys", "queue", "teacher_query"])
def test_nan_over_chunks(small_chunks, name):
    """One in the keys reaches every row's sums, those merged later as well."""
    problem = replace(ITC.chunked[0], nan=name)
    tensors = problem.tensors(torch.float32)
    truth = truth_of_itc(problem, tensors)
    for result, value in zip(NAMES, run_itc(problem, tensors), strict=True):
        assert torch.equal(value.isnan(), truth[result].isnan())


@pytest.mark.parametrize("first, second", [(-1.0, 1.0), (1.0, -1.0), (0.0, 1.0)])
def test_segments_far_apart(first, second):
    """Logits of one are e^200 times those of the other: no maximum may be taken for both."""
    problem = Problem(Case("apart", related(20, 20, 16), 100.0), 20)
    tensors = problem.tensors(torch.float32)
    tensors["keys"], tensors["queue"] = (factor * tensors["query"] for factor in (first, second))
    check(problem, torch.float32, tensors)


def passes(launches) -> int:
    """How often the tiles of a segment are computed."""
    return sum(launch.kernel.endswith("_tile") for launch in launches)


@pytest.mark.parametrize("k, q", [(0, 40), (40, 0), (40, None), (0, 0), (0, None)])
def test_a_segment_may_be_empty(k, q):
    problem = Problem(Case("segments", related(20, k, 8)), q)
    tensors = problem.tensors(torch.float32)
    with checked(ITC.outputs) as launches:
        loss, d_query, d_scale = run_itc(problem, tensors)
    assert passes(launches) == 2 * (k > 0) + 2 * bool(q)
    if not launches:
        assert loss == 0 and d_scale == 0 and torch.equal(d_query, torch.zeros(20, 8))
    check(problem, torch.float32, tensors)


@pytest.mark.parametrize("teacher", [False, True])
def test_the_loss_alone_takes_one_pass(teacher):
    problem = Problem(Case("passes", related(20, 20, 8)), None, teacher)
    for needs in ((False, False), (True, False)):
        with checked(ITC.outputs) as launches:
            run_itc(problem, problem.tensors(torch.bfloat16), needs)
        assert passes(launches) == 1 + (teacher or any(needs))


def test_candidates_of_minus_infinity_have_no_part():
    tensors = dict.fromkeys(("query", "keys", "queue", "teacher_query"))
    tensors |= {"query": torch.rand(3, 4) + 2, "keys": torch.randn(6, 4)}
    tensors["keys"][4:] = -3e38
    problem = Problem(Case("", None), teacher=False)
    fewer = tensors | {"keys": tensors["keys"][:4]}
    for ours, theirs in zip(run_itc(problem, tensors), run_itc(problem, fewer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_checker_sees_a_workspace_without_room_for_whole_tiles(monkeypatch):
    x = torch.zeros(33, 16, dtype=torch.bfloat16)
    itc = kernels.ItcLoss(x, x, torch.ones(()), None, None)
    monkeypatch.setattr(_common, "round_up", lambda n, multiple: n)
    with pytest.raises(MemoryFault), checked(ITC.outputs):
        itc.means(x, torch.zeros(2, 33), 0)


def chunk_size(b, q, dtype=torch.bfloat16, teacher=False):
    query, queue = torch.zeros(b, 16, dtype=dtype), torch.zeros(q, 16, dtype=dtype)
    itc = kernels.ItcLoss(query, query, torch.ones(()), queue, query if teacher else None)
    rows, cols = (_common.round_up(n, itc.launch.tile[i]) for i, n in enumerate(itc.size))
    stacked = 1 + teacher * (1 if dtype == torch.float32 else 2)
    assert rows * cols * query.element_size() * stacked <= kernels.CHUNK_BYTES
    return itc.size


def test_few_queries_see_a_whole_queue_at_once(monkeypatch):
    monkeypatch.setattr(_common, "architecture", lambda device: "sm_90")
    assert chunk_size(512, 57600) == (512, 57600)
    assert chunk_size(8192, 8192) == (8192, 8192)
    assert chunk_size(512, 57600, teacher=True) == (512, 57600)
    assert chunk_size(10000, 20000, torch.float32) == (6144, 8192)


def test_chunks_of_stacked_rows_fit(monkeypatch):
    """Half precision has three numbers a pair; sums of tiles are kept for all candidates."""
    monkeypatch.setattr(_common, "architecture", lambda device: "sm_90")
    assert chunk_size(10000, 20000, teacher=True) == (4096, 8192)
    assert chunk_size(8192, 57600, teacher=True) == (2944, 11392)
    assert chunk_size(512, 4000000) == (128, 786432)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_costs_the_loss_no_digit(dtype):
    """Loss and d_scale are float32: weights rounded to 8 or 11 bits may not show in them."""
    problem = Problem(Case("digits", unrelated(3, 5, 8), 5.0), 4, alpha=0.9)
    tensors = problem.tensors(dtype)
    truth, size = truth_of_itc(problem, tensors), magnitudes(problem, **exact_itc(tensors))
    ours = dict(zip(NAMES, run_itc(problem, tensors), strict=True))
    limit = ROUNDINGS[torch.float32] * torch.finfo(torch.float32).eps
    for name in ("loss", "d_scale"):
        assert error(ours[name], truth[name], size[name]) < limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_weights_sum_to_one(dtype):
    """What all candidates have in common, their mean has as well."""
    query, keys = torch.tensor([[0.0, 1.0]] * 37), torch.ones(37, 2)
    keys[:, 1] = torch.linspace(0, 1, 37)
    tensors = {"query": query.to(dtype), "keys": keys.to(dtype)}
    tensors |= {"queue": None, "teacher_query": None}
    _, d_query, _ = run_itc(Problem(Case("common", None, 1.0)), tensors)
    assert d_query[:, 0].abs().max() < 1e-6 / 37


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_well_separated_pair_keeps_its_digits(dtype):
    """1 - p is 4e-5 of a p of 1, which in half precision is 1."""
    problem = Problem(Case("", None, 81.0), teacher=False)
    tensors = {"query": torch.tensor([[1.0, 0.875], [0.875, 1.0]]), "keys": torch.eye(2)}
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    tensors |= {"queue": None, "teacher_query": None}
    _, d_query, _ = run_itc(problem, tensors)
    assert (d_query / truth_of_itc(problem, tensors)["d_query"] - 1).abs().max() < 5e-3


def test_small_weights_of_float16_are_not_lost():
    """A hundred candidates of 2^-27 each: float16 alone ends at 2^-24."""
    problem = Problem(Case("tiny", None, 27 * 0.6931), teacher=False)
    keys = torch.zeros(100, 2)
    keys[0, 0], keys[1:, 1] = 1.0, 1.0
    tensors = {"query": torch.tensor([[1.0, 0.0]]), "keys": keys}
    tensors = {name: x.half() for name, x in tensors.items()}
    tensors |= {"queue": None, "teacher_query": None}
    _, d_query, _ = run_itc(problem, tensors)
    assert (d_query[0, 1] / truth_of_itc(problem, tensors)["d_query"][0, 1] - 1).abs() < 1e-3
