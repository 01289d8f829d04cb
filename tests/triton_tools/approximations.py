"""Exponentials, quotients and roots that are as wrong as a GPU's may be, in the interpreter.

    with approximate():
        launcher(x)

PTX documents relative errors of 2^-22 for ex2.approx.f32 (which `tl.exp2` and `tl.exp` become), of
2 units in the last place for div.full.f32 (`/`, `tl.fdiv`) and of 2^-23 for sqrt.approx.f32
(`tl.sqrt`); AMD's instructions are within one unit. `tl.div_rn`, `tl.sqrt_rn`, float64 and our own
polynomials are exact or correctly rounded everywhere, and are left alone.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

ERRORS = {
    "create_exp": 2.0**-22, "create_exp2": 2.0**-22, "create_fdiv": 2.0**-22,
    "create_sqrt": 2.0**-23,
}


def wrong_by(error: float, exact):
    """`exact` times 1 + error or 1 - error, by its own bits: equal values have equal errors.

    0, 1, infinities and NaN stay: of exact powers of two hardware is sure.
    """
    bits = np.ascontiguousarray(exact, np.float32).view(np.uint32)
    up = (bits * np.uint32(0x9E3779B1) >> np.uint32(31)).astype(bool)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        changed = exact.astype(np.float64) * np.where(up, 1 + error, 1 - error)
        changed = changed.astype(np.float32)
    return np.where(exact == 1, exact, changed)


@contextlib.contextmanager
def approximate() -> Iterator[set[str]]:
    """Yields a set that the name of every such function that runs inside is added to."""
    used: set[str] = set()

    def wrong(name, error):
        function = getattr(InterpreterBuilder, name)

        def call(self, *arguments):
            result = function(self, *arguments)
            if result.data.dtype != np.float32:
                return result
            used.add(name)
            return TensorHandle(wrong_by(error, result.data), result.dtype.scalar)

        return call

    functions = {name: wrong(name, error) for name, error in ERRORS.items()}
    with mock.patch.multiple(InterpreterBuilder, **functions):
        yield used
