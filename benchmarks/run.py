"""Measures one op: `python -m benchmarks.run --op sigmoid_loss --device cpu`, or all of them.

Runs the op's tests and refuses to go on if they fail; then measures every implementation's peak
memory and time on every case, counts wrong results where that can be said, prints a table, and
writes `<op>-<device>.csv`, two plots, and what is predicted for GPUs: into out/bench, or, with
`--record`, into the tracked benchmarks/results.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.baselines.peers import GPU_PEERS, PEERS, installed
from benchmarks.harness import gpu, plot, predict, registry, report, small, verify
from benchmarks.harness.bench import (
    COMPILED,
    OURS,
    PRODUCTS,
    TUNED,
    Case,
    Implementation,
    Inputs,
)
from benchmarks.harness.measure import (
    ROOT,
    Call,
    Meter,
    Spread,
    peak_bytes_each,
    ratio,
    time_interleaved,
    times_longer,
)
from benchmarks.harness.report import MEASURED, Row

RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / "out" / "bench"  # ignored by git
SECONDS, QUICK_SECONDS = 12.0, 0.5  # of timing, for each case and kind
CPU_MEMORY_CAP = 8.0  # GB
SLOW = 10.0  # times as long as in float32: half precision is emulated

# Where nobody sees it, a table may be wide.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 132)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parse(arguments)
    ops = registry.names() if options.op == "all" else [options.op]
    peers = PEERS + GPU_PEERS * (options.device == "cuda")
    if absent := [name for name in peers if not installed(name)]:
        console.print(f"not installed, and not compared with: {', '.join(absent)}")
    with Meter(prepare) as meter:
        return max([_run(op, options, meter) for op in ops])


def _run(op: str, options: argparse.Namespace, meter: Meter) -> int:
    """One op: 1 if it may not be reported."""
    tests = verify.run_tests(op, options.device, console) if options.verify else None
    if tests and not tests.verified:
        console.print(f"[bold red]{op}: its tests do not pass; nothing is reported")
        return 1
    if options.record and (why := verify.why_not_record(tests)):
        console.print(f"[bold red]{op}: nothing is recorded: {why}")
        return 1
    if tests is None:
        console.rule("[bold red]NOT VERIFIED: the op's tests were not run[/]", style="red")
    run = Run(op, options, tests is not None, meter)
    rows = run.rows()
    predicted = predict.rows(op, run.benchmark)
    report.print_tables(rows, console)
    if any(row.wrong for row in rows if row.implementation == OURS):
        console.print(f"[bold red]{op}: {OURS} is wrong; nothing is written")
        return 1
    if predicted:
        report.print_predictions(predicted, console)
    short = run.small_calls()
    if short:
        small.print_table(short, console)
    for path in _write(options, run, rows, predicted, short):
        console.print(f"wrote {path}")
    slow = small.too_slow(short) if options.quick else []
    for text in slow:
        console.print(f"[bold red]small call too slow: {text}")
    return 1 if slow else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description="Time and peak memory of one op, side by side."
    )
    parser.add_argument("--op", required=True, choices=[*registry.names(), "all"])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, a few rounds, nothing to compile"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure these alone")
    parser.add_argument("--case", metavar="TEXT", help="only cases with this in their label")
    parser.add_argument("--out", type=Path, default=SCRATCH, help="folder for CSV and plots")
    parser.add_argument(
        "--record", action="store_true",
        help=f"write into {RESULTS.relative_to(ROOT)}, which is tracked: only what was verified, "
        "of a commit and complete",
    )
    parser.add_argument("--memory-cap", type=float, metavar="GB", help="skip what needs more")
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false",
        help="do not run the op's tests first; every row will say so",
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if options.record:
        if options.quick or options.case or options.only:
            parser.error("--record: expected a complete run, without --quick, --case and --only")
        options.out = RESULTS
    return options


class Run:
    """One run over the cases of an op."""

    def __init__(self, op: str, options: argparse.Namespace, verified: bool, meter: Meter):
        self.op, self.device, self.verified = op, options.device, verified
        self.benchmark = registry.load(op)
        self.quick, self.meter = options.quick, meter
        self.whole = not (options.case or options.only)
        self.cases = _chosen_cases(self.benchmark.cases, options)
        self.implementations = _chosen(self.benchmark.implementations(self.device), options)
        self.seconds = QUICK_SECONDS if options.quick else SECONDS
        self.cap = 1e9 * (options.memory_cap or _memory_cap(self.device))
        self.machine, self.threads = report.machine(self.device)

    def rows(self) -> list[Row]:
        """A row for every case, kind and implementation: skipped, or with its time and memory."""
        rows = [
            self._row(case, kind, name)
            for case in self.cases
            for kind in self._kinds(case)
            for name in self.implementations
        ]
        for name in self._weighed():
            self._add_memory(name, [r for r in _measured(rows) if r.implementation == name])
        for case in (case for case in self.cases if case.timed or self.device != "cpu"):
            for kind in self._kinds(case):
                block = [row for row in rows if (row.case, row.kind) == (case.label, kind)]
                self._add_times(case, kind, _measured(block))
        return rows

    def small_calls(self) -> list[Row]:
        """Rows of calls where overhead counts, in a run over everything."""
        if self.device != "cpu" or not self.whole:
            return []
        return small.rows(self.op, self.benchmark, self.quick, self.verified)

    def _kinds(self, case: Case) -> tuple[str, ...]:
        return case.kinds[:1] if self.quick else case.kinds

    def _weighed(self) -> list[str]:
        """Whose memory is measured: in a quick run, ours and what people run instead."""
        everyone = not self.quick
        shown = (OURS, self.benchmark.baseline)
        return [name for name in self.implementations if everyone or name in shown]

    def _status(self, case: Case, kind: str, name: str) -> str:
        needed = self.implementations[name].needs(case)
        if needed > self.cap:
            return f"skipped: needs {needed / 1e9:.2g} GB"
        if self.device == "cpu" and case.only and name not in case.only:
            return "skipped: takes long"
        if self.device == "cpu" and case.dtype != "float32" and name != OURS:
            longer = self._longer_than_float32(case, kind, name)
            if longer > SLOW:
                return f"skipped: {case.dtype} takes {longer:.0f} times as long here"
        return MEASURED

    def _longer_than_float32(self, case: Case, kind: str, name: str) -> float:
        """A CPU without such products emulates them: seen on the small problem, before minutes."""
        try:
            calls = [
                self.benchmark.small_call(name, dtype, kind, self.device)
                for dtype in (case.dtype, "float32")
            ]
            return times_longer(*calls)
        except RuntimeError:
            return 0.0  # it fails, and says so when it is measured

    def _row(self, case: Case, kind: str, name: str) -> Row:
        return Row(
            self.op, case.label, kind, name, status=self._status(case, kind, name),
            verified=self.verified, dtype=case.dtype, sizes=case.sizes_text, data=case.data,
            flops=self.benchmark.flops(case, kind), moved_bytes=self.benchmark.moved(case, kind),
            baseline=self.benchmark.baseline, machine=self.machine, threads=self.threads,
            **report.provenance(),
        )

    def _add_memory(self, name: str, rows: list[Row]) -> None:
        console.print(f"memory: {name}")
        cases = [
            {"op": self.op, "implementation": name, "case": row.case, "kind": row.kind,
             "device": self.device}
            for row in rows
        ]  # fmt: skip
        try:  # a process for each; all of a quick run share one, since it takes seconds to start
            peaks = peak_bytes_each(prepare, cases, self.meter if self.quick else None)
        except RuntimeError as error:
            _leave_out(rows, error)
        else:
            for row, peak in zip(rows, peaks, strict=True):
                row.peak_bytes = peak

    def _add_times(self, case: Case, kind: str, rows: list[Row]) -> None:
        console.print(f"time: {case.label}, {kind}")
        torch.set_float32_matmul_precision(case.precision)
        inputs = self.benchmark.inputs(case, self.device)
        calls = {}
        for row in rows:
            name = row.implementation
            try:
                self.benchmark.small_call(name, case.dtype, kind, self.device)()
            except Exception as error:  # of a package, it may be any
                _leave_out([row], error)
            else:
                calls[name] = self.implementations[name].build(inputs, kind)
        timed = _each_twice(calls) if self.benchmark.short else calls
        times = time_interleaved(timed, self.device, self.seconds)
        for row in _measured(rows):
            mine = times[row.implementation]
            spread = Spread.of(mine)
            row.rounds = len(mine)
            row.median_ms, row.q25_ms, row.q75_ms = spread.median, spread.q25, spread.q75
            if PRODUCTS in times:
                row.ratio_to_products = ratio(mine, times[PRODUCTS])
            if self.device == "cuda":
                call = calls[row.implementation]
                row.graph_ms, row.cold_ms = gpu.graph_ms(call), gpu.cold_ms(call)
                row.clocks = gpu.clocks()
            if row.baseline in times:
                row.ratio_to_baseline = ratio(mine, times[row.baseline])
        if self.benchmark.mistakes:
            self._add_mistakes(inputs, calls, _measured(rows))

    def _add_mistakes(self, inputs: Inputs, calls: dict[str, Call], rows: list[Row]) -> None:
        assert self.benchmark.mistakes is not None
        mistakes = self.benchmark.mistakes(inputs)
        for row in rows:
            if row.implementation != PRODUCTS:  # they have no result
                row.wrong, row.checked = mistakes(calls[row.implementation]())


def _each_twice(calls: dict[str, Call]) -> dict[str, Call]:
    """Every call also just before itself, under a name that nobody looks for."""
    return {f"{when}{name}": call for name, call in calls.items() for when in ("before ", "")}


def _leave_out(rows: list[Row], error: Exception) -> None:
    """Goes on without an implementation that fails, unless it is ours."""
    if any(row.implementation == OURS for row in rows):
        raise error
    console.print(str(error), markup=False)
    for row in rows:
        row.status = "skipped: it fails"


def _measured(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.status == MEASURED]


def _chosen_cases(cases: Sequence[Case], options: argparse.Namespace) -> list[Case]:
    cases = [case for case in cases if case.device in ("", options.device)]
    chosen = [case for case in cases if case.quick or not options.quick]
    chosen = [case for case in chosen if not options.case or options.case in case.label]
    if not chosen:
        raise SystemExit(f"--case: none is like {options.case!r}")
    return chosen


def _chosen(
    found: dict[str, Implementation], options: argparse.Namespace
) -> dict[str, Implementation]:
    unknown = set(options.only or ()) - set(found)
    if unknown:
        raise SystemExit(f"--only: no {', '.join(unknown)} here; there are {', '.join(found)}")
    slow = (COMPILED, TUNED) if options.quick else ()
    names = options.only or [name for name in found if name not in slow]
    return {name: found[name] for name in names}


def _memory_cap(device: str) -> float:
    """GB: a fixed number on a CPU, all that is free on a GPU."""
    return CPU_MEMORY_CAP if device == "cpu" else torch.cuda.mem_get_info()[0] / 1e9


def prepare(op: str, implementation: str, case: str, kind: str, device: str) -> Call:
    """For `Meter`: one implementation on one case, libraries loaded; its buffers count."""
    benchmark = registry.load(op)
    problem = benchmark.case(case)
    benchmark.small_call(implementation, problem.dtype, kind, device)()
    inputs = benchmark.inputs(problem, device)
    chosen = benchmark.implementations(device)[implementation]
    return lambda: chosen.build(inputs, kind)()


def _write(
    options: argparse.Namespace, run: Run, rows: list[Row], predicted: list[Row], short: list[Row]
) -> list[Path]:
    """Writes CSV files and plots; returns their paths."""
    stem = options.out / f"{run.op}-{options.device}"
    tables = {stem.with_suffix(".csv"): rows}
    if short:
        tables[options.out / f"{run.op}-{options.device}-small.csv"] = short
    if predicted:
        tables[options.out / f"{run.op}-predicted.csv"] = predicted
    for path, content in tables.items():
        report.write_csv(content, path)
    return [*tables, *plot.draw(run.benchmark, rows, stem)]


if __name__ == "__main__":
    raise SystemExit(main())
