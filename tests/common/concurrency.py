"""The same call from several threads, and after a fork."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def assert_same_bits(threads: Callable[[int], None], call: Callable[[], Sequence[Tensor]]) -> None:
    """Of what `call` returns with each number of `threads`, which is the fixture."""
    expected = None
    for count in (1, 2, 3, 4, 4):  # the last one is a repeat
        threads(count)
        found = call()
        expected = expected or found
        assert all(map(torch.equal, found, expected)), f"{count} threads"


def in_threads(call: Callable[[], Any], count: int = 4) -> list[Any]:
    """What `call` returned in each of `count` threads."""
    results: dict[int, Any] = {}
    workers = [
        threading.Thread(target=lambda i=i: results.update({i: call()})) for i in range(count)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == count
    return list(results.values())


def holds_after_fork(check: Callable[[], bool]) -> bool:
    """Whether `check` holds in a forked process with one thread, as a DataLoader's worker is."""

    def run():
        torch.set_num_threads(1)
        os._exit(0 if check() else 1)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    return child.exitcode == 0
