"""Fresh processes: forks of one that has imported torch, which takes long, and nothing of ours."""

import contextlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.multiprocessing

from benchmarks.harness import measure

START = "forkserver"
CONTEXT = multiprocessing.get_context(START)
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "hypothesis", "pytest"])


class Ended(NamedTuple):
    """What a process left behind."""

    returncode: int
    stdout: str
    stderr: str


def run(code: str, **environment: str) -> Ended:
    """Runs Python code in a process with these variables besides those of this one."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = code, {**os.environ, **environment}, folder
        process = CONTEXT.Process(target=_execute, args=arguments)
        process.start()
        process.join()
        texts = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
        return Ended(process.exitcode, *texts)


def _execute(code: str, environment: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    torch.set_num_threads(1)
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def run_all(function: Callable, count: int, *arguments) -> None:
    """Runs `function(rank, *arguments)` in so many processes, all of which must succeed."""
    torch.multiprocessing.start_processes(function, arguments, count, start_method=START)


class _Meter:
    """What `benchmarks.harness.measure.Meter` is, in a fork."""

    def __init__(self, prepare: Callable):
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_measure, args=(prepare, theirs))
        self.process.start()
        theirs.close()

    def peak_bytes(self, **case) -> int:
        self.pipe.send(case)
        return self.pipe.recv()


def _measure(prepare: Callable, pipe) -> None:
    with contextlib.suppress(EOFError):
        while True:
            case = pipe.recv()
            pipe.send(measure.peak_here(prepare(**case), case.get("device", "cpu")))


def peak_bytes_each(prepare: Callable[..., measure.Call], cases: list[dict]) -> list[int]:
    """`measure.peak_bytes_each`, in a process that starts at once."""
    meter = _Meter(prepare)
    try:
        return measure.peak_bytes_each(prepare, cases, meter)
    finally:
        meter.pipe.close()
        meter.process.join()
