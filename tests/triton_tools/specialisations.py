"""How many binaries kernels need for all sizes of one dtype.

    python -m tests.triton_tools.specialisations --op sigmoid_loss --sizes

A binary takes seconds to compile, in the middle of a user's training. Launches are made for an
architecture of your choice, and what each would be compiled from is compared; nothing is compiled.
"""

import argparse
import collections
import functools
import itertools
import sys
from collections.abc import Callable, Iterator

import torch

# Batches of tiles, their last ones, and single rows; some are beyond what a tile or chunk holds.
ROWS = (1, 5, 64, 128, 100, 1000, 1024, 3000, 4096)
PAIRS = [(n, n) for n in ROWS] + [(1, 1000), (1000, 1), (128, 1024), (100, 4096), (4096, 129)]
DEPTHS = (64, 96, 100, 512)
SEARCHES = [(n, k) for n in (1, 64, 100, 1000, 4096) for k in (64, 512, 1000, 8192, 32768)]
COLUMNS = (1, 2, 5, 16, 64, 100, 1000, 1024, 3000, 4096, 5000, 8192, 16384, 50257)

Calls = Iterator[tuple[tuple, Callable[[], object]]]  # sizes, and a call


def contrasts(op: str) -> Calls:
    from tests.triton_tools.cases import kernels

    scale, seed = torch.ones(()), torch.zeros((), dtype=torch.int64)
    before, after = {
        "sigmoid_loss": ((scale, scale), [True] * 4),
        "clip_loss": ((scale,), (0.0, *[True] * 3)),
        "info_nce": ((scale,), (0.0, *[True] * 3)),
        "hard_negatives": ((scale,), (seed, 0)),
    }[op]
    for (rows, cols), depth in itertools.product(PAIRS, DEPTHS):
        x, y = (torch.zeros(n, depth, dtype=torch.bfloat16) for n in (rows, cols))
        yield (rows, cols, depth), functools.partial(
            getattr(vars(kernels)[op], op), x, y, *before, 0, None, None, *after
        )


def nearest_code() -> Calls:
    from tests.triton_tools.cases import kernels

    for (rows, codes), depth in itertools.product(SEARCHES, DEPTHS):
        x, codebook = torch.zeros(1, rows, depth), torch.zeros(1, codes, depth)
        yield (rows, codes, depth), functools.partial(
            kernels.nearest_code.nearest_code, x, codebook, "l2", 1, None, None
        )


def code_sums() -> Calls:
    from tests.triton_tools.cases import kernels

    for (rows, codes), depth in itertools.product(SEARCHES, DEPTHS):
        x, index = torch.zeros(1, rows, depth), torch.zeros(1, rows, dtype=torch.int64)
        yield (rows, codes, depth), functools.partial(
            kernels.code_sums.code_sums, x, index, codes
        )


def gumbel_softmax() -> Calls:
    from tests.triton_tools.cases import kernels

    tau, seed = torch.ones(()), torch.zeros((), dtype=torch.int64)
    for rows, cols in itertools.product((1, 7, 64), COLUMNS):
        yield (rows, cols), functools.partial(
            kernels.gumbel_softmax.gumbel_softmax, torch.zeros(rows, cols), tau, seed, 0, 1, False
        )


def gumbel_argmax() -> Calls:
    from tests.triton_tools.cases import kernels

    seed = torch.zeros((), dtype=torch.int64)
    for rows, cols in itertools.product((1, 7, 64), COLUMNS):
        yield (rows, cols), functools.partial(
            kernels.gumbel_argmax.gumbel_argmax, torch.zeros(rows, cols), seed, 0, 1, 1, False
        )


def gaussian_sample() -> Calls:
    from tests.triton_tools.cases import kernels

    seed = torch.zeros((), dtype=torch.int64)
    for rows, cols in itertools.product((1, 7, 64), COLUMNS[1:]):  # one column is a fifth
        x = torch.zeros(rows, cols)
        yield (rows, cols), functools.partial(
            kernels.gaussian_sample.gaussian_sample, x, x, seed, 0, -30.0, 20.0
        )


CONTRASTS = ("sigmoid_loss", "clip_loss", "info_nce", "hard_negatives")
OPS: dict[str, Callable[[], Calls]] = {
    **{op: functools.partial(contrasts, op) for op in CONTRASTS},
    "nearest_code": nearest_code, "code_sums": code_sums, "gumbel_softmax": gumbel_softmax,
    "gumbel_argmax": gumbel_argmax, "gaussian_sample": gaussian_sample,
}  # fmt: skip


def binaries(op: str, arch: str) -> dict[str, dict[str, tuple]]:
    """Of each kernel that the op launches, what it is made from, with the first sizes of each."""
    from tests.triton_tools import offline  # which refuses to be imported to interpret

    found: dict[str, dict[str, tuple]] = collections.defaultdict(dict)
    with offline.launching_for(arch, compiling=()) as launched:
        for sizes, call in OPS[op]():
            launched.clear()
            call()
            for launch in launched:
                found[launch.name].setdefault(launch.made_from, sizes)
    return found


def anew(op: str, arch: str, together: bool) -> list[str]:
    """What a smaller batch compiles when one of the largest was run: kernels, with its rows.

    `together`: after those of other depths and codebooks, in one process.
    """
    from tests.triton_tools import offline
    from tilewise.kernels import _common

    batches: dict[tuple, dict[int, Callable]] = collections.defaultdict(dict)
    for (rows, *rest), call in OPS[op]():
        if op not in CONTRASTS or rows == rest[0]:
            batches[tuple(rest[op in CONTRASTS :])][rows] = call
    found = []
    known: set[str] = set()
    _common.prepared.clear()
    with offline.launching_for(arch, compiling=()) as launched:
        for rest, sizes in batches.items():
            if not together:
                _common.prepared.clear()
                launched.prepared.clear()
                known.clear()
            for rows in sorted(sizes, reverse=True):
                launched.clear()
                sizes[rows]()
                made = {launch.made_from: launch.name for launch in launched}
                new = made.keys() - known if rows < max(sizes) else set()
                found += [f"{made[x]} {rows} of {rest}" for x in new]
                known |= made.keys() | launched.prepared
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=OPS, help="one op alone")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--sizes", action="store_true", help="also the first sizes of each binary")
    parser.add_argument("--anew", action="store_true", help="what smaller batches compile anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for op in [options.op] if options.op else OPS:
        if options.anew:
            found = anew(op, options.arch, False) + anew(op, options.arch, True)
            print(op, *dict.fromkeys(found), sep="\n  ", flush=True)
            continue
        for kernel, made in binaries(op, options.arch).items():
            sizes = "  " + ", ".join("x".join(map(str, x)) for x in made.values())
            print(f"{op} {kernel} {len(made)}{sizes * options.sizes}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
