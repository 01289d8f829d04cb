"""`make compilers`: builds the extension with each compiler that is there, and runs tests on it.

Names of compilers may follow: `python -m tools.compilers g++-11 clang++-14`. clang needs OpenMP's
header and library (Debian and Ubuntu: libomp-dev).
"""

import os
import shutil
import subprocess
import sys
import sysconfig

from tools.extension import ROOT, build

COMPILERS = [f"g++-{n}" for n in range(11, 16)] + [f"clang++-{n}" for n in range(14, 22)]
TESTS = ["tests/backends/test_extremes_cpu.py", "tests/ops/test_sigmoid_loss.py",
         "tests/ops/test_nearest_code.py", "tests/ops/test_philox.py"]  # fmt: skip


def works(compiler: str) -> bool:
    folder = ROOT / "build" / compiler
    print(f"{compiler}:", flush=True)
    try:
        build(folder, compiler, sysconfig.get_config_var("EXT_SUFFIX"), lambda setup: None)
    except subprocess.CalledProcessError:
        return False
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    command += ["-k", "(cpu or extremes or philox) and not compile"]
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def main() -> int:
    compilers = sys.argv[1:] or [name for name in COMPILERS if shutil.which(name)]
    if not compilers:
        sys.exit(f"none of these is installed: {', '.join(COMPILERS)}")
    results = {name: works(name) for name in compilers}
    for name, worked in results.items():
        print(f"{name}: {'built, tests pass' if worked else 'FAILED'}")
    return int(not all(results.values()))


if __name__ == "__main__":
    sys.exit(main())
