"""Test runs on a device, as far as a machine without one can tell: what they collect."""

import fnmatch
import os
import re
import subprocess
import sys

import pytest
import torch

import tilewise as tw
from benchmarks.harness.measure import ROOT
from tests.common.device_cases import STEPS
from tests.conftest import NOT_ON_A_DEVICE
from tilewise import _backend

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


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_device_tests_run(name):
    """On the CPU, so that a GPU does not find a mistake in them."""
    results = STEPS[name](40, "cpu")()
    assert results and all(isinstance(x, torch.Tensor) for x in results)
    again = STEPS[name](40, "cpu")()
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


def test_every_op_and_module_has_a_step():
    modules = {
        f"nn.{name}" for name in tw.nn.__all__
        if isinstance(found := getattr(tw.nn, name), type)
        and (issubclass(found, torch.nn.Module) or name == "DiagonalGaussian")
    }
    assert len(modules) > 9 and modules <= {name.split()[0] for name in STEPS}
    assert {*_backend.ops()} <= {name.split()[0] for name in STEPS}


@pytest.mark.slow
def test_dry_run_of_the_first_minutes_on_a_gpu(tmp_path):
    """Every stage ends and says how; what is missing is named."""
    done = subprocess.run(
        [ROOT / "tools" / "first_gpu.sh", "--dry-run", tmp_path / "out"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHON": sys.executable},
    )
    lines = (tmp_path / "out" / "stages.csv").read_text().splitlines()
    stages = dict(line.split(",")[:2] for line in lines[1:])
    expected = dict.fromkeys(("environment", "tests", "filter", "bench"), "0")
    skipped = dict.fromkeys(("compile", "sanitizer"), "skipped: a dry run")
    assert stages == expected | skipped, done.stdout + done.stderr
    assert done.returncode == 0 and (tmp_path / "out" / "filter.log").read_text()


def test_the_first_minutes_on_a_gpu_are_eight():
    """Stages, and the grace that each has to end in; the sanitizer has two tools."""
    script = (ROOT / "tools" / "first_gpu.sh").read_text()
    grace = int(re.search(r"--kill-after=(\d+)", script)[1])
    real = script.split("if [ $DRY = 1 ]; then")[1].split("\nelse\n")[1]
    stages = re.findall(r"stage (\S+) (\d+) ", real)
    times = {name: (int(limit) + grace) * (1 + ("$tool" in name)) for name, limit in stages}
    assert len(times) > 7 and sum(times.values()) <= 8 * 60, times
