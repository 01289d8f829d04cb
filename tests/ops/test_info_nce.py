"""tilewise.info_nce: every backend against float64, within the error of the eager op."""

import pytest
import torch
import torch.nn.functional as F

import tilewise as tw
from benchmarks.baselines import eager_info_nce, sentence_transformers_loss
from benchmarks.harness.measure import peak_bytes
from tests.common import cross_entropy_cases
from tests.common.concurrency import assert_same_bits
from tests.common.contrastive_cases import DEVICE, Case, ids, related, unrelated
from tests.common.cross_entropy_cases import (
    CROSS_ENTROPY_CASES,
    DTYPES,
    ROWS,
    assert_only_first_rows_count,
)

BACKENDS = ["cpu", "triton"] if DEVICE == "cpu" else ["triton"]
CASES = [
    Case("hard-negatives", related(16, 80, 24), logit_scale=20.0),
    Case("hard-negatives-scale-100", unrelated(5, 200, 16), logit_scale=100.0),
    Case("one-query", related(1, 300, 8)),
    Case("several-keys", related(30, 90, 8), positives=ids(30, 90, 12)),
    *CROSS_ENTROPY_CASES,
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with tw.backend(request.param):
        yield request.param


def check(case, dtype, smoothing=0.0):
    cross_entropy_cases.check("info_nce", eager_info_nce, case, dtype, smoothing, sides=(ROWS,))


# The interpreter is slow, and test_clip_loss.py runs the same kernels on every case.
SERVED = [
    pytest.param(backend, dtype, case, id=f"{case.name}-{backend}-{dtype}")
    for backend in BACKENDS for dtype in DTYPES if (backend, dtype) != ("triton", torch.float64)
    for case in (CASES[::4] if backend == "triton" and DEVICE == "cpu" else CASES)
]


@pytest.mark.parametrize("backend, dtype, case", SERVED, indirect=["backend"])
def test_within_error_budget(backend, dtype, case):
    check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: case.name)
def test_label_smoothing(backend, case, dtype):
    check(case, dtype, 0.1)


test_random_problems = cross_entropy_cases.random_problems(check)


def test_several_tiles_are_one_problem():
    """More rows and columns than a tile of the C++ backend has."""
    check(Case("s", related(2100, 2200, 4), logit_scale=30.0), torch.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_reference_is_cross_entropy(smoothing):
    query, keys = Case("ce", related(20, 50, 8)).features(torch.float64)
    expected = F.cross_entropy(
        10 * query @ keys.T, torch.arange(20, device=DEVICE), label_smoothing=smoothing
    )
    ours = tw.reference.info_nce(query, keys, 10.0, label_smoothing=smoothing)
    torch.testing.assert_close(ours, expected)


def test_several_keys_share_a_target():
    """The mean over a query's keys of their log-probabilities."""
    query, keys = Case("share", related(2, 4, 8)).features(torch.float64)
    names = [torch.tensor(x, device=DEVICE) for x in ([5, 7], [5, 5, 9, 5])]
    log_p = torch.log_softmax(3 * query[0] @ keys.T, 0)
    ours = tw.reference.info_nce(query, keys, 3.0, positives=tuple(names))
    torch.testing.assert_close(ours, -(log_p[0] + log_p[1] + log_p[3]) / 3)


@pytest.mark.parametrize("positives", [0, 3, ids(5, 7, 3)], ids=["diagonal", "offset", "ids"])
def test_reference_gradcheck(positives):
    query, keys = (x.requires_grad_() for x in Case("g", related(5, 7, 4)).features(torch.float64))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: tw.reference.info_nce(*x, positives=positives, label_smoothing=0.1),
        (query, keys, scale),
    )


def test_is_what_sentence_transformers_computes(backend):
    """Anchors, their positives, and two hard negatives each: rows of any length."""
    anchor, positive, *negatives = torch.randn(4, 12, 16, device=DEVICE).requires_grad_()
    columns = [positive, *negatives]
    normal = [F.normalize(x, dim=1) for x in (anchor, torch.cat(columns))]
    results = []
    for loss in (tw.info_nce(*normal, 20.0), sentence_transformers_loss(anchor, columns, 20.0)):
        results.append([loss.detach(), *torch.autograd.grad(loss, [anchor, *columns])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_two_directions_are_clip_loss(backend):
    image, text = Case("clip", related(30, 45, 12)).features(torch.float32)
    for positives, back in ((4, -4), (ids(30, 45, 9), ids(30, 45, 9)[::-1])):
        forth = tw.info_nce(image, text, 14.3, positives=positives, label_smoothing=0.1)
        both = forth + tw.info_nce(text, image, 14.3, positives=back, label_smoothing=0.1)
        expected = tw.clip_loss(image, text, 14.3, positives=positives, label_smoothing=0.1)
        torch.testing.assert_close(both / 2, expected)


def test_blocks_of_queries_are_the_batch(backend):
    """Each process's part in a loss over gathered keys."""
    query, keys = Case("blocks", related(24, 60, 12)).features(torch.float32)
    blocks = [tw.info_nce(query[r : r + 8], keys, 9.0, positives=r) for r in (0, 8, 16)]
    torch.testing.assert_close(sum(blocks) / 3, tw.info_nce(query, keys, 9.0))


def test_a_key_of_minus_infinity_changes_nothing(backend):
    query, keys = torch.rand(3, 4, device=DEVICE) + 2, torch.randn(4, 4, device=DEVICE)
    keys[3] = -3e38
    assert_only_first_rows_count(tw.info_nce, query, keys, 3)


@pytest.mark.skipif(DEVICE != "cpu", reason="the C++ backend, on CPU tensors")
@pytest.mark.parametrize("flags", [(False, True, False), (True, False, True), (False,) * 3])
def test_only_the_gradients_asked_for(flags):
    arguments = *Case("f", related(20, 30, 8)).features(torch.float32), torch.tensor(9.0)
    rest = 0, None, None, 0.0
    loss, *gradients = torch.ops.tilewise.info_nce(*arguments, *rest, *flags)
    full = torch.ops.tilewise.info_nce(*arguments, *rest, True, True, True)
    assert torch.equal(loss, full[0])
    for flag, gradient, whole in zip(flags, gradients, full[1:], strict=True):
        assert torch.equal(gradient, whole) if flag else gradient.shape == (0,)


def test_same_bits_for_every_thread_count(threads):
    inputs = *Case("t", related(700, 900, 24)).features(torch.float32), torch.tensor(20.0)
    leaves = [x.requires_grad_() for x in inputs]

    def call():
        loss = tw.info_nce(*leaves, label_smoothing=0.1)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    assert_same_bits(threads, call)


def prepare(rows: int):
    query = torch.randn(rows, 64, requires_grad=True)
    keys = torch.randn(2 * rows, 64, requires_grad=True)
    scale = torch.tensor(10.0, requires_grad=True)
    leaves = [query, keys, scale]
    return lambda: torch.autograd.grad(tw.info_nce(*leaves), leaves)


@pytest.mark.alone
def test_memory_grows_with_the_rows_alone():
    """Eager keeps matrices of rows x 2 rows: 268 MB each at 5792."""
    small, large = (peak_bytes(prepare, rows=rows) for rows in (2896, 5792))
    assert large < 100e6 and large - small < 20e6


def test_the_reference_has_every_option():
    arguments = *Case("options", related(6, 9, 4)).features(torch.float32), 5.0
    options = {"positives": 2, "label_smoothing": 0.3}
    with tw.backend("reference"):
        expected = tw.info_nce(*arguments, **options)
    torch.testing.assert_close(tw.info_nce(*arguments, **options), expected)
