"""The build: what gets into an sdist and a wheel, what they require, and what a failure says."""

import filecmp
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

from tilewise import _extension

ROOT = Path(__file__).resolve().parents[2]
PYTHON_FILES = sorted(
    [str(path.relative_to(ROOT / "pyext")) for path in ROOT.glob("pyext/tilewise/**/*.py")]
    + [f"tilewise/{path.relative_to(ROOT)}" for path in ROOT.glob("kernels/**/*.py")]
)
# Writes an empty object and says that it depends on nothing.
FAKE_COMPILER = """#!/bin/sh
for word; do
    case $previous in -o) touch $word;; -MF) echo "x:" > $word;; esac
    previous=$word
done
"""


@pytest.fixture
def setup():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("tilewise_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def package(kind: str, source: Path, target: Path, prepared: bool = False, **environment):
    """Has setuptools' backend make a wheel or sdist of `source`, as pip and build do."""
    code = f"import setuptools.build_meta as b; to = {str(target)!r}\n"
    if prepared:
        code += "made = f'{to}/' + b.prepare_metadata_for_build_wheel(to)\n"
    code += f"b.build_{kind}(to{', None, made' if prepared else ''})"
    environment = {**os.environ, **environment}
    environment.pop("TILEWISE_REQUIRE_EXTENSION", None)  # which make sets
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The folder that a fresh sdist unpacks to."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("sdist")
    for name in ("csrc", "kernels", "pyext"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    result = package("sdist", tree, out)
    assert result.returncode == 0, result.stderr
    with tarfile.open(next(out.glob("*.tar.gz"))) as file:
        file.extractall(out, filter="data")
    return next(path for path in out.iterdir() if path.is_dir())


def wheel_of(folder: Path):
    """(names, metadata, the build's record) of the wheel in `folder`."""
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as file:
        names = file.namelist()
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        record = json.loads(file.read("tilewise/_build.json"))
        return names, file.read(metadata).decode(), record


def test_sdist_contains_what_a_build_needs(sdist):
    files = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    csrc = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file()}
    assert len(csrc) > 20 and csrc <= files
    assert {f"pyext/{name}" for name in (*PYTHON_FILES, "tilewise/py.typed")} <= files
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= files
    assert not [name for name in files if name.endswith((".so", "_build.json"))]
    assert "\nRequires-Dist: torch>=2.9\n" in (sdist / "PKG-INFO").read_text()


def test_wheel_contains_every_module_and_requires_its_torch(sdist, setup, tmp_path):
    """From an unpacked sdist, with a compiler that takes no time."""
    stale = sdist / f"build/lib.linux-x86_64-{sys.implementation.cache_tag}/tilewise/deleted.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    result = package("wheel", sdist, tmp_path, CXX=script(tmp_path / "c++", FAKE_COMPILER))
    assert result.returncode == 0, result.stderr
    names, metadata, record = wheel_of(tmp_path)
    assert sorted(name for name in names if name.endswith(".py")) == PYTHON_FILES
    assert {"tilewise/py.typed"} < set(names) and any("tilewise/_C." in name for name in names)
    release = setup.torch_version().split("+")[0]
    assert f"\nRequires-Dist: torch=={release}\n" in metadata
    assert record["torch"] == setup.torch_version() and record["failure"] is None


def test_where_compiling_fails_the_package_says_so(sdist, tmp_path):
    """Also in the metadata, which pip asks for before the build."""
    compiler = script(tmp_path / "c++", "#!/bin/sh\necho 'x.cpp:1: error: bad'; exit 1\n")
    result = package("wheel", sdist, tmp_path, prepared=True, CXX=compiler)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("extension was not built: x.cpp:1: error: bad") == 1
    names, metadata, record = wheel_of(tmp_path)
    assert not any(name.endswith(".so") for name in names)
    assert "\nRequires-Dist: torch>=2.9\n" in metadata
    assert record["failure"] == "x.cpp:1: error: bad"


def test_missing_sources_are_an_error(setup, tmp_path, monkeypatch):
    """Else an empty library would be linked, and the reference serve."""
    assert len(list(setup.objects())) > 10
    monkeypatch.setattr(setup, "CSRC", tmp_path)
    with pytest.raises(SystemExit, match="not complete"):
        list(setup.objects())


def test_what_is_missing_is_named(setup, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)
    assert setup.what_is_missing() is None and "torch==" in setup.requirements()[0]
    monkeypatch.setenv("CXX", "/nonexistent/c++ -m64")
    assert setup.what_is_missing().startswith("/nonexistent/c++: not found")
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    assert "pip install ninja" in setup.what_is_missing()
    monkeypatch.setattr(setup, "torch_version", lambda: "2.8.1+cpu")
    assert setup.what_is_missing() == "torch 2.8.1+cpu is too old, expected torch>=2.9"
    assert setup.requirements()[0] == "torch>=2.9"


@pytest.mark.parametrize("version, standard", [
    ("2.9.1", 17), ("2.13.0+cpu", 17), ("2.14.0", 20), ("2.15.0.dev20261101", 20), ("3.0.0", 20),
])
def test_standard_is_the_one_that_torchs_headers_need(setup, monkeypatch, version, standard):
    monkeypatch.setattr(torch, "__version__", version)
    flags = setup.CXXFLAGS + setup.torch_flags()[0]
    assert [flag for flag in flags if "-std" in flag][-1] == f"-std=c++{standard}"


def test_the_compilers_first_error_is_the_reason(setup, tmp_path, capfd):
    text = "#!/bin/sh\necho 'In file included'; echo 'x.cpp:1:2: error: bad' >&2; exit 1\n"
    setup.write_build_file(tmp_path, script(tmp_path / "c++", text))
    with pytest.raises(setup.BuildError, match=r"^x.cpp:1:2: error: bad$"):
        setup.run_ninja(tmp_path, verbose=False)
    assert "In file included" in capfd.readouterr().err


@pytest.mark.parametrize("asked", [None, "0", "1"])
@pytest.mark.parametrize("torch", [None, "2.13.0"])
def test_when_a_failure_stops_the_installation(setup, monkeypatch, capsys, asked, torch):
    if asked is None:
        monkeypatch.delenv("TILEWISE_REQUIRE_EXTENSION", raising=False)
    else:
        monkeypatch.setenv("TILEWISE_REQUIRE_EXTENSION", asked)
    monkeypatch.setattr(setup, "torch_version", lambda: torch)
    command = setup.BuildExtension(Distribution())
    if asked == "1" or (torch is None and asked is None):
        with pytest.raises(SystemExit, match="--no-build-isolation|not built: no luck"):
            command.without_extension("no luck")
    else:
        command.without_extension("no luck")
        assert "not built: no luck" in capsys.readouterr().err


def test_unchanged_tree_rebuilds_nothing(setup, tmp_path):
    """With the compiler that built it, whatever CXX says where the tests run."""
    folder = setup.build_folder()
    if _extension.module is None or not folder.is_dir():
        pytest.skip("the extension was not built here")
    text = (folder / "build.ninja").read_text()
    setup.write_build_file(tmp_path, re.search(r"^cxx = (.*)$", text, re.MULTILINE)[1])
    assert text == (tmp_path / "build.ninja").read_text()
    command = [sys.executable, "-m", "ninja", "-n", "-C", folder]
    result = subprocess.run(command, capture_output=True, text=True)
    assert "no work to do" in result.stdout, result.stdout
    assert filecmp.cmp(folder / "_C.so", _extension.module.__file__, shallow=False)


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm, of binutils")
def test_no_shared_code_needs_a_newer_cpu(setup):
    """A weak symbol in a file for AVX could be linked into calls that every CPU makes."""
    names = [name for name, _, _ in setup.objects() if ".AVX" in name]
    assert names or os.uname().machine != "x86_64"
    for path in [setup.build_folder() / name for name in names]:
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        weak = [line for line in symbols.stdout.splitlines() if line[17:18] in ("W", "V", "u")]
        own = f"::{path.name.split('.')[1]}::"  # only code for that CPU calls these
        shared = [line for line in weak if own not in line and "DW.ref." not in line]
        assert not shared, f"{path.name}: {shared}"


RUNNING = {
    "torch": importlib.metadata.version("torch"), "python": "{}.{}".format(*sys.version_info),
    "failure": None,
}


@pytest.mark.parametrize("record, error, message", [
    (None, ModuleNotFoundError(), "is not built; `pip install --no-build-isolation"),
    ({"failure": "g++: not found"}, ModuleNotFoundError(), r"is not built: g\+\+: not found; when"),
    ({"torch": "2.9.1", "python": "3.11", "failure": None}, ImportError("undefined symbol"),
     r"was built for torch 2.9.1 \(Python 3.11\), running torch .*; `pip .* builds it for this"),
    (RUNNING, ImportError("undefined symbol"), "does not load: undefined symbol"),
    (RUNNING | {"torch": torch.__version__.split("+")[0] + "+cu99"}, ImportError("undefined"),
     r"was built for torch \S+\+cu99"),
])
def test_a_missing_extension_is_explained(tmp_path, monkeypatch, record, error, message):
    monkeypatch.setattr(_extension, "_HERE", tmp_path / "site-packages/tilewise")
    _extension._HERE.mkdir(parents=True)
    # A wheel's name may lack what torch says of itself.
    monkeypatch.setattr(torch, "__version__", torch.__version__.split("+")[0] + "+cu130")
    if record:
        (_extension._HERE / "_build.json").write_text(json.dumps(record))
    assert re.search(message, _extension._explain(error))
