"""The Triton backend of itc_loss, in the interpreter: what its shape makes worth testing."""

import inspect
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import tilewise as tw
from benchmarks.baselines import eager_itc_loss
from tests.common.budget import ROUNDINGS, assert_within_budget, error
from tests.common.contrastive_cases import Case, ids, related, unrelated
from tests.ops.test_itc_loss import Problem, magnitudes, outputs
from tests.triton_tools import interpreter  # noqa: F401  (its corrections)
from tests.triton_tools.checker import MemoryFault, checked
from tilewise.kernels import _common, _contrast
from tilewise.kernels import itc_loss as kernels
from tilewise.reference._matches import matches

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
NAMES = ("loss", "d_query", "d_scale")
OUTPUTS = {
    "itc_sums_tile": ["parts_ptr"],
    "itc_weights_tile": ["weights_ptr", "rest_ptr", "sums_ptr"],
}


def run(problem: Problem, tensors, needs=(True, True)):
    parts = [x.double() for x in (tensors["keys"], tensors["queue"]) if x is not None]
    candidates = torch.cat(parts).nan_to_num()
    pairs = matches(tensors["query"], candidates, problem.case.positives).double()
    count = pairs.sum(1).long()
    matched = (pairs @ candidates / count.clamp(min=1).unsqueeze(1)).float()
    return kernels.itc_loss(
        tensors["query"], tensors["keys"], torch.tensor(problem.case.logit_scale),
        tensors["queue"], tensors["teacher_query"], torch.tensor(problem.alpha), matched, count,
        *needs,
    )


def exact(tensors):
    return {name: None if x is None else x.double() for name, x in tensors.items()}


def truth_of(problem: Problem, tensors):
    return outputs(tw.reference.itc_loss, problem, exact(tensors), torch.float64)


def check(problem: Problem, dtype, tensors=None):
    tensors = tensors or problem.tensors(dtype)
    ours = dict(zip(NAMES, run(problem, tensors), strict=True))
    assert all(value.dtype == torch.float32 for value in ours.values())
    eager = outputs(eager_itc_loss, problem, tensors, dtype)
    ours["d_query"] = ours["d_query"].to(dtype)
    truth = truth_of(problem, tensors)
    assert_within_budget(ours, eager, truth, magnitudes(problem, **exact(tensors)))


@pytest.fixture
def launches(monkeypatch):
    """Checks each launch; holds the kernel's name and the arguments of all."""
    seen, plain = [], kernels.ItcLoss.run

    def checked_run(self, kernel, *arguments, **constants):
        name = kernel.fn.__name__
        with checked(kernel, OUTPUTS[name]) as launched:
            plain(self, kernel, *arguments, **constants)
        seen.extend((name, launch) for launch in launched)

    monkeypatch.setattr(kernels.ItcLoss, "run", checked_run)
    return seen


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of one tile by one and a half, two by one without a teacher in half precision.

    So that small problems have many.
    """
    monkeypatch.setattr(kernels, "CHUNK_ROWS", 64)
    monkeypatch.setattr(kernels, "CHUNK_COLS", 48)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 64 * 64 * 2)


CHUNKED = [
    Problem(Case("chunks", related(40, 50, 20)), 20),
    Problem(Case("chunks-aligned", related(32, 64, 16)), 32),
    Problem(Case("chunks-no-teacher", related(70, 50, 20), 14.3), 20, teacher=False),
    Problem(Case("chunks-across", related(40, 31, 20), positives=10), 50),
    Problem(Case("chunks-ids", related(40, 50, 20), positives=ids(40, 70, 40)), 20),
    Problem(Case("chunks-no-queue", related(40, 60, 20)), None),
    Problem(Case("chunks-scale-100", unrelated(40, 50, 20), 100.0), 20),
    Problem(Case("chunks-scale-minus-100", unrelated(40, 50, 20), -100.0), 20),
]
SMALL = Problem(Case("small", related(33, 40, 20)), 5)


@pytest.mark.parametrize("problem", CHUNKED, ids=lambda problem: problem.name)
def test_within_error_budget_over_chunks(small_chunks, problem):
    check(problem, torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("problem", CHUNKED[:3], ids=lambda problem: problem.name)
def test_half_precision_over_chunks(small_chunks, problem, dtype):
    check(problem, dtype)


@pytest.mark.parametrize("name", ["query", "keys", "queue", "teacher_query"])
def test_nan_over_chunks(small_chunks, name):
    """One in the keys reaches every row's sums, those merged later as well."""
    problem = replace(CHUNKED[0], nan=name)
    tensors = problem.tensors(torch.float32)
    truth = truth_of(problem, tensors)
    for result, value in zip(NAMES, run(problem, tensors), strict=True):
        assert torch.equal(value.isnan(), truth[result].isnan())


@pytest.mark.parametrize("first, second", [(-1.0, 1.0), (1.0, -1.0), (0.0, 1.0)])
def test_segments_far_apart(first, second):
    """Logits of one are e^200 times those of the other: no maximum may be taken for both."""
    problem = Problem(Case("apart", related(20, 20, 16), 100.0), 20)
    tensors = problem.tensors(torch.float32)
    tensors["keys"], tensors["queue"] = (factor * tensors["query"] for factor in (first, second))
    check(problem, torch.float32, tensors)


@pytest.mark.parametrize("kind, dtype", [("half", torch.bfloat16), ("ieee", torch.float32)])
def test_descriptors_and_pointers_agree(monkeypatch, kind, dtype):
    """Whichever a tile does not use is tried here."""
    tile = kernels.TILES["interpreter", kind]
    for problem in (SMALL, replace(CHUNKED[1], queue=None)):
        tensors = problem.tensors(dtype)
        usual = run(problem, tensors)
        with monkeypatch.context() as patch:
            patch.setitem(kernels.TILES, ("interpreter", kind), tile._replace(tma=not tile.tma))
            assert all(map(torch.equal, usual, run(problem, tensors)))


@pytest.mark.parametrize("pieces", [1, 4])
def test_pieces_are_put_together(monkeypatch, pieces):
    for kind, dtype in (("ieee", torch.float32), ("half", torch.float16)):
        tile = kernels.TILES["interpreter", kind]._replace(pieces=pieces)
        monkeypatch.setitem(kernels.TILES, ("interpreter", kind), tile)
        check(SMALL, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(64, 32, 32, 64), (33, 65, 17, 7), (1, 1, 1, 1), (40, 20, 0, 3)], ids=str
)
def test_memory_accesses(launches, shape, dtype):
    *sizes, queue = shape
    problem = Problem(Case("memory", related(*sizes)), queue)
    run(problem, problem.tensors(dtype))
    names = [name for name, _ in launches]
    assert names == ["itc_sums_tile"] * 4 + ["itc_weights_tile"] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_memory_accesses_over_chunks(launches, small_chunks, dtype):
    problem = CHUNKED[4]
    run(problem, problem.tensors(dtype))
    rows, cols = 2, 2 + 1  # chunks: of rows, of columns in both segments
    assert len(launches) == 4 * rows * cols


@pytest.mark.parametrize("k, q", [(0, 40), (40, 0), (40, None), (0, 0), (0, None)])
def test_a_segment_may_be_empty(launches, k, q):
    problem = Problem(Case("segments", related(20, k, 8)), q)
    tensors = problem.tensors(torch.float32)
    loss, d_query, d_scale = run(problem, tensors)
    assert len(launches) == (4 if k or q else 0)
    if not launches:
        assert loss == 0 and d_scale == 0 and torch.equal(d_query, torch.zeros(20, 8))
    check(problem, torch.float32, tensors)


def test_checker_sees_a_workspace_without_room_for_whole_tiles():
    x = torch.zeros(33, 16, dtype=torch.bfloat16)
    itc = kernels.ItcLoss(x, x, torch.ones(()), None, None)
    chunk, = itc.chunks(itc.query)
    with pytest.raises(MemoryFault), checked(
        kernels.itc_weights_tile, OUTPUTS["itc_weights_tile"]
    ):
        itc.weigh(chunk, torch.zeros(33), torch.empty(1, 33, 33, dtype=torch.bfloat16))


def test_workspace_grows_with_nothing(monkeypatch, launches):
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1 << 13)
    monkeypatch.setattr(kernels, "CHUNK_ROWS", 64)
    monkeypatch.setattr(kernels, "CHUNK_COLS", 32)
    for b, q in ((32, 40), (96, 40), (32, 130)):
        problem = Problem(Case("memory", related(b, 20, 4)), q)
        run(problem, problem.tensors(torch.float16))
    sizes = [
        launch[name].untyped_storage().nbytes()
        for _, launch in launches for name in ("weights_ptr", "parts_ptr") if name in launch
    ]
    assert max(sizes) <= 1 << 13


def chunk_size(b, q, dtype=torch.bfloat16, teacher=False):
    query, queue = torch.zeros(b, 16, dtype=dtype), torch.zeros(q, 16, dtype=dtype)
    itc = kernels.ItcLoss(query, query, torch.ones(()), queue, query if teacher else None)
    rows, cols = (_common.round_up(n, itc.tile[i]) for i, n in enumerate(itc.size))
    assert rows * cols * query.element_size() * itc.splits <= kernels.CHUNK_BYTES
    return itc.size


def test_few_queries_see_a_whole_queue_at_once():
    assert chunk_size(512, 57600) == (512, 57600)
    assert chunk_size(512, 57600, teacher=True) == (512, 57600)
    assert chunk_size(8192, 8192) == (8192, 8192)
    assert chunk_size(10000, 20000, teacher=True) == (4096, 8192)
    assert chunk_size(10000, 20000, torch.float32) == (4096, 8192)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_offsets_beyond_31_bits(tmp_path, dtype):
    """Rows so far apart that the last one starts after 2^31 elements, in sparse files."""
    stride, rows = 2**27, 20
    problem = Problem(Case("far", related(rows, rows, 16)), rows)
    near, far = problem.tensors(dtype), {}
    for name, x in near.items():
        shape = (stride * (rows - 1) + 16,)
        file = np.memmap(tmp_path / name, x.numpy().dtype, "w+", shape=shape)
        far[name] = torch.from_numpy(file).as_strided((rows, 16), (stride, 1)).copy_(x)
    assert all(map(torch.equal, run(problem, far), run(problem, near)))


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=2)), ids=str)
def test_only_the_gradients_asked_for(launches, flags, teacher):
    problem = Problem(Case("flags", related(33, 20, 5)), None, teacher)
    tensors = problem.tensors(torch.bfloat16)
    everything = run(problem, tensors)
    launches.clear()
    loss, *gradients = run(problem, tensors, flags)
    assert len(launches) == 1 + 2 * teacher + any(flags)  # the student's loss takes one pass
    assert torch.equal(loss, everything[0]) and loss.shape == ()
    for flag, gradient, full in zip(flags, gradients, everything[1:], strict=True):
        assert torch.equal(gradient, full) if flag else gradient.shape == (0,)
    storages = [x.untyped_storage() for x in (loss, *gradients)]
    pointers = [storage.data_ptr() for storage in storages if storage.nbytes()]
    assert len(set(pointers)) == len(pointers)


def test_runs_below_autograd_and_autocast():
    problem = Problem(Case("a", related(20, 20, 8)), 20)
    tensors = problem.tensors(torch.float32)
    plain = run(problem, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = run(problem, {name: x.requires_grad_() for name, x in tensors.items()})
    assert all(map(torch.equal, plain, values)) and not any(x.requires_grad for x in values)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_costs_the_loss_no_digit(dtype):
    """Loss and d_scale are float32: weights rounded to 8 or 11 bits may not show in them."""
    problem = Problem(Case("digits", unrelated(3, 5, 8), 5.0), 4, alpha=0.9)
    tensors = problem.tensors(dtype)
    truth, size = truth_of(problem, tensors), magnitudes(problem, **exact(tensors))
    ours = dict(zip(NAMES, run(problem, tensors), strict=True))
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
    _, d_query, _ = run(Problem(Case("common", None, 1.0)), tensors)
    assert d_query[:, 0].abs().max() < 1e-6 / 37


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_well_separated_pair_keeps_its_digits(dtype):
    """1 - p is 4e-5 of a p of 1, which in half precision is 1."""
    problem = Problem(Case("", None, 81.0), teacher=False)
    tensors = {"query": torch.tensor([[1.0, 0.875], [0.875, 1.0]]), "keys": torch.eye(2)}
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    tensors |= {"queue": None, "teacher_query": None}
    _, d_query, _ = run(problem, tensors)
    assert (d_query / truth_of(problem, tensors)["d_query"] - 1).abs().max() < 5e-3


def test_small_weights_of_float16_are_not_lost():
    """A hundred candidates of 2^-27 each: float16 alone ends at 2^-24."""
    problem = Problem(Case("tiny", None, 27 * 0.6931), teacher=False)
    keys = torch.zeros(100, 2)
    keys[0, 0], keys[1:, 1] = 1.0, 1.0
    tensors = {"query": torch.tensor([[1.0, 0.0]]), "keys": keys}
    tensors = {name: x.half() for name, x in tensors.items()}
    tensors |= {"queue": None, "teacher_query": None}
    _, d_query, _ = run(problem, tensors)
    assert (d_query[0, 1] / truth_of(problem, tensors)["d_query"][0, 1] - 1).abs() < 1e-3


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_follows_torchs_precision_setting(monkeypatch, precision):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    problem = Problem(Case("precision", unrelated(64, 64, 64)), None)
    tensors = problem.tensors(torch.float32)
    truth = truth_of(problem, tensors)["d_query"]
    got = run(problem, tensors)[1].double()
    low, high = {"highest": (0, 2e-6), "high": (0, 5e-6), "medium": (1e-5, 1e-2)}[precision]
    assert low <= ((got - truth).norm() / truth.norm()).item() < high


def test_same_bits_on_every_run(small_chunks):
    tensors = CHUNKED[0].tensors(torch.bfloat16)
    assert all(map(torch.equal, run(CHUNKED[0], tensors), run(CHUNKED[0], tensors)))


def test_float64_is_refused():
    with pytest.raises(TypeError, match="query.*float64"):
        run(CHUNKED[0], CHUNKED[0].tensors(torch.float64))


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_130", "gfx942", "gfx1100"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_architecture_has_a_tile(arch, dtype):
    kind = _common.product_kind(dtype, arch)
    tile = _common.choose_tile(kernels.TILES, _contrast.DEFAULT_TILES, arch, kind)
    assert tile.cols % tile.pieces == 0 and tile.depth % 16 == 0


def test_takes_the_operators_arguments():
    operator = torch.ops.tilewise.itc_loss.default._schema.arguments
    assert [a.name for a in operator] == list(inspect.signature(kernels.itc_loss).parameters)
