"""Test runs on a device, as far as a machine without one can tell: what they collect."""

import fnmatch
import os
import subprocess
import sys

import pytest

from benchmarks.harness.measure import ROOT
from tests.conftest import NOT_ON_A_DEVICE

TESTS = ROOT / "tests"


def test_files_that_need_the_interpreter_are_left_out():
    """Importing them would abort the run."""
    needing = [
        path for path in TESTS.rglob("test_*.py")
        if "from tests.triton_tools" in path.read_text() or "_adapters import" in path.read_text()
    ]
    assert len(needing) > 8
    for path in needing:
        if path.name != "test_device_runs.py":
            assert any(fnmatch.fnmatch(str(path), str(TESTS / x)) for x in NOT_ON_A_DEVICE), path


@pytest.mark.slow
def test_the_whole_folder_is_collected():
    """Nothing is made on the CPU, or asks for the interpreter; the meta device stands for a GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests"],
        capture_output=True, text=True, cwd=ROOT,
        env={**environment, "TILEWISE_TEST_DEVICE": "meta"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "tests/backends/test_nearest_code_gpu.py::" in done.stdout
    assert "_triton.py::" not in done.stdout and "test_triton_tools.py::" not in done.stdout
