"""Which benchmarks there are: one file `benchmarks/<op>.py` per op or module, found by its name."""

import importlib

from benchmarks.harness.bench import Benchmark
from benchmarks.harness.measure import ROOT


def names() -> list[str]:
    """The ops and modules that have a benchmark."""
    stems = {
        path.stem
        for folder in ("ops", "nn")
        for path in (ROOT / "pyext" / "tilewise" / folder).rglob("[!_]*.py")
    }
    return sorted(stem for stem in stems if (ROOT / "benchmarks" / f"{stem}.py").exists())


def load(op: str) -> Benchmark:
    """The benchmark of `op`."""
    if op not in names():
        raise ValueError(f"op {op!r}: expected one of {', '.join(names())}")
    return importlib.import_module(f"benchmarks.{op}").BENCHMARK
