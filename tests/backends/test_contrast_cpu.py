"""What all ops on pairs of features share on CPU: tiles, blocks, units for bfloat16."""

import os
import subprocess
import sys

import pytest
import torch

import tilewise as tw
from tests.common.contrastive_cases import Case, related
from tilewise import _extension

BATCHES = (4096, 4097, 4352, 4353, 5000, 6145, 6529, 8192, 12289, 32768)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dim", [256, 512, 768, 1152])
def test_every_product_has_work_for_64_threads(batch, dim):
    """Four blocks a thread, whatever the batch; equal ones but for those at the edges."""
    blocks = _extension.module.contrast_blocks(batch, batch, dim)
    assert min(map(min, blocks)) >= 4 * 64
    assert sum(logits for logits, _ in blocks) >= batch * batch / (64 * 128)


def test_few_pairs_have_few_blocks():
    count = _extension.module.contrast_blocks
    assert count(64, 64, 64) == [(1, 4)]
    assert count(0, 5, 8) == count(5, 0, 8) == []


UNITS_SCRIPT = """
import torch, tilewise as tw
from tilewise import _extension
from tests.common.contrastive_cases import CASES, Case, related
from tests.ops import test_clip_loss, test_sigmoid_loss
with tw.backend("cpu"):
    wide = [Case("odd", related(75, 133, 35)), Case("deep", related(40, 300, 1030))]
    for case in [*CASES[::3], *wide, Case("tiles", related(2100, 2190, 5))]:
        for test in (test_clip_loss, test_sigmoid_loss):
            test.check(case, torch.bfloat16)
print(_extension.build_info()["bfloat16_unit"])
"""


@pytest.mark.parametrize("unit", ["none", "avx512_bf16"])
def test_every_bfloat16_unit(unit):
    """TILEWISE_BFLOAT16_UNIT lowers what multiplies bfloat16, within the same error budget."""
    if _extension.build_info()["bfloat16_unit"] == "none":
        pytest.skip("this CPU has no unit to lower")
    environment = {**os.environ, "TILEWISE_BFLOAT16_UNIT": unit}
    child = subprocess.run(
        [sys.executable, "-c", UNITS_SCRIPT], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout.split()[-1] == unit


@pytest.mark.alone
@pytest.mark.parametrize("op", ["sigmoid_loss", "clip_loss", "info_nce"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_more_threads_than_cores(op, dtype, threads):
    """Whoever takes a block: the bits are those of one thread."""
    pair = Case("many", related(2100, 2200, 40)).features(dtype)
    expected = None
    for count in (1, 5, 16):
        threads(count)
        leaves = [x.clone().requires_grad_() for x in pair]
        loss = getattr(tw, op)(*leaves, 10.0)
        loss.backward()
        got = [loss.detach(), *(x.grad for x in leaves)]
        expected = expected or got
        assert all(map(torch.equal, got, expected)), f"{count} threads"


def test_a_depth_that_no_chunk_divides():
    """Sums over a row of ones are exact in every unit."""
    for dim in (1, 2, 15, 31, 33, 511, 512, 513, 1025):
        ones = torch.ones(70, dim, dtype=torch.bfloat16)
        loss = tw.sigmoid_loss(ones, ones, 1 / dim, positives=None)
        expected = 70 * torch.nn.functional.softplus(torch.tensor(1.0))
        torch.testing.assert_close(loss, expected)
