"""Fills Triton's cache before tests run on a GPU: `python -m tools.precompile [sm_90]`.

One kernel after the other, first compilations take a test run minutes. What the static gate lists
for the GPU's architecture is compiled here in as many processes as there are cores, and found in
the cache by whatever launches it.
"""

import sys
import time

import torch

from tests.triton_tools import gate


def rows_for(arch: str) -> tuple[gate.Table, dict[gate.Key, gate.Task]]:
    """The gate's rows of one architecture, and who makes them."""
    rows, owner = {}, {}
    for op in gate.OWNERS:
        for row in gate.rows_of(op, arch, None):
            key = gate.key_of(row)
            rows[key], owner[key] = row, (op, arch)
    return rows, owner


def main() -> int:
    if len(sys.argv) > 1:
        arch = sys.argv[1]
    elif torch.cuda.is_available():
        from tilewise.kernels import _common

        arch = _common.architecture(torch.device("cuda", torch.cuda.current_device()))
    else:
        sys.exit("there is no CUDA device: name an architecture, such as sm_90")
    begin = time.monotonic()
    rows, owner = rows_for(arch)
    spilling = [row for row in gate.compiled(rows, rows, owner) if row["stack"]]
    print(f"{arch}: compiled {len(rows)} kernels in {time.monotonic() - begin:.0f} s")
    for row in spilling:
        print(f"{gate.key_of(row)}: {row['stack']} bytes of stack")
    return 0


if __name__ == "__main__":
    sys.exit(main())
