"""The rows of a benchmark: what they say about the machine, as CSV and as a table."""

import csv
import datetime
import functools
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import tilewise
from benchmarks.harness.measure import ROOT

MEASURED, PREDICTED = "measured", "predicted"


@dataclass
class Row:
    """One implementation on one case. Empty fields were not measured; `status` says why.

    `status` is "measured", "predicted", or "skipped: ..."; `verified` whether the op's tests passed
    just before, on this device. Of predicted rows, q25 and q75 are the best and the worst case of
    the model. `wrong` entries were found among the `checked` ones of a result. On a GPU `median_ms`
    is the wall clock, `graph_ms` the time from a CUDA graph and `cold_ms` that of the device on a
    cold cache, see `gpu`; `clocks` is what nvidia-smi said right after.
    """

    op: str
    case: str
    kind: str
    implementation: str
    status: str
    verified: bool
    dtype: str
    sizes: str
    data: str = ""
    rounds: int | None = None
    median_ms: float | None = None
    q25_ms: float | None = None
    q75_ms: float | None = None
    graph_ms: float | None = None
    cold_ms: float | None = None
    clocks: str = ""
    peak_bytes: int | None = None
    flops: int | None = None
    moved_bytes: int | None = None
    ratio_to_products: float | None = None
    ratio_to_baseline: float | None = None
    baseline: str = ""
    wrong: int | None = None
    checked: int | None = None
    machine: str = ""
    threads: int | None = None
    torch: str = ""
    triton: str = ""
    tilewise: str = ""
    commit: str = ""
    date: str = ""

    @property
    def size_of(self) -> dict[str, int]:
        """The sizes by name."""
        return {k: int(v) for k, v in (pair.split("=") for pair in self.sizes.split())}


@functools.cache
def provenance() -> dict[str, str]:
    """Versions, commit and date: what every row says about the software."""
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "tilewise": tilewise.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def machine(device: str) -> tuple[str, int]:
    """The name of the CPU or GPU that does the work, and torch's number of threads."""
    threads = torch.get_num_threads()
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(), threads
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{_cpu_name()}, {os.cpu_count()} cores, {capability}", threads


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The checkout's commit, "-dirty" if files other than results differ from it or are new."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Writes rows, with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in fields(Row)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            writer.writerow([_rounded(getattr(row, name)) for name in names])


def read_csv(path: Path) -> list[Row]:
    """The rows that `write_csv` wrote."""
    kinds = get_type_hints(Row)
    with path.open(newline="") as file:
        return [Row(**{name: _parsed(kinds[name], text) for name, text in row.items()})
                for row in csv.DictReader(file)]  # fmt: skip


def _parsed(kind: Any, text: str) -> Any:
    """A field of that annotation from its text; empty is what was not measured."""
    if kind is str:
        return text
    if kind is bool:
        return text == "True"
    number = float if float in get_args(kind) else int
    return number(text) if text else None


def _rounded(value):
    return f"{value:.5g}" if isinstance(value, float) else value


def print_tables(rows: Sequence[Row], console: Console) -> None:
    """Measured and skipped rows: a table for each kind, a block for each case."""
    console.print(_heading(rows[0]))
    for kind in dict.fromkeys(row.kind for row in rows):
        table = _table(f"{rows[0].op}, {kind}", "")
        headings = ["median ms", "quartiles", f"× {rows[0].baseline}", "peak MB"]
        products = any(row.ratio_to_products is not None for row in rows)
        if products:
            headings.insert(2, "× products alone")
        if any(row.wrong is not None for row in rows):
            headings.append("wrong")
        on_gpu = any(row.cold_ms is not None for row in rows)
        if on_gpu:
            headings[1:1] = ["graph", "cold"]
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        previous = ""
        for row in (row for row in rows if row.kind == kind):
            if row.case != previous:
                table.add_section()
                table.add_row(f"[bold]{row.case}")
            previous = row.case
            cells = _cells(row, products, on_gpu)[: len(headings)]
            table.add_row(f"  {row.implementation}", *cells)
        console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=f"[bold]{title}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for heading in columns:
        table.add_column(heading, no_wrap=True)
    return table


def _heading(row: Row) -> str:
    note = "\nverified: the op's tests ran on this device just before"
    if not row.verified:
        note = "\n[bold red]NOT VERIFIED: the op's tests were not run"
    return (
        f"{row.machine}, {row.threads} threads; torch {row.torch}, "
        f"tilewise {row.tilewise} {row.commit}{note}"
    )


def _cells(row: Row, products: bool, on_gpu: bool) -> list[str]:
    if row.status != MEASURED:
        return ["", row.status.removeprefix("skipped: ")]
    spread = ""
    if row.q25_ms is not None and row.q75_ms is not None:
        spread = f"{_ms(row.q25_ms)}–{_ms(row.q75_ms)}"
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}"
    ratios = [row.ratio_to_products] * products + [row.ratio_to_baseline]
    shown = ["" if r is None else f"{r:.2f}" for r in ratios]
    wrong = "" if row.wrong is None else f"{row.wrong} of {row.checked}"
    of_device = [_ms(row.graph_ms), _ms(row.cold_ms)] if on_gpu else []
    return [_ms(row.median_ms), *of_device, spread, *shown, peak, wrong]


def _ms(value: float | None) -> str:
    """Three digits, or whole milliseconds."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_predictions(rows: Sequence[Row], console: Console) -> None:
    """Predicted rows in a table of their own, which says that nothing was measured."""
    title = "Predicted, not measured: lower bounds from flops, bytes and issue slots"
    table = _table(title, "case", "kind", "GPU")
    for heading in ("ms, all overlapping", "not"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.case, row.kind, row.machine, _ms(row.q25_ms), _ms(row.q75_ms))
    console.print(table)
