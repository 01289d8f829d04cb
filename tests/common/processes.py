"""Processes of a distributed run that many tests share, since starting one takes seconds.

No test can hang: who does not answer in time is killed, and others are started for the next test.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.common.contrastive_cases import DEVICE
from tests.common.fresh import CONTEXT

WORLDS = (2, 3, 4)
# `pytestmark` of a file whose tests run in them: all in one worker, which starts them once.
OF_PROCESSES = [
    pytest.mark.skipif(DEVICE != "cpu", reason="gloo, on CPU tensors"),
    pytest.mark.xdist_group("processes"),
]


class Failed(Exception):
    """A process raised an error, or did not answer."""


def _serve(rank: int, pipe) -> None:
    """Runs what comes through the pipe, in a group of as many processes as it says."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
    present = None
    while True:
        try:
            wanted, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if wanted != present:
                if present:
                    dist.destroy_process_group()
                folder, world, seconds = present = wanted
                dist.init_process_group(
                    "gloo", init_method=f"file://{folder}", rank=rank, world_size=world,
                    timeout=datetime.timedelta(seconds=seconds),
                )
            answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)


class Processes:
    """Up to `count` processes, started when they are first needed."""

    def __init__(self, count: int = max(WORLDS)):
        self.count = count
        self.workers: list[tuple[Any, Any]] = []
        self.folder = Path(tempfile.mkdtemp(prefix="tilewise-processes-"))
        self.groups = 0
        self.present: tuple | None = None

    def _start(self) -> None:
        for rank in range(self.count):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def kill(self) -> None:
        for process, pipe in self.workers:
            process.kill()
            process.join()
            pipe.close()
        self.workers, self.present = [], None

    def run(
        self, world: int, function: Callable, *arguments, seconds: float = 120, group: float = 60
    ) -> list[Any]:
        """What `function(*arguments)` returns in each of `world` processes, by rank.

        Args:
            function: of a module, as pickle wants it; torch.distributed is initialised for it.
            seconds: after which processes that have not answered are killed.
            group: the timeout of the process group.

        Raises:
            Failed: with the traceback of each process that failed.
        """
        answers = self.attempt(world, function, *arguments, seconds=seconds, group=group)
        errors = [f"rank {r}: {text}" for r, (good, text) in enumerate(answers) if not good]
        if errors:
            raise Failed("\n".join(errors))
        return [answer for _, answer in answers]

    def attempt(
        self, world: int, function: Callable, *arguments, seconds: float = 120, group: float = 60
    ) -> list[tuple[bool, Any]]:
        """Of each process, whether it succeeded, and what it returned or its traceback."""
        if not self.workers:
            self._start()
        if self.present is None or self.present[1:] != (world, group):
            self.groups += 1
            self.present = str(self.folder / str(self.groups)), world, group
        asked = self.workers[:world]
        for _, pipe in asked:
            pipe.send((self.present, function, arguments))
        end = time.monotonic() + seconds
        answers = [self._answer(pipe, end) for _, pipe in asked]
        if not all(good for good, _ in answers):  # the group may be broken: the next gets a new one
            lost = any(text.startswith("no answer") for good, text in answers if not good)
            self.kill() if lost else setattr(self, "present", None)
        return answers

    @staticmethod
    def _answer(pipe, end: float) -> tuple[bool, Any]:
        try:
            if pipe.poll(max(end - time.monotonic(), 0)):
                return pipe.recv()
        except (EOFError, ConnectionResetError):
            return False, "no answer: the process died"
        return False, "no answer in time"


def processes(count: int = 1) -> Processes:
    """At least so many, which all tests of this process share."""
    return _shared(max(count, *WORLDS))


@functools.cache
def _shared(count: int) -> Processes:
    shared = Processes(count)
    atexit.register(shutil.rmtree, shared.folder, ignore_errors=True)  # last in, first out
    atexit.register(shared.kill)
    return shared
