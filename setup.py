"""Builds tilewise._C with ninja: `python setup.py build_ext --inplace`, `pip install .` or `-e .`.

Torch's own BuildExtension gives every source the same flags. The vector kernels (csrc/cpu/simd)
are compiled once per instruction set, each with its own, so the build file is written here. An
unchanged tree rebuilds nothing. Without a working compiler the package installs without the
extension, with one warning, and the reference implementation serves.
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

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


def torch_flags():
    """Compiler and linker flags of the torch that is installed."""
    import pybind11
    import torch
    from torch.utils import cpp_extension

    includes = [*cpp_extension.include_paths(), pybind11.get_include()]
    compile_flags = [f"-isystem{path}" for path in (*includes, sysconfig.get_path("include"))]
    compile_flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")
    link_flags = [f"-L{path}" for path in cpp_extension.library_paths()]
    link_flags += ["-lc10", "-ltorch_cpu", "-ltorch_python", "-fopenmp"]
    return compile_flags, link_flags


def objects():
    """(object name, source, extra flags) of everything that is linked."""
    for source in sorted([CSRC / "module.cpp", *CSRC.glob("cpu/*.cpp")]):
        yield f"{source.stem}.o", source, []
    for name, flags in CAPABILITIES.items():
        defines = [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"]
        for source in sorted(CSRC.glob("cpu/simd/*.cpp")):
            yield f"{source.stem}.{name}.o", source, defines + flags


def write_build_file(build_dir: Path, target: Path):
    from ninja.ninja_syntax import Writer

    compile_flags, link_flags = torch_flags()
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    flags = shlex.join(CXXFLAGS + compile_flags)
    build_dir.mkdir(parents=True, exist_ok=True)
    with open(build_dir / "build.ninja", "w") as file:
        ninja = Writer(file)
        ninja.rule(
            "compile",
            f"{compiler} -MMD -MF $out.d {flags} $flags -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="compile $out",
        )
        link = f"{compiler} -shared -o $out $in {shlex.join(link_flags)}"
        ninja.rule("link", link, description="link _C")
        names = []
        for name, source, flags in objects():
            ninja.build(name, "compile", str(source), variables={"flags": shlex.join(flags)})
            names.append(name)
        ninja.build(str(target), "link", names)


class BuildExtension(build_ext):
    def run(self):
        try:
            super().run()
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            print(
                f"warning: tilewise's C++ extension was not built ({error}); "
                "the PyTorch reference will serve instead",
                file=sys.stderr,
            )

    def build_extension(self, ext):
        target = (ROOT / self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build_dir = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}"
        write_build_file(build_dir, target)
        ninja = [sys.executable, "-m", "ninja", "-C", str(build_dir)]
        subprocess.run(ninja + (["--verbose"] if self.verbose > 1 else []), check=True)


setup(
    ext_modules=[Extension("tilewise._C", sources=[])],
    cmdclass={"build_ext": BuildExtension},
)
