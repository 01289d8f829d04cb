"""How many kernels a call starts on a GPU, without one: launches are counted, and do nothing.

`make launches` prints kernels/launches.csv anew: of each op and module, forward and backward, what
torch launches, what Triton launches, and their names. A launch takes the host some microseconds,
whatever it does: small batches wait for nothing else.
"""

import argparse
import collections
import contextlib
import csv
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from tilewise import _backend
from tilewise.kernels import _common
from tilewise.nn.quantizers import _gumbel_codes
from tilewise.ops import _register

TABLE = Path(__file__).parents[2] / "kernels" / "launches.csv"
COLUMNS = ("of", "case", "pass", "total", "torch", "triton", "kernels")
ARCHITECTURE = "sm_90"
RENEW = "make launches"

# What a GPU has to be waited for.
SYNCHRONISING = re.compile(
    r"_local_scalar_dense|nonzero|masked_select|unique|is_nonzero|\bequal\b|repeat_interleave"
)


class Synchronised(AssertionError):
    """The host read what a device computes."""


class Count(TorchDispatchMode):
    """Counts kernels by name while it is entered; refuses what waits for the device.

    Indices that no kernel has written are 0, so that what they index exists.
    """

    def __init__(self):
        super().__init__()
        self.torch: collections.Counter[str] = collections.Counter()
        self.triton: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if function.namespace.startswith("tilewise"):
            return self.run_op(name, args)
        indices = args[1] if name.startswith("index") and isinstance(args[1], list) else ()
        by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        if SYNCHRONISING.search(name) or by_mask:
            raise Synchronised(f"{name} waits for the device")
        result = function(*args, **kwargs)
        if "empty" in name:
            if not result.is_floating_point():
                result.zero_()
        elif not function.is_view and launches_something(args[0] if result is None else result):
            self.torch[name] += 1
        return result

    def run_op(self, name: str, args):
        """An op of ours: its launchers, with what they call."""
        if name == "scale_gradients":  # as csrc/scale_gradients.cpp does it on a GPU
            _, gradients, inputs = args
            alike = sum(d.dtype == x.dtype for d, x in zip(gradients, inputs, strict=True))
            self.torch["mul"] += len(inputs) - alike
            self.torch["_foreach_mul"] += alike > 0
            return [torch.zeros_like(x) for x in inputs]
        composed = getattr(_gumbel_codes, name, None)
        if isinstance(composed, torch.library.CustomOpDef):  # what it calls is counted
            with self:
                return composed._init_fn(*args)
        module = importlib.import_module(f"tilewise.kernels.{_register.modules[name]}")
        with self:
            return getattr(module, name)(*args)


def launches_something(result) -> bool:
    tensors = result if isinstance(result, (tuple, list)) else [result]
    return any(isinstance(x, torch.Tensor) and x.numel() for x in tensors)


@contextlib.contextmanager
def counted() -> Iterator[Count]:
    """Counts what is launched inside the block, as it would be on ARCHITECTURE."""
    count = Count()

    def launch(kernel, *args, grid, warmup, **kwargs):
        if not warmup:  # which compiles, and launches nothing
            count.triton[kernel.fn.__name__] += 1

    def operator(name, device, *dtypes):  # on a GPU this namespace leads to Triton
        return getattr(torch.ops.tilewise, name).default

    def wait(x, *arguments):
        raise Synchronised("a tensor is copied to the host")

    def product(out, a, b, accumulate):
        count.torch["addmm" if accumulate else "mm"] += 1

    with (
        mock.patch.object(JITFunction, "run", launch),
        mock.patch.object(InterpretedFunction, "run", launch),
        mock.patch.object(_common, "add_product", product),
        mock.patch.object(_common, "architecture", lambda device: ARCHITECTURE),
        mock.patch.multiple(torch.Tensor, tolist=wait, numpy=wait, cpu=wait),
        mock.patch.object(_backend, "operator", operator),
        mock.patch.object(_backend, "_interpreted", True),
        _backend.backend("triton"),
        count,
    ):
        yield count


class Row(NamedTuple):
    """One line of the table."""

    of: str  # an op or module
    case: str
    when: str  # forward, backward, step
    count: Count

    @property
    def total(self) -> int:
        return self.count.torch.total() + self.count.triton.total()

    def line(self) -> dict[str, object]:
        counts = [*sorted(self.count.triton.items()), *sorted(self.count.torch.items())]
        names = [(name, n) for name, n in counts if n]
        kernels = ", ".join(name if n == 1 else f"{n} {name}" for name, n in names)
        values = (
            self.of, self.case, self.when, self.total, self.count.torch.total(),
            self.count.triton.total(), kernels,
        )
        return dict(zip(COLUMNS, values, strict=True))


def passes(of: str, case: str, call: Callable[[], Any], inputs: list) -> Iterator[Row]:
    """Forward and backward of what `call` gives, by the `inputs`."""
    with counted():  # what is made once a process is no part of a call
        call()
    with counted() as count:
        result = call()
    yield Row(of, case, "forward", count)
    if inputs:
        results = result if isinstance(result, tuple) else (result,)
        grads = [torch.ones_like(x) for x in results]
        with counted() as count:
            torch.autograd.grad(results, inputs, grads)
        yield Row(of, case, "backward", count)


def rows() -> list[Row]:
    from tests.triton_tools import launch_cases

    return list(launch_cases.rows())


def write_table(table: list[Row]) -> None:
    with open(TABLE, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.line() for row in table)


def read_table() -> list[dict[str, str]]:
    with open(TABLE, newline="") as file:
        return list(csv.DictReader(file))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show", action="store_true", help="print it, and write nothing")
    table = rows()
    if not parser.parse_args().show:
        write_table(table)
    for row in table:
        print(*list(row.line().values())[:3], row.total, row.line()["kernels"], sep="  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
