"""What the file of an op's benchmark is made of: cases, inputs, implementations.

    from benchmarks.harness import bench

    def inputs(case, device): ...             # by the names of the function's parameters
    def implementations(device): return {bench.OURS: bench.of_function(tw.some_op), ...}
    BENCHMARK = bench.Benchmark(...)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.measure import Call

TRAINING, FORWARD = "fwd+bwd", "forward"  # kinds: with all gradients; without any

# Names of implementations. PRODUCTS stands for the matrix products that the op cannot do without,
# as torch.mm calls and nothing else: they have no result, and every row is compared with them.
OURS, EAGER, COMPILED, PRODUCTS = "tilewise", "eager", "torch.compile", "matrix products alone"
TUNED = "torch.compile, tuned"  # mode "max-autotune"; without CUDA graphs, which all get or none

# torch.set_float32_matmul_precision's words: what float32 products are made of on a GPU.
PRECISIONS = {"highest": "", "high": "by TF32", "medium": "by bfloat16"}

Inputs = dict[str, Any]
GRADS = "grads"  # the input that holds gradients of the results and is no argument


@dataclass(frozen=True)
class Case:
    """One problem: sizes and a dtype.

    Args:
        precision: of float32 products, a key of PRECISIONS. Others than "highest" matter on a GPU.
        device: the only kind that it is measured on; empty is every one.
        data: how the inputs are made, where that matters; empty is the usual way.
        kinds: what is measured of it, the main one, which the plots show, first.
        only: the implementations to measure where, on a CPU, all of them would take too long;
            empty is all.
        timed: False where, on a CPU, a few repeats would take too long: only memory is measured.
        sweep: whether it is a point of the plots.
        quick: whether a quick run, which is about the main kind, includes it.
    """

    sizes: dict[str, int]
    dtype: str = "float32"
    data: str = ""
    precision: str = "highest"
    device: str = ""
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
        words = (self.sizes_text, self.dtype, PRECISIONS[self.precision], self.data)
        return " ".join(filter(None, words))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        return getattr(torch, self.dtype)


class Normal:
    """Draws normal numbers in the dtype of a case, the same in every run."""

    def __init__(self, case: Case, device: str):
        self.dtype, self.device = case.torch_dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return self._draw(shape).to(self.dtype)

    def unit(self, *shape: int) -> Tensor:
        """Rows of length 1: features as contrastive losses take them."""
        return F.normalize(self._draw(shape), dim=-1).to(self.dtype)

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator)


def scalar(value: float, device: str) -> Tensor:
    """A learnable scale or bias."""
    return torch.tensor(value, device=device, requires_grad=True)


def _no_bytes(case: Case) -> int:
    return 0


def matrices(count: float, rows: str, columns: str) -> Callable[[Case], int]:
    """For `Implementation`: bytes of `count` float32 matrices of these two sizes."""
    return lambda case: int(count * case.sizes[rows] * case.sizes[columns] * 4)


@dataclass(frozen=True)
class Implementation:
    """One way to do the op.

    Args:
        build: makes, from inputs and kind, the call to measure.
        needs: an estimate of its peak bytes; a case that needs more than there is, is skipped.
    """

    build: Callable[[Inputs, str], Call]
    needs: Callable[[Case], int] = _no_bytes


def of_function(
    function: Callable[..., Any],
    needs: Callable[[Case], int] = _no_bytes,
    numbers: Sequence[str] = (),
    **fixed: Any,
) -> Implementation:
    """Calls `function` with the inputs by their names, but for gradients, and what is `fixed`.

    numbers: inputs that it takes as Python's, without a gradient.
    """

    def build(inputs: Inputs, kind: str) -> Call:
        named = {name: value for name, value in inputs.items() if name != GRADS}
        named |= {name: named[name].item() for name in numbers}
        return call_of(lambda: function(**named, **fixed), named.values(), kind, inputs.get(GRADS))

    return Implementation(build, needs)


def call_of(
    function: Callable[[], Any], inputs: Any, kind: str, grads: Sequence[Tensor] | None = None
) -> Call:
    """A call that, in training, goes backward from `grads`, or ones, to the `inputs` that ask.

    It returns a tuple: the results and, in training, the gradients.
    """
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]

    def results() -> tuple[Tensor, ...]:
        result = function()
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def forward():
        with torch.no_grad():
            return results()

    def training():
        made = results()
        ends = [x for x in made if x.requires_grad]
        if grads is None and len(ends) == 1 and not ends[0].dim():  # torch makes the one
            return *(x.detach() for x in made), *torch.autograd.grad(ends, wanted)
        given = map(torch.ones_like, ends) if grads is None else grads
        # Rounded to a result's own dtype: that of a sum may be another one.
        given = [grad.to(x.dtype) for grad, x in zip(given, ends, strict=True)]
        return *(x.detach() for x in made), *torch.autograd.grad(ends, wanted, given)

    return training if kind.endswith(TRAINING) else forward


def no_flops(case: Case, kind: str) -> int:
    """There is no matrix product."""
    return 0


def on_gpu(sizes: dict[str, int], **options: Any) -> tuple[Case, ...]:
    """A training problem in what else a GPU multiplies fast: half precision, coarser float32."""
    options = {"kinds": (TRAINING,), "device": "cuda", **options}
    half = (Case(sizes, dtype, **options) for dtype in ("bfloat16", "float16"))
    coarse = (Case(sizes, precision=word, **options) for word in ("high", "medium"))
    return *half, *coarse


def small_calls(
    names: str, sizes: Sequence[tuple[int, ...]], kind: str = TRAINING
) -> tuple[Case, ...]:
    """Cases of sizes with these names, separated by spaces; a quick run has the first ones."""
    return tuple(
        Case(dict(zip(names.split(), size, strict=True)), kinds=(kind,), quick=i < 3)
        for i, size in enumerate(sizes)
    )


@dataclass(frozen=True)
class Benchmark:
    """All there is to know about the benchmark of one op.

    Args:
        cases: the problems, smallest first.
        small: a problem that is run once before measuring, in each dtype and kind, to load
            libraries and compile.
        inputs: makes the inputs of a case on a device, by the names of the function's parameters.
        implementations: what can be compared on a device ("cpu" or "cuda"), by name.
        moved: bytes that must be read and written at least.
        flops: of the matrix products of a case and kind, at least.
        axis: the size that the plots are drawn against; None draws the cases side by side.
        instructions: that a GPU issues besides the products; without it nothing is predicted.
        baseline: what people would run instead; every row is compared with it.
        mistakes: from the inputs of a case, a function that says of an implementation's result how
            many entries are wrong, and how many were looked at. Ours must have none.
        short: whether calls are so short that it shows what ran before them, and has filled the
            cache: each runs once more, untimed, just before it is timed.
        small_calls: problems so small that what surrounds the kernel counts; see `small`.
        rival: the implementation that these are compared with, if it is not the baseline.
        operator: from inputs, a call of the dispatcher's operator alone, gradients included.
    """

    cases: tuple[Case, ...]
    small: Case
    inputs: Callable[[Case, str], Inputs]
    implementations: Callable[[str], dict[str, Implementation]]
    moved: Callable[[Case, str], int]
    flops: Callable[[Case, str], int] = no_flops
    axis: str | None = None
    instructions: Callable[[Case, str], int] | None = None
    baseline: str = EAGER
    mistakes: Callable[[Inputs], Callable[[Any], tuple[int, int]]] | None = None
    short: bool = False
    small_calls: tuple[Case, ...] = ()
    rival: str = ""
    operator: Callable[[Inputs], Call] | None = None

    def case(self, label: str) -> Case:
        """The case of that label."""
        return next(case for case in self.cases if case.label == label)

    def small_call(self, name: str, dtype: str, kind: str, device: str) -> Call:
        """The small problem in a dtype."""
        inputs = self.inputs(Case(self.small.sizes, dtype), device)
        return self.implementations(device)[name].build(inputs, kind)
