"""Builds the extension in a way that setup.py does not offer, and says what to test on it.

`tools.extension.build` makes a copy of the package with that extension in it; whatever has the
folder first in PYTHONPATH imports it.
"""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
# Not those that start processes or measure memory: what watches or emulates them would be measured.
TESTS = ["tests/backends/test_extremes_cpu.py", "tests/ops"]
CHOICE = "(cpu or extremes) and not compile and not opcheck and not reference"


def setup_py() -> ModuleType:
    """setup.py as a module: what it knows of sources and flags."""
    spec = importlib.util.spec_from_file_location("tilewise_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    return module


def need(program: str, package: str) -> None:
    """Ends the script with a sentence if the program is not there."""
    if shutil.which(program) is None:
        sys.exit(f"{program}: not found (Debian and Ubuntu have it in {package})")


def build(folder: Path, cxx: str, suffix: str, change: Callable[[ModuleType], None]) -> None:
    """A copy of the package in `folder`, its extension compiled by `cxx`.

    change: is given setup.py's module before it writes the build file.
    """
    setup = setup_py()
    change(setup)
    objects = folder.parent / f"{folder.name}-objects"
    setup.write_build_file(objects, cxx)
    subprocess.run([sys.executable, "-m", "ninja", "--quiet", "-C", str(objects)], check=True)
    package = folder / "tilewise"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(
        ROOT / "pyext/tilewise", package,
        ignore=shutil.ignore_patterns("_C.*", "__pycache__", "_build.json"),
    )
    shutil.copy2(objects / "_C.so", package / f"_C{suffix}")
    (package / "_build.json").write_text(setup.record())
