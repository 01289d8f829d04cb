"""The house is as its pages say: names agree in all folders, hand-kept lists with the files."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
from torch import nn

import tilewise as tw
from tilewise import _backend

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pyext/tilewise"
PLACES = [
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
OPS = sorted(path.stem for path in PACKAGE.glob("ops/[!_]*.py"))
# Everything public besides the ops: a file of nn/, of another subpackage or of the package itself.
SUBPACKAGES = ("estimators", "smooth")
MODULES = [*PACKAGE.glob("nn/**/[!_]*.py"), *PACKAGE.glob("[!_]*.py")]
MODULES += [file for folder in SUBPACKAGES for file in PACKAGE.glob(f"{folder}/[!_]*.py")]
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "kernels", "pyext", "tests", "tools")
SOURCES = [ROOT / "setup.py"] + [
    path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
]


def test_public_names_are_the_ops():
    """Each folder's, by the one line that its __init__ has for it."""
    assert OPS == _backend.ops()
    assert all(inspect.isfunction(getattr(place, op)) for op in OPS for place in (tw.ops, tw))


@pytest.mark.parametrize("place", PLACES)
def test_op_has_a_file_in_every_place(place):
    assert not [op for op in OPS if not (ROOT / place.format(op)).is_file()]


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


@pytest.mark.parametrize("folder", ["pyext/tilewise/ops", "pyext/tilewise/reference", "kernels"])
def test_folder_holds_nothing_else(folder):
    """A file that no op owns would be in the wrong place."""
    assert {path.stem for path in (ROOT / folder).glob("[!_]*.py")} == set(OPS)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)
def test_public_file_is_exported_and_tested(file):
    """It has a test of its name, and no function or module of it is out of the tests' sight."""
    name = ".".join(file.relative_to(ROOT / "pyext").with_suffix("").parts)
    folder = file.relative_to(PACKAGE).parts[0]
    folder = folder if folder in ("nn", *SUBPACKAGES) else "ops"
    assert (ROOT / f"tests/{folder}/test_{file.stem}.py").is_file()
    public = [
        key for key, value in vars(importlib.import_module(name)).items()
        if getattr(value, "__module__", None) == name and not key.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value) and issubclass(value, nn.Module))
    ]
    assert public or folder == "nn"
    if folder == "nn":
        assert set(public) <= set(tw.nn.__all__)
        assert [key for key in tw.nn.__all__ if getattr(tw.nn, key).__module__ == name]
    if folder in SUBPACKAGES:
        assert all(hasattr(getattr(tw, folder), key) for key in public)
    files = [*ROOT.glob(f"tests/{folder}/*.py"), *ROOT.glob("tests/common/*.py")]
    tests = "".join(path.read_text() for path in files)
    assert not [key for key in public if not re.search(rf"\b{key}\b", tests)]


def test_what_is_imported_is_installed_by_make():
    """Every requirement of pyproject.toml has its exact version in requirements-dev.txt."""
    project = (ROOT / "pyproject.toml").read_text()
    extras = project.split("[project.optional-dependencies]")[1].split("\n\n")[0]
    names = {"torch", "numpy", "setuptools", *re.findall(r'"([\w-]+)"', extras)}
    pins = re.findall(r"^([\w-]+)==", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    assert len(names) > 10 and not names - set(pins)


def test_verbs_that_pages_name_exist():
    makefile = (ROOT / "Makefile").read_text()
    verbs = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    undocumented = set(re.findall(r"^([a-z-]+):(?!.*  ## )", makefile, re.MULTILINE))
    assert not undocumented
    pages = [ROOT / ".ci/run", *ROOT.glob(".github/**/*.yml"), *ROOT.glob("*.md")]
    pages += [*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")]
    for page in pages:
        used = set(re.findall(r"(?:`|: |^ *)make ([a-z-]+)", page.read_text(), re.MULTILINE))
        assert not used - verbs, page


def test_files_are_short():
    """Below 400 lines: what is longer does two jobs."""
    assert len(SOURCES) > 100
    assert not [path for path in SOURCES if len(path.read_text().splitlines()) >= 400]
