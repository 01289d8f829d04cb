"""`make sanitize`: tests of the C++ backend with AddressSanitizer and UndefinedBehaviorSanitizer.

The extension is compiled with both in build/sanitize; the tests of every op run on it, once for
each instruction set of this machine. Python and torch themselves are not instrumented, so what
they leak is not reported. Any finding ends a test process, which fails.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from tools.extension import CHOICE, ROOT, TESTS, build, need

FLAGS = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
MINUTES = 30  # for each instruction set


def change(setup: ModuleType) -> None:
    setup.CXXFLAGS = [flag for flag in setup.CXXFLAGS if flag not in ("-O3", "-g0")]
    setup.CXXFLAGS += ["-O1", "-g1", "-fno-omit-frame-pointer"]


def runtime(compiler: str) -> str:
    """The libraries that must be loaded first, since Python does not link them: the sanitizer's,
    and C++'s, without which the sanitizer does not know what throws an exception."""
    paths = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(path).is_absolute() for path in paths):
        sys.exit(f"{compiler} has no AddressSanitizer (libasan.so): install gcc's sanitizers")
    return " ".join(paths)


def main() -> int:
    need("g++", "g++")
    library = runtime("g++")
    folder = ROOT / "build/sanitize"
    build(folder, f"g++ {FLAGS}", sysconfig.get_config_var("EXT_SUFFIX"), change)
    failed = 0
    for capability in sys.argv[1:] or ["default", "avx2", "avx512"]:
        environment = {
            **os.environ,
            "PYTHONPATH": f"{folder}:{ROOT}",
            "LD_PRELOAD": library,
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "ATEN_CPU_CAPABILITY": capability,
        }
        print(f"{capability}:", flush=True)
        # The sanitizers write to the terminal themselves: what pytest captured would end with it.
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--capture=sys"]
        command += ["-p", "no:cacheprovider", *TESTS]
        command += ["-k", CHOICE]
        try:
            failed |= subprocess.run(
                command, cwd=ROOT, env=environment, timeout=60 * MINUTES
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"{capability}: not finished after {MINUTES} minutes")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
