"""`make test-arm`: tests of the C++ backend on an emulated aarch64 (qemu-user).

Sets up build/arm once: a Debian root with Python 3.11 and the wheels that the tests need, both for
aarch64, about 1 GB. Cross-compiles the extension and runs the tests of every op on it. Emulation is
some twenty times slower than the machine, so nothing here is a measurement.
"""

import os
import subprocess
import sys
from types import ModuleType

from tools.extension import CHOICE, ROOT, TESTS, build, need

TORCH = "2.10.0"  # the last release whose wheel for aarch64 brings no CUDA
PACKAGES = (
    "numpy sympy networkx jinja2 fsspec filelock typing_extensions setuptools "
    "pytest pytest-timeout pytest-xdist hypothesis rich"
).split()
DEBIAN = "python3,libpython3.11-dev,libstdc++6,libgomp1,libffi8,zlib1g,libssl3,libexpat1"
FOLDER = ROOT / "build/arm"
SYSTEM, SITE, BUILT = FOLDER / "root", FOLDER / "site", FOLDER / "package"


def set_up() -> None:
    need("qemu-aarch64", "qemu-user")
    need("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not (SYSTEM / "usr/bin/python3.11").exists():
        need("mmdebstrap", "mmdebstrap")
        command = ["mmdebstrap", "--mode=root", "--variant=extract", "--architectures=arm64"]
        command += [f"--include={DEBIAN}", "bookworm", str(SYSTEM)]
        subprocess.run(command, check=True)
    if not (SITE / "torch").exists():
        command = [sys.executable, "-m", "pip", "install", "-qq", "--target", str(SITE)]
        for platform in ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64"):
            command += ["--platform", platform]
        command += ["--python-version", "3.11", "--only-binary=:all:"]
        subprocess.run([*command, *PACKAGES], check=True)
        subprocess.run([*command, "--no-deps", f"torch=={TORCH}"], check=True)


def change(setup: ModuleType) -> None:
    torch = SITE / "torch"
    includes = [torch / "include", torch / "include/torch/csrc/api/include"]
    includes += [SYSTEM / "usr/include/python3.11", SYSTEM / "usr/include"]
    compile_flags = [f"-isystem{path}" for path in includes[:3]]
    compile_flags += [f"-idirafter{includes[3]}", "-D_GLIBCXX_USE_CXX11_ABI=1"]
    link_flags = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch_python", "-fopenmp"]
    link_flags += ["-Wl,--allow-shlib-undefined"]
    setup.CAPABILITIES = {"DEFAULT": []}
    setup.torch_flags = lambda: (compile_flags, link_flags)


def main() -> int:
    set_up()
    suffix = ".cpython-311-aarch64-linux-gnu.so"
    build(BUILT, "aarch64-linux-gnu-g++", suffix, change)
    environment = {
        "PYTHONPATH": ":".join(map(str, (BUILT, SITE, ROOT))),
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "2",
        "LD_LIBRARY_PATH": str(SITE / "torch/lib"),
    }
    command = ["qemu-aarch64", "-L", str(SYSTEM), str(SYSTEM / "usr/bin/python3.11")]
    command += ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(sys.argv[1:] or TESTS)]
    command += ["-k", CHOICE]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
