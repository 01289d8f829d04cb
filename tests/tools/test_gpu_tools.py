"""The tools of a machine with a GPU, as far as a machine without one can tell."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness.measure import ROOT
from tools import gpu_environment

SEEN = "NVIDIA H100 80GB HBM3, 550.54, 345 MHz, 1980 MHz, 700.00 W"
BROKEN = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


@pytest.mark.parametrize("driver, words", [
    (SEEN, "does not see the GPU that nvidia-smi sees"),
    (BROKEN, "there is no CUDA device"), ("not there", "there is no CUDA device"),
    ("", "there is no CUDA device"),
], ids=["seen", "broken", "missing", "empty"])
def test_a_run_without_a_gpu_fails_and_says_why(monkeypatch, capsys, driver, words):
    monkeypatch.setattr(gpu_environment, "said_by", lambda *command: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_environment.main() == 1
    assert words in capsys.readouterr().err


def test_environment_of_a_gpu_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(gpu_environment, "said_by", lambda *command: SEEN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(name="H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(gpu_environment, "OPTIONAL", ("no_such_package", "torch"))
    assert gpu_environment.main() == 0
    shown = capsys.readouterr().out
    assert "H100" in shown and SEEN in shown and "headers" in shown
    assert "not installed  no_such_package\n" in shown


@pytest.mark.slow
def test_kernels_are_compiled_before_tests_run(tmp_path):
    """A process after that finds all of them."""
    code = (
        "import sys; sys.argv[1:] = ['sm_90']\n"
        "from tools import precompile\n"
        "from tilewise import _backend\n"
        "_backend.ops = lambda: ('code_sums',)\n"
        "precompile.main()\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = f"{ROOT / 'pyext'}:{ROOT}"
    compiled = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout.startswith("sm_90: compiled "), done.stderr
        compiled.append({path: path.stat().st_mtime for path in tmp_path.glob("*/*.cubin")})
    assert len(compiled[0]) >= 2 and compiled[0] == compiled[1]


def test_precompiling_without_a_device_wants_an_architecture():
    done = subprocess.run(
        [sys.executable, "-m", "tools.precompile"], cwd=ROOT, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT / 'pyext'}:{ROOT}"},
    )
    assert done.returncode == 1 and "name an architecture, such as sm_90" in done.stderr
