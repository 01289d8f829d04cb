"""What a call takes on a GPU besides its wall clock: from a graph, and on a cold cache.

The wall clock of a small call is the host's, which launches one kernel after the other. Replayed
from a CUDA graph the same kernels follow each other at once. On a cold cache a call is timed by the
device, after something else has filled its L2 cache and while the host is ahead.
"""

import shutil
import statistics
import subprocess
from collections.abc import Callable

import torch

from benchmarks.harness.measure import Call

FLUSHED = 512 << 20  # bytes that are written before a call: more than any L2 cache holds
AHEAD = 2_000_000  # cycles that the device waits, about a millisecond, while the host launches
ROUNDS = 10
CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"


def _milliseconds(run: Callable[[], object]) -> float:
    """Of the device, between two events around what `run` launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def cold_ms(call: Call, rounds: int = ROUNDS) -> float:
    """Median device time of a call whose inputs are not in the L2 cache."""
    filler = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(rounds):
        filler.zero_()
        torch.cuda._sleep(AHEAD)
        times.append(_milliseconds(call))
    return statistics.median(times)


def graph_ms(call: Call, rounds: int = ROUNDS) -> float | None:
    """Median time of a replay of the call from a CUDA graph; None if it can't be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # what a first call does cannot be captured
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    graph.replay()
    found = statistics.median(_milliseconds(graph.replay) for _ in range(rounds))
    del kept  # a replay writes there
    return found


def clocks() -> str:
    """What nvidia-smi says of clocks, heat and power, and why clocks are lowered; "" without it."""
    if not shutil.which("nvidia-smi"):
        return ""
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"],
        capture_output=True, text=True,
    )
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""
