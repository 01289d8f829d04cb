"""A kernel has few binaries, whatever sizes come: each takes seconds to compile in training."""

import os
import subprocess
import sys

import pytest

from benchmarks.harness.measure import ROOT

# Over all sizes of one dtype: three sizes of a tile, and whether rows and columns fill the largest;
# or how D is aligned.
MOST = 4


def lines(*arguments: str) -> list[list[str]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_tools.specialisations", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    return [line.split(maxsplit=3) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_few_binaries_for_all_sizes(arch):
    found = lines("--arch", arch)
    assert len({op for op, *_ in found}) == 9
    for _, kernel, count in found:
        assert int(count) <= MOST, kernel


@pytest.mark.slow
@pytest.mark.parametrize("op", ["sigmoid_loss", "hard_negatives", "gumbel_softmax"])
def test_batches_share_binaries(op):
    """Whatever the rows, one for each size of a tile, and one more for those that fill it."""
    for _, kernel, count, sizes in lines("--op", op, "--sizes"):
        last = [size.split("x")[-1] for size in sizes.split(", ")]
        assert int(count) == len(last)
        most = MOST if kernel.endswith("_tile") else 2
        assert max(map(last.count, last)) <= most, kernel


@pytest.mark.slow
def test_a_smaller_last_batch_compiles_nothing():
    found = lines("--anew")
    assert len(found) == 9 and not any(kernels for _, *kernels in found)
