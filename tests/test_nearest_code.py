"""tilewise.nearest_code: every room returns the reference's indices, whatever the data."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilewise as tw
from tests.codebook_cases import CASES
from tests.contrastive_cases import DEVICE

ROOMS = ["cpu", "triton"] if DEVICE == "cpu" else ["triton"]
OPERATORS = {"cpu": torch.ops.tilewise, "triton": torch.ops.tilewise_triton}
METRICS = ["l2", "cosine", "dot"]
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(params=ROOMS)
def room(request):
    with tw.backend(request.param):
        yield request.param


def assert_same(ours, exact):
    """Equal indices; distances equal to the last bit, NaN where the reference has NaN."""
    wrong = (ours.index != exact.index).sum()
    assert wrong == 0, f"{wrong} of {exact.index.numel()} indices differ"
    torch.testing.assert_close(ours.distance, exact.distance, rtol=0, atol=0, equal_nan=True)


def check(x, codebook, *args, **kwargs):
    assert_same(
        tw.nearest_code(x, codebook, *args, **kwargs),
        tw.reference.nearest_code(x, codebook, *args, **kwargs),
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_as_reference(room, case, metric):
    check(*case.tensors(), metric)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["normal-100x129x33", "near", "common_offset", "scales", "zeros"])
def test_every_dtype_is_exact_on_its_own_values(room, name, dtype):
    if (room, dtype) == ("triton", torch.float64):
        pytest.skip("Triton has no float64")
    case = BY_NAME[name]
    check(*case.tensors(dtype))
    check(*case.tensors(torch.float32, dtype))  # rows and codes of different dtypes
    check(*case.tensors(dtype, torch.float32))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("topk", [1, 2, 5, 16])
@pytest.mark.parametrize("name", ["near", "duplicates", "integers", "nan_codes", "no_finite_code"])
def test_topk_in_order(room, name, topk, metric):
    check(*BY_NAME[name].tensors(), metric, topk)
