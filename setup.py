"""Builds tilewise._C with ninja: `python setup.py build_ext --inplace`, or through pip.

Torch's own BuildExtension gives every source the same flags. The vector kernels (csrc/cpu/simd)
are compiled once per instruction set, each with its own, so the build file is written here. An
unchanged tree rebuilds nothing.

The extension runs with one release of torch only, the one that it was compiled for, so the build
takes the torch that is installed, and a wheel requires that release. A build that sees no torch
fails: build isolation would compile for whatever is newest. What else is missing (ninja, a
compiler, a compiler that does its work) costs the extension only. The package is installed
without it, `_build.json` beside the modules keeps the reason, and tilewise quotes it when the
reference has to serve. TILEWISE_REQUIRE_EXTENSION=1 makes every failure one of the build, =0 none.
"""

import filecmp
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OLDEST_TORCH = (2, 9)
NEEDS_CXX20 = (2, 14)  # the first torch whose headers do
ANY_TORCH = "torch>={}.{}".format(*OLDEST_TORCH)

# No contraction: where a sum must not depend on the instruction set, FMA would change its bits.
CXXFLAGS = "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=off -g0".split()
# What gcc says of its own intrinsics is not for us.
CXXFLAGS += "-Wall -Wno-uninitialized -Wno-maybe-uninitialized -Wno-psabi".split()
# The names that at::vec tests for. Order matters: where a weak symbol comes out of several of these
# files the linker keeps the first, which every CPU can run.
CAPABILITIES = {"DEFAULT": []}
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITIES |= {
        "AVX2": "-mavx2 -mfma -mf16c".split(),
        "AVX512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c".split(),
    }

NO_TORCH = """\
tilewise's C++ extension is compiled for the torch that it will run with, and this build sees none
(pip's build isolation hides the installed one). With torch installed:
    pip install "setuptools>=77" ninja
    pip install --no-build-isolation .
TILEWISE_REQUIRE_EXTENSION=0 installs tilewise without the extension."""


class BuildError(Exception):
    """Says in one line why there is no extension."""


def torch_version():
    """The installed torch's, as in its wheel's name; None without one. Does not import it."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version):
    """(2, 14) of "2.14.1+cpu"."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def compiler():
    return os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"


def what_is_missing():
    """The first thing that a build needs and does not find; None if all is there."""
    torch = torch_version()
    if torch is None:
        return "torch was not installed where it was built"
    if release(torch) < OLDEST_TORCH:
        return f"torch {torch} is too old, expected {ANY_TORCH}"
    if importlib.util.find_spec("ninja") is None:
        return "ninja is not installed (pip install ninja)"
    program = shlex.split(compiler())[0]
    if shutil.which(program) is None:
        return f"{program}: not found (a C++17 compiler is needed; CXX names it)"
    return None


def requirements():
    """What the package needs at run time: with an extension, the very torch it was built for."""
    pinned = "sdist" not in sys.argv and what_is_missing() is None
    return [f"torch=={torch_version().split('+')[0]}" if pinned else ANY_TORCH, "numpy"]


def torch_flags():
    """Compiler and linker flags of the torch that is installed, whose headers hold pybind11's."""
    import torch
    from torch.utils import cpp_extension

    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    compile_flags = [f"-isystem{path}" for path in includes]
    compile_flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")
    if release(torch.__version__) >= NEEDS_CXX20:
        compile_flags.append("-std=c++20")  # of two standards the last one counts
    link_flags = [f"-L{path}" for path in cpp_extension.library_paths()]
    link_flags += ["-lc10", "-ltorch_cpu", "-ltorch_python", "-fopenmp"]
    return compile_flags, link_flags


def objects():
    """(object name, source, extra flags) of everything that is linked."""
    kernels = sorted(CSRC.glob("cpu/simd/*.cpp"))
    others = sorted(set(CSRC.rglob("*.cpp")) - set(kernels))
    if not (kernels and CSRC / "module.cpp" in others and len(others) > 1):
        raise SystemExit(f"error: {CSRC} is not complete: not all sources came with this copy")
    for source in others:  # files of one op have one name in every folder
        yield ".".join(source.relative_to(CSRC).with_suffix(".o").parts), source, []
    for name, flags in CAPABILITIES.items():
        defines = [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"]
        for source in kernels:
            yield f"{source.stem}.{name}.o", source, defines + flags


def build_folder():
    """Objects lie apart by Python and torch: a change of either compiles, and changing back links.

    Its name is what tells ninja of another torch: dependencies on system headers are not kept.
    """
    return ROOT / "build" / f"ninja-{sys.implementation.cache_tag}-torch-{torch_version()}"


def write_build_file(folder: Path, cxx: str):
    """`build.ninja` in `folder`, which makes `_C.so` there."""
    from ninja.ninja_syntax import Writer

    compile_flags, link_flags = torch_flags()
    flags = shlex.join(CXXFLAGS + compile_flags)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "build.ninja", "w") as file:
        ninja = Writer(file)
        ninja.variable("cxx", cxx)
        ninja.rule(
            "compile",
            f"$cxx -MMD -MF $out.d {flags} $flags -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="compile $out",
        )
        link = f"$cxx -shared -o $out $in {shlex.join(link_flags)}"
        ninja.rule("link", link, description="link _C")
        names = []
        for name, source, flags in objects():
            ninja.build(name, "compile", str(source), variables={"flags": shlex.join(flags)})
            names.append(name)
        ninja.build("_C.so", "link", names)


def run_ninja(folder: Path, verbose: bool):
    """Compiles on all cores: one line of progress on a terminal, two lines elsewhere."""
    command = [sys.executable, "-m", "ninja", "-C", str(folder)] + ["--verbose"] * verbose
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    start, done, output = time.monotonic(), 0, []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        for line in process.stdout:
            step = re.match(r"\[(\d+)/(\d+)\]", line)
            if verbose:
                print(line, end="")
            elif step:
                done = show_progress(done, *map(int, step.groups()))
            if not step:
                output.append(line.rstrip())
    if done:
        print(f" done in {time.monotonic() - start:.0f} s", flush=True)
    if process.returncode:
        print("\n".join(output), file=sys.stderr)
        errors = [line for line in output if "error:" in line or "not found" in line]
        raise BuildError((errors or output[-1:] or ["ninja failed"])[0][:300])


def show_progress(before: int, now: int, of: int) -> int:
    if sys.stdout.isatty():
        print(f"\rbuilding the C++ extension: {now} of {of} files", end="", flush=True)
    elif not before:
        seconds = 4 * of / (os.cpu_count() or 1)  # four each, on one core
        text = f"building the C++ extension: {of} files, about {seconds:.0f} s ..."
        print(text, end="", flush=True)
    return now


def record(failure=None):
    """What `_build.json` says of a build."""
    python = "{}.{}".format(*sys.version_info)
    return json.dumps({"torch": torch_version(), "python": python, "failure": failure})


class BuildExtension(build_ext):
    def run(self):
        target = Path(self.get_ext_fullpath("tilewise._C"))
        target.parent.mkdir(parents=True, exist_ok=True)
        failure = None
        try:
            self.build(target)
        except BuildError as error:
            failure = str(error)
            target.unlink(missing_ok=True)  # one of older sources would serve unnoticed
        (target.parent / "_build.json").write_text(record(failure))
        if failure:
            self.without_extension(failure)

    def build(self, target: Path):
        list(objects())  # an incomplete source is no reason to go on without the extension
        missing = what_is_missing()
        if missing:
            raise BuildError(missing)
        folder = build_folder()
        write_build_file(folder, compiler())
        run_ninja(folder, verbose=self.verbose > 1)
        built = folder / "_C.so"
        if not target.exists() or not filecmp.cmp(built, target, shallow=False):
            target.unlink(missing_ok=True)  # a process may have the old one mapped
            shutil.copy(built, target)

    def without_extension(self, failure: str):
        """Fails where it is asked to, warns elsewhere, and requires no release of torch then."""
        asked = os.environ.get("TILEWISE_REQUIRE_EXTENSION")
        if asked != "0" and torch_version() is None:
            raise SystemExit(NO_TORCH)
        if asked == "1":
            raise SystemExit(f"error: tilewise's C++ extension was not built: {failure}\n"
                             "TILEWISE_REQUIRE_EXTENSION=0 goes on without it")
        print(f"warning: tilewise's C++ extension was not built: {failure}; "
              "the PyTorch reference will serve instead", file=sys.stderr)
        self.distribution.install_requires = [ANY_TORCH, "numpy"]
        self.distribution.metadata.install_requires = self.distribution.install_requires
        self.distribution.have_run.pop("egg_info", None)  # it wrote them before the build
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel:
            wheel.dist_info_dir = None  # written before the build, for a wheel with the extension


class BuildPython(build_py):
    def run(self):
        if not self.editable_mode:  # what was deleted from the tree must not get into a wheel
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


if __name__ == "__main__":
    setup(
        install_requires=requirements(),
        ext_modules=[Extension("tilewise._C", sources=[])],
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
    )
