"""The same op has the same name in every folder, and one signature."""

import importlib
import inspect
from pathlib import Path

import pytest

import tilewise as tw
from tilewise import _backend

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = [
    "pyext/tilewise/ops/{}.py",
    "pyext/tilewise/reference/{}.py",
    "csrc/cpu/{}.cpp",
    "csrc/cpu/simd/{}.cpp",
    "csrc/cpu/simd/{}.h",
    "kernels/{}.py",
    "benchmarks/{}.py",
    "docs/ops/{}.md",
    "tests/ops/test_{}.py",
]
OPS = sorted(path.stem for path in (ROOT / "pyext/tilewise/ops").glob("[!_]*.py"))

MODULES = sorted((ROOT / "pyext/tilewise/nn").glob("*/[!_]*.py"))


def test_public_names_are_the_ops():
    assert OPS == sorted(_backend.OPS) == sorted(tw.reference.__all__)
    assert set(OPS) <= set(tw.ops.__all__) & set(tw.__all__)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_op_has_a_file_in_every_backends(op, backend):
    assert (ROOT / backend.format(op)).is_file()


@pytest.mark.parametrize("op", OPS)
def test_signatures_agree(op):
    """Names, order and defaults; the public function may take more types."""
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (getattr(tw, op), getattr(tw.reference, op))
    )
    assert ours == theirs
    assert getattr(tw, op).__module__ == f"tilewise.ops.{op}"
    for part in ("Args:", "Returns:", "Cost:", "Raises:", "Paper:"):
        assert part in getattr(tw, op).__doc__, f"{op}: docstring lacks {part}"


@pytest.mark.parametrize("backend", ["ops", "reference"])
def test_no_backend_holds_anything_else(backend):
    """A file that no op owns would be in the wrong place."""
    package = importlib.import_module(f"tilewise.{backend}")
    files = {p.stem for p in Path(package.__file__).parent.glob("[!_]*.py")}
    assert files == set(OPS)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)
def test_file_of_modules_exports_and_is_tested(file):
    """A public file of nn/ exports something, and has a test of its name."""
    module = f"tilewise.nn.{file.parent.name}.{file.stem}"
    assert (ROOT / f"tests/nn/test_{file.stem}.py").is_file()
    assert any(getattr(tw.nn, n).__module__ == module for n in tw.nn.__all__)
