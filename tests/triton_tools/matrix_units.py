"""Matrix units that cut what they add, in the place of the interpreter's `tl.dot`.

    with multiplying(UNITS["H100, B200"]):
        launcher(x)

What hardware does with the products of half-precision factors and the accumulator was found out by
experiment (Fasi, Higham, Mikaitis and Pranesh 2021, doi 10.7717/peerj-cs.330; MMA-Sim, arXiv
2511.10909): the terms of a step are moved to the exponent of the largest, cut there, added without
an error, and the sum is cut to float32. An exponent is the sum of the factors', so that a product
may be just below four times its power of two.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.triton_tools import interpreter

NOTHING = -2000  # the exponent of 0, below every other


class Unit(NamedTuple):
    """How a matrix unit adds."""

    terms: int  # products that are added in one step
    bits: int  # behind the point, of a term beside the largest of its step
    apart: bool = False  # the accumulator is aligned with the sum of the products, not with them


# By the GPUs that have them.
UNITS = {
    "V100": Unit(4, 23),
    "A100, Ada": Unit(8, 24),
    "H100, B200": Unit(16, 25),
    "MI300": Unit(8, 24, apart=True),
}


def exponents(x):
    """floor(log2(|x|)), NOTHING for 0."""
    return np.where(x == 0, NOTHING, np.frexp(x)[1] - 1)


def cut(x, places):
    """x, float64, cut towards 0 to multiples of 2^places."""
    return np.ldexp(np.trunc(np.ldexp(x, -places)), places)


def add_products(unit: Unit, a, b, total):
    """One step: `total` (M, N) and the products of a (M, k) and b (k, N), all float64."""
    products = a[:, :, None] * b[None]
    at = exponents(a)[:, :, None] + exponents(b)[None]
    top = at.max(1)
    own = exponents(total)
    if unit.apart:
        added = cut(products, (top - unit.bits)[:, None]).sum(1)
        top = np.maximum(np.maximum(top, own), NOTHING // 2)
        # Both are cut downwards, the sum of the products seven bits later.
        added = np.ldexp(np.floor(np.ldexp(added, 31 - top)), top - 31)
        total = np.ldexp(np.floor(np.ldexp(total, unit.bits - top)), top - unit.bits)
        return (added + total).astype(np.float32).astype(np.float64)
    places = np.maximum(np.maximum(top, own), NOTHING // 2) - unit.bits
    total = cut(products, places[:, None]).sum(1) + cut(total, places)
    return cut(total, np.maximum(exponents(total), NOTHING // 2) - 23)


def product(unit: Unit, a, b, total):
    """total + a @ b as the unit makes it: float32 (M, N), of finite values."""
    a, b, total = (np.asarray(x, np.float64) for x in (a, b, total))
    for k in range(0, a.shape[1], unit.terms):
        total = add_products(unit, a[:, k : k + unit.terms], b[k : k + unit.terms], total)
    return total.astype(np.float32)


@contextlib.contextmanager
def multiplying(unit: Unit) -> Iterator[None]:
    """Products of half precision are the unit's; float32 is multiplied as before."""

    def dot(self, a, b, d, *rest):
        x, y = interpreter._values(a), interpreter._values(b)
        finite = all(np.isfinite(value).all() for value in (x, y, d.data))
        if a.dtype.scalar == tl.float32 or not finite:
            return interpreter._dot(self, a, b, d, *rest)
        return TensorHandle(product(unit, x, y, d.data), d.dtype.scalar)

    with mock.patch.object(InterpreterBuilder, "create_dot", dot):
        yield
