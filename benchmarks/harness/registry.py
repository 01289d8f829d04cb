"""What there is to benchmark: one file `benchmarks/<op>.py` per op or module, found by its name.

Such a file defines `BENCHMARK`, a `Benchmark`: its cases, their inputs, what is compared, and how
many operations and bytes a case costs.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.measure import ROOT, Call

TRAINING, FORWARD = "fwd+bwd", "forward"  # kinds: with all gradients; without any

# Names of candidates. Others are compared with the products, and with a benchmark's baseline.
OURS, EAGER, PRODUCTS = "tilewise", "eager", "bare products"

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One problem: sizes and a dtype.

    Args:
        data: how the inputs are made, where that matters; empty is the usual way.
        kinds: what is measured of it, the main one, which the plots show, first.
        only: the candidates to measure where, on a CPU, all of them would take too long; empty is
            all.
        timed: False where, on a CPU, a few repeats would take too long: only memory is measured.
        sweep: whether it is a point of the plots.
        quick: whether a quick run, which is about the main kind, includes it.
    """

    sizes: dict[str, int]
    dtype: str = "float32"
    data: str = ""
    kinds: tuple[str, ...] = (TRAINING, FORWARD)
    only: tuple[str, ...] = ()
    timed: bool = True
    sweep: bool = False
    quick: bool = False

    @property
    def sizes_text(self) -> str:
        """For instance "B=8192 D=512"."""
        return " ".join(f"{name}={size}" for name, size in self.sizes.items())

    @property
    def label(self) -> str:
        """For instance "B=8192 D=512 float32"."""
        return f"{self.sizes_text} {self.dtype} {self.data}".rstrip()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        return getattr(torch, self.dtype)


def _no_bytes(case: Case) -> int:
    return 0


def matrices(count: float, rows: str, columns: str) -> Callable[[Case], int]:
    """For `Candidate`: bytes of `count` float32 matrices of these two sizes."""
    return lambda case: int(count * case.sizes[rows] * case.sizes[columns] * 4)


@dataclass(frozen=True)
class Candidate:
    """One way to do the op.

    Args:
        build: makes, from inputs and kind, the call to measure.
        needs: an estimate of its peak bytes; a case that needs more than there is, is skipped.
    """

    build: Callable[[Inputs, str], Call]
    needs: Callable[[Case], int] = _no_bytes


@dataclass(frozen=True)
class Benchmark:
    """All there is to know about the benchmark of one op.

    Args:
        axis: the size that the plots are drawn against; None draws the cases side by side.
        cases: the problems, smallest first.
        small: a problem that is run once before measuring, in each dtype and kind, to load
            libraries and compile.
        inputs: makes the inputs of a case on a device, in the order the functions take them.
        candidates: what can be compared on a device ("cpu" or "cuda"), by name.
        flops: of the matrix products of a case and kind, at least.
        moved: bytes that must be read and written at least.
        instructions: that a GPU issues besides the products; without it nothing is predicted.
        baseline: the candidate that people would run instead; every row is compared with it.
        mistakes: from the inputs of a case, a function that says of a candidate's result how many
            entries are wrong, and how many were looked at. Ours must have none.
        short: whether calls are so short that it shows what ran before them, and has filled the
            cache: each runs once more, untimed, just before it is timed.
    """

    axis: str | None
    cases: tuple[Case, ...]
    small: Case
    inputs: Callable[[Case, str], Inputs]
    candidates: Callable[[str], dict[str, Candidate]]
    flops: Callable[[Case, str], int]
    moved: Callable[[Case, str], int]
    instructions: Callable[[Case, str], int] | None = None
    baseline: str = EAGER
    mistakes: Callable[[Inputs], Callable[[Any], tuple[int, int]]] | None = None
    short: bool = False

    def case(self, label: str) -> Case:
        """The case of that label."""
        return next(case for case in self.cases if case.label == label)


def of_function(function: Callable[..., Any], needs: Callable[[Case], int] = _no_bytes):
    """The candidate that calls `function` on the inputs and, in training, differentiates it.

    Its calls return a tuple: the result and, in training, the gradients.
    """

    def build(inputs: Inputs, kind: str) -> Call:
        arguments = tuple(inputs.values())
        wanted = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]

        def forward():
            with torch.no_grad():
                return (function(*arguments),)

        def training():
            result = function(*arguments)
            return result, *torch.autograd.grad(result, wanted, torch.ones_like(result))

        return training if kind == TRAINING else forward

    return Candidate(build, needs)


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


def warm_up(
    benchmark: Benchmark, candidate: Candidate, dtype: str, kind: str, device: str
) -> None:
    """Runs the small problem once."""
    inputs = benchmark.inputs(Case(benchmark.small.sizes, dtype), device)
    candidate.build(inputs, kind)()
