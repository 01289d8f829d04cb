"""Which backend is compiled by what: inductor takes seconds, so each op meets it once."""

import itertools

import pytest

from tests.common.contrastive_cases import DEVICE

BACKENDS = ["cpu", "triton"] if DEVICE == "cpu" else ["triton"]
QUICK = [("cpu", "inductor", True), ("triton", "aot_eager", True), ("cpu", "aot_eager", False)]


def compilers(option: str = "", values: tuple = (None,)):
    """Parametrises `backend`, `compiler` and an option of the test by all their combinations.

    Where programs are interpreted, most are slow: the first value meets inductor in C++, and the
    tracer in Triton; the others the tracer in C++.
    """
    first, found = values[0], []
    for backend, compiler, value in itertools.product(BACKENDS, ["inductor", "aot_eager"], values):
        kind = backend, compiler, value == first
        quick = DEVICE != "cpu" or kind in QUICK
        arguments = (backend, compiler, value) if option else (backend, compiler)
        marks = [] if quick else [pytest.mark.slow]
        found.append(pytest.param(*arguments, marks=marks))
    names = ["backend", "compiler", *filter(None, [option])]
    return pytest.mark.parametrize(names, found, indirect=["backend"])


def once(compiler: str) -> bool | None:
    """`dynamic` of torch.compile: one graph for all sizes, or another when the size changes."""
    return True if compiler == "inductor" else None
