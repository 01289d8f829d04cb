"""tilewise.clip_loss: every backend against float64, within the error of the eager op."""

import pytest
import torch
import torch.nn.functional as F

import tilewise as tw
from benchmarks.baselines import eager_clip_loss
from tests.common import cross_entropy_cases
from tests.common.contrastive_cases import DEVICE, Case, ids, related
from tests.common.cross_entropy_cases import (
    CROSS_ENTROPY_CASES,
    DTYPES,
    assert_only_first_rows_count,
)

BACKENDS = ["cpu", "triton"] if DEVICE == "cpu" else ["triton"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with tw.backend(request.param):
        yield request.param


def check(case, dtype, smoothing=0.0):
    cross_entropy_cases.check("clip_loss", eager_clip_loss, case, dtype, smoothing)


SERVED = [(backend, dtype) for backend in BACKENDS for dtype in DTYPES
          if (backend, dtype) != ("triton", torch.float64)]


@pytest.mark.parametrize("backend, dtype", SERVED, ids=str, indirect=["backend"])
@pytest.mark.parametrize("case", CROSS_ENTROPY_CASES, ids=lambda case: case.name)
def test_within_error_budget(backend, case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CROSS_ENTROPY_CASES[::3], ids=lambda case: case.name)
def test_label_smoothing(backend, case, dtype):
    check(case, dtype, 0.1)


def test_label_smoothing_reaches_the_reference():
    with tw.backend("reference"):
        check(CROSS_ENTROPY_CASES[0], torch.float32, 0.1)


test_random_problems = cross_entropy_cases.random_problems(check)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_reference_is_cross_entropy(smoothing):
    image, text = Case("ce", related(20, 20, 8)).features(torch.float64)
    logits = 10 * image @ text.T
    labels = torch.arange(20)
    options = {"label_smoothing": smoothing}
    expected = sum(F.cross_entropy(x, labels, **options) for x in (logits, logits.T))
    ours = tw.reference.clip_loss(image, text, 10.0, label_smoothing=smoothing)
    torch.testing.assert_close(ours, expected / 2)


@pytest.mark.parametrize("positives", [0, 3, ids(5, 7, 3)], ids=["diagonal", "offset", "ids"])
def test_reference_gradcheck(positives):
    image, text = (x.requires_grad_() for x in Case("g", related(5, 7, 4)).features(torch.float64))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: tw.reference.clip_loss(*x, positives=positives, label_smoothing=0.1),
        (image, text, scale),
    )


def test_logits_of_minus_infinity(backend):
    """An unmatched text that no image can choose changes nothing."""
    image, text = torch.rand(3, 4) + 2, torch.randn(4, 4)
    text[3] = -3e38
    assert_only_first_rows_count(tw.clip_loss, image, text, 3)
