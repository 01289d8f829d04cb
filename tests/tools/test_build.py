"""The build: nothing to do on an unchanged tree, and only a warning without a compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build(folder, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, capture_output=True,
        text=True, env={**os.environ, **environment},
    )


def test_unchanged_tree_rebuilds_nothing():
    result = build(ROOT)
    assert result.returncode == 0 and "no work to do" in result.stdout, result.stdout


def test_without_a_compiler_there_is_one_warning(tmp_path):
    for name in ("csrc", "pyext"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    result = build(tmp_path, CXX="/nonexistent/c++")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("extension was not built") == 1
    assert not list(tmp_path.glob("pyext/**/*.so"))


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm, of binutils")
def test_no_shared_code_needs_a_newer_cpu():
    """A weak symbol in a file for AVX could be linked into calls that every CPU makes."""
    objects = sorted((ROOT / "build").glob("ninja-*/*.AVX*.o"))
    if os.uname().machine == "x86_64":
        assert objects
    for path in objects:
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        weak = [line for line in symbols.stdout.splitlines() if line[17:18] in ("W", "V", "u")]
        own = f"::{path.name.split('.')[1]}::"  # only code for that CPU calls these
        shared = [line for line in weak if own not in line and "DW.ref." not in line]
        assert not shared, f"{path.name}: {shared}"
