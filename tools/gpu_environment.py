"""Prints what a GPU's figures depend on: `python -m tools.gpu_environment`.

Exit status 1, with the reason, where the driver sees a GPU and torch does not, and where there is
none: nothing could be tested.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys

import torch

OPTIONAL = (
    "diffusers", "open_clip", "vector_quantize_pytorch", "siglip_kernel", "memeff", "inf_cl",
    "cut_cross_entropy", "flash_kmeans", "faiss", "rich", "hypothesis", "xdist",
)  # fmt: skip


def said_by(*command: str) -> str:
    """What a program prints, or that it is not there."""
    if not shutil.which(command[0]):
        return "not there"
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout or done.stderr).strip()


def header() -> str:
    """Python's, which Triton compiles its launcher with."""
    import sysconfig

    path = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    return path if os.path.exists(path) else f"{path} is missing: install Python's headers"


def main() -> int:
    driver = said_by(
        "nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit",
        "--format=csv,noheader",
    )
    found = importlib.util.find_spec("triton")
    triton = __import__("triton").__version__ if found else "not there"
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    for name, value in {
        "python": platform.python_version(), "headers": header(),
        "torch": f"{torch.__version__}, made for CUDA {torch.version.cuda}", "triton": triton,
        "compiler": said_by("cc", "--version").split("\n")[0], "driver": driver,
        "not installed": ", ".join(missing) or "nothing",
    }.items():  # fmt: skip
        print(f"{name:14} {value}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            print(f"{f'cuda:{i}':14} {torch.cuda.get_device_properties(i)}")
        return 0
    if driver != "not there" and "failed" not in driver.lower() and driver:
        print(f"torch {torch.__version__} does not see the GPU that nvidia-smi sees: was it built "
              f"for a newer driver, or for CPUs?", file=sys.stderr)  # fmt: skip
    else:
        print("there is no CUDA device: nothing can be tested on one", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
