"""Small calls, where what surrounds the kernels counts: ours beside what people run instead.

Times are of batches of calls, which take turns; ratios are taken within a round. In a batch of one
after another everything is in the cache, as it is not in training: that favours nobody.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import report
from benchmarks.harness.bench import OURS, Benchmark, Case
from benchmarks.harness.measure import Call, Spread, ratio
from benchmarks.harness.report import Row

OPERATOR = "the operator alone"  # the dispatcher's, without autograd: the rest is overhead
THREADS = (1, 2)
ROUNDS, QUICK_ROUNDS = 41, 11
BATCH = 1e-3  # seconds
LIMIT, TRIES = 1.3, 3  # of a run that may fail on it: generous for noise, and not at once


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch.set_num_threads for a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_batches(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one call, of every call in every round; they take turns in going first."""
    counts = {name: _calls_of_a_batch(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls)[:: 1 if i % 2 else -1]:
            call, count = calls[name], counts[name]
            call()
            begin = time.perf_counter()
            for _ in range(count):
                call()
            times[name].append(1e3 * (time.perf_counter() - begin) / count)
    return times


def _calls_of_a_batch(call: Call) -> int:
    for _ in range(3):
        call()
    begin = time.perf_counter()
    call()
    return max(1, round(BATCH / (time.perf_counter() - begin)))


def rows(op: str, benchmark: Benchmark, quick: bool, verified: bool) -> list[Row]:
    """On a CPU: of each case and number of threads ours, its rival and the operator alone."""
    cases = [case for case in benchmark.small_calls if case.quick or not quick]
    counts = [count for count in THREADS if count <= (os.cpu_count() or 1)]
    return [
        row for case in cases for count in counts
        for row in _rows(op, benchmark, case, count, quick, verified)
    ]


def _rows(
    op: str, benchmark: Benchmark, case: Case, count: int, quick: bool, verified: bool
) -> list[Row]:
    calls = _calls(benchmark, case)
    rival = benchmark.rival or benchmark.baseline
    with threads(count):
        times = _again_while_slow(calls, rival) if quick else time_batches(calls, ROUNDS)
        machine, _ = report.machine("cpu")
    kind, found = case.kinds[0], []
    for name, mine in times.items():
        spread = Spread.of(mine)
        found.append(Row(
            op, case.label, kind, name, report.MEASURED, verified, case.dtype, case.sizes_text,
            case.data, len(mine), spread.median, spread.q25, spread.q75, baseline=rival,
            ratio_to_baseline=(_least_ratio if quick else ratio)(mine, times[rival]),
            machine=machine, threads=count, **report.provenance(),
        ))  # fmt: skip
    return found


def _calls(benchmark: Benchmark, case: Case) -> dict[str, Call]:
    kind = case.kinds[0]
    found, inputs = benchmark.implementations("cpu"), benchmark.inputs(case, "cpu")
    calls = {
        name: found[name].build(inputs, kind)
        for name in (OURS, benchmark.rival or benchmark.baseline) if name in found
    }
    if benchmark.operator:
        calls[OPERATOR] = benchmark.operator(inputs)
    return calls


def _again_while_slow(calls: dict[str, Call], rival: str) -> dict[str, list[float]]:
    """The best of a few tries, by the ratio: of one, a slow moment of the machine could remain."""
    tries = []
    for _ in range(TRIES):
        tries.append(time_batches(calls, QUICK_ROUNDS))
        if _least_ratio(tries[-1][OURS], tries[-1][rival]) <= LIMIT:
            break
    return min(tries, key=lambda times: _least_ratio(times[OURS], times[rival]))


def _least_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over rounds, or that of the best rounds where it is lower."""
    return min(ratio(ours, theirs), min(ours) / min(theirs))


def too_slow(found: Sequence[Row]) -> list[str]:
    """What exceeds the limit, in words."""
    return [
        f"{row.op} {row.case}, {row.threads} threads: {row.ratio_to_baseline:.2f} of {row.baseline}"
        for row in found
        if row.implementation == OURS and (row.ratio_to_baseline or 0) > LIMIT
    ]


def print_table(found: Sequence[Row], console: Console) -> None:
    """A line for each case and number of threads, in microseconds."""
    with_operator = any(row.implementation == OPERATOR for row in found)
    table = Table(title=f"[bold]{found[0].op}, small calls, µs", title_justify="left", box=None)
    headings = ["case", "threads", OURS, found[0].baseline, "ratio"]
    for heading in headings + [OPERATOR, "overhead"] * with_operator:
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    for ours in (row for row in found if row.implementation == OURS):
        beside = {
            row.implementation: 1e3 * (row.median_ms or 0) for row in found
            if (row.case, row.threads) == (ours.case, ours.threads)
        }
        times = [beside[OURS], beside[ours.baseline]]
        cells = [*(f"{t:.1f}" for t in times), f"{ours.ratio_to_baseline:.2f}"]
        if OPERATOR in beside:
            alone = beside[OPERATOR]
            cells += [f"{alone:.1f}", f"{beside[OURS] - alone:.1f}"]
        table.add_row(f"{ours.case}, {ours.kind}", str(ours.threads), *cells)
    console.print(table)
