"""How long calls take, side by side, and how much memory one call adds at its peak."""

import ctypes
import gc
import importlib.util
import inspect
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
ANSWER = "peak bytes: "  # begins a line of what the process of a `Meter` prints
LEAST, WARM_ROUND, LONG_ROUND = 5, 5.0, 20.0  # rounds, seconds, seconds
Call = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a list of numbers."""

    median: float
    q25: float
    q75: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of `values`; of a single one, that one three times."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q25, median, q75 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q25, q75)


def time_once(call: Call, device: str) -> float:
    """Milliseconds of one call by the wall clock; of a GPU's, until it has ended."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    begin = time.perf_counter()
    kept = call()  # so that freeing the result is not timed
    wait()
    elapsed = 1e3 * (time.perf_counter() - begin)
    del kept
    return elapsed


def time_interleaved(
    calls: dict[str, Call], device: str = "cpu", seconds: float = 12.0, most: int = 31
) -> dict[str, list[float]]:
    """Milliseconds of every call in every round.

    In each round every call runs once, so that a slow moment of the machine meets all of them and
    the ratio of two calls in one round stays fair. Rounds go on for about `seconds`, at least
    `LEAST` and at most `most`; where one takes longer than `LONG_ROUND` seconds, two are enough.
    The first round warms up and is thrown away, unless it takes longer than `WARM_ROUND` seconds:
    of such calls, warming up is a small part.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    first = _round(calls, times, device)
    least = LEAST if first < LONG_ROUND else 2
    done = 1
    if first < WARM_ROUND:
        times = {name: [] for name in calls}
        done = 0
    while done < least or (done < most and time.perf_counter() - begin < seconds):
        _round(calls, times, device)
        done += 1
    return times


def _round(calls: dict[str, Call], times: dict[str, list[float]], device: str) -> float:
    """Times every call once, and returns the seconds that took."""
    begin = time.perf_counter()
    for name, call in calls.items():
        times[name].append(time_once(call, device))
    return time.perf_counter() - begin


def times_longer(call: Call, other: Call, rounds: int = 3) -> float:
    """How many times as long a call takes as another one, each at its best."""
    best = []
    for one in (call, other):
        one()
        best.append(min(time_once(one, "cpu") for _ in range(rounds)))
    return best[0] / best[1]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def peak_bytes(prepare: Callable[..., Call], **kwargs: Any) -> int:
    """Extra bytes at the peak of one call, measured in a fresh process.

    Args:
        prepare: a function at the top level of a file. `prepare(**kwargs)` runs in the new process
            before anything is measured: it makes and touches the inputs, may call something small
            to load libraries, and returns the call to measure. What that call returns stays alive.
        kwargs: JSON values. `device="cuda"` among them reads the GPU allocator's peak instead of
            the process's resident memory.

    Raises:
        ValueError: `prepare` is a lambda or a nested function.
        RuntimeError: the process failed or was killed; the text carries the end of its output.

    Example:
        >>> def prepare(rows):
        ...     x = torch.ones(rows, 512)
        ...     return lambda: x @ x.T
        >>> peak_bytes(prepare, rows=8192)  # about 8192 * 8192 * 4
    """
    return peak_bytes_each(prepare, [kwargs])[0]


def peak_bytes_each(
    prepare: Callable[..., Call], cases: Sequence[dict[str, Any]], meter: "Meter | None" = None
) -> list[int]:
    """`peak_bytes` of several calls, one after the other in one fresh process, or in `meter`'s.

    Where the system does not let a process reset its peak, each gets a process of its own.
    """
    on_gpu = all(str(case.get("device", "")).startswith("cuda") for case in cases)
    if not on_gpu and not _reset_peak():
        return [_alone(prepare, case) for case in cases]
    if meter is not None:
        return [meter.peak_bytes(**case) for case in cases]
    with Meter(prepare) as own:
        return [own.peak_bytes(**case) for case in cases]


def _alone(prepare: Callable[..., Call], case: dict[str, Any]) -> int:
    with Meter(prepare) as meter:
        return meter.peak_bytes(**case)


class Meter:
    """A process in which `peak_bytes` of one call after the other is measured.

    It starts with the first call, since that takes seconds.
    """

    def __init__(self, prepare: Callable[..., Call]):
        if prepare.__qualname__ != prepare.__name__ or not prepare.__name__.isidentifier():
            raise ValueError(f"prepare: expected a top-level function, got {prepare.__qualname__}")
        self._name = prepare.__name__
        self._target = [str(Path(inspect.getfile(prepare)).resolve()), prepare.__name__]
        self._child: subprocess.Popen | None = None

    def peak_bytes(self, **case: Any) -> int:
        """Extra bytes at the peak of the call `prepare(**case)`; RuntimeError where it fails."""
        if self._child is None:
            command = [sys.executable, "-m", "benchmarks.harness.measure", *self._target]
            self._errors = tempfile.TemporaryFile("w+")
            self._child = subprocess.Popen(
                command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._errors,
            )
        answer = self._ask(self._child, json.dumps(case))
        if answer.startswith(ANSWER):
            return int(answer.removeprefix(ANSWER))
        status = self._child.wait()
        self._errors.seek(0)
        text = self._errors.read()[-2000:]
        self._child = None
        raise RuntimeError(f"measuring {self._name} failed with status {status}:\n{text}")

    @staticmethod
    def _ask(child: subprocess.Popen, question: str) -> str:
        """Its answer; empty where it ends without one."""
        try:
            child.stdin.write(question + "\n")
            child.stdin.flush()
        except BrokenPipeError:
            return ""
        # What a library prints comes first.
        return next((line for line in child.stdout if line.startswith(ANSWER)), "")

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.communicate()


def peak_here(call: Call, device: str = "cpu") -> int:
    """Extra bytes at the peak of `call` in this process; see `peak_bytes`."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        _trim_heap()
        _reset_peak()
        before = _resident("VmRSS")
        kept = call()
        peak = _resident("VmHWM")
    del kept
    return max(peak - before, 0)


def _trim_heap() -> None:
    """Gives freed memory back to the system, so that reusing it counts."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _reset_peak() -> bool:
    """Lowers VmHWM to VmRSS, where the kernel permits it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    """Bytes: VmRSS (now) or VmHWM (highest); where Linux does not tell, the highest so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _load(path: str, name: str) -> Callable[..., Call]:
    """The function `name` of the Python file `path`."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_measured", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and torch.library look modules up there
    spec.loader.exec_module(module)
    return getattr(module, name)


def _serve() -> None:
    """Runs in the process of a `Meter`: a case on each line of stdin, bytes on stdout."""
    prepare = _load(*sys.argv[1:])
    for line in sys.stdin:
        case = json.loads(line)
        peak = peak_here(prepare(**case), case.get("device", "cpu"))
        print(f"{ANSWER}{peak}", flush=True)


if __name__ == "__main__":
    _serve()
