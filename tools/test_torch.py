"""`make test-torch VERSION=2.9.1`: builds for another release of torch, and runs the tests there.

Sets up build/torch-VERSION once, an environment of its own with that torch and the test tools of
requirements-dev.txt (3 to 7 GB where the wheel brings CUDA's libraries). What other packages are
compared in is left out, since each of them asks for a torch of its own; so are examples and what
looks at this checkout. More arguments go to pytest in place of the folders: TESTS="tests/ops -x".
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from tools.extension import ROOT

TOOLS = ("hypothesis", "ninja", "pytest", "pytest-timeout", "pytest-xdist", "rich",
         "scikit-learn", "setuptools", "wheel")  # fmt: skip
NUMPY = "numpy<2.4"  # the interpreter of Triton before 3.7 relies on what 2.4 refuses
TESTS = ["tests/ops", "tests/backends", "tests/nn", "tests/smooth", "tests/estimators",
         "tests/receptive_field/test_receptive_field.py",
         "tests/receptive_field/test_windows.py"]  # fmt: skip
BUILD = """\
import sys, sysconfig
from pathlib import Path
from tools.extension import build, setup_py
suffix = sysconfig.get_config_var("EXT_SUFFIX")
build(Path(sys.argv[1]), setup_py().compiler(), suffix, lambda setup: None)
"""
SAY = "import torch; print(torch.__version__)"


def pinned() -> list[str]:
    """The tools, at the versions that `make` installs."""
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    return [line for line in lines if line.split("==")[0] in TOOLS]


def set_up(folder: Path, version: str) -> Path:
    """The environment's Python. An interrupted set-up begins anew."""
    python, done = folder / "venv/bin/python", folder / "installed"
    if not done.exists():
        print(f"setting up {folder.relative_to(ROOT)}: torch {version}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder / "venv"], check=True)
        command = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*command, f"torch=={version}", NUMPY, *pinned()], check=True)
        done.touch()
    return python


def main() -> int:
    if len(sys.argv) < 2 or not re.fullmatch(r"\d+\.\d+\.\d+", sys.argv[1]):
        sys.exit("expected a release of torch: make test-torch VERSION=2.9.1")
    version, *tests = sys.argv[1:]
    folder = ROOT / "build" / f"torch-{version}"
    python = set_up(folder, version)
    found = subprocess.check_output([python, "-c", SAY], text=True).strip()
    if found.split("+")[0] != version:
        sys.exit(f"{folder}: expected torch {version}, found {found}: remove the folder")
    environment = {**os.environ, "PYTHONPATH": f"{folder / 'package'}:{ROOT}"}
    subprocess.run([python, "-c", BUILD, folder / "package"], cwd=ROOT, check=True)
    command = [python, "-m", "pytest", "-n", "auto", "-m", "not slow", "-p", "no:cacheprovider"]
    status = subprocess.run(
        [*command, *(tests or TESTS)], cwd=ROOT, env=environment
    ).returncode
    print(f"torch {found}: {'built, tests pass' if status == 0 else 'FAILED'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
