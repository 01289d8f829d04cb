"""What the gate compiles: of each op, under its name, every kind of launch that it can make.

A case is a name and calls that must share one binary for each kernel that they launch.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch

from tilewise import _backend
from tilewise.kernels import _common, _ids

Cases = Iterator[tuple[str, list[Callable[[], object]]]]

kernels = SimpleNamespace(
    **{op: importlib.import_module(f"tilewise.kernels.{op}") for op in _backend.ops()}
)
# Two batch sizes of a kind must run the same binary.
SIZES = {"aligned": [(128, 256), (256, 128)], "masked": [(129, 1), (77, 96)]}
# Of kernels with several sizes of a tile. So many processors that tiles are large, or small.
TILES = SIZES | {"small": SIZES["masked"], "few": [(1, 300), (29, 96)]}
PROCESSORS = {"aligned": 1, "masked": 1, "small": 10**9, "few": 1}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WIDTHS = {"aligned": 64, "masked": 61}  # of rows that no matrix product pads
# Of rows that random ops take whole, in two halves or in blocks.
LONG = (32, 1000, 1024, 8192, 16384, 50257)


def as_on(shapes: str, call: Callable, *arguments) -> None:
    """Calls as if a GPU had as many processors as these shapes are meant for."""
    with mock.patch.object(_common, "processors", lambda device, arch: PROCESSORS[shapes]):
        call(*arguments)


def tiles_with(*results: str, most: str) -> Iterator[tuple[str, str]]:
    """Shapes and what is computed of them: with smaller tiles only what takes most."""
    for shapes in TILES:
        yield from ((shapes, x) for x in (results if shapes in SIZES else [most]))


def products(arch: str) -> list[tuple[str, torch.dtype, str]]:
    """Every kind of product there: its name, the features' dtype, torch's precision setting."""
    precisions = {"ieee": "highest", "tf32x3": "high", "tf32": "medium"}
    kinds = [("bfloat16", torch.bfloat16, "highest"), ("float16", torch.float16, "highest")]
    for precision in precisions if arch.startswith("sm_") else ["ieee"]:
        kinds.append((f"float32 {precision}", torch.float32, precisions[precision]))
    return kinds


def sigmoid_loss(arch: str) -> Cases:
    """Every case that sigmoid_loss can launch: its name, and calls that must share one kernel."""
    scale, bias = torch.ones(()), torch.zeros(())

    def call(rows, cols, dtype, precision, result):
        torch.set_float32_matmul_precision(precision)
        image, text = torch.zeros(rows, 64, dtype=dtype), torch.zeros(cols, 64, dtype=dtype)
        by_ids = result == "ids"
        matches = (None, torch.arange(rows), torch.arange(cols)) if by_ids else (0, None, None)
        needed = result != "loss"
        kernels.sigmoid_loss.sigmoid_loss(image, text, scale, bias, *matches, *[needed] * 4)

    for name, dtype, precision in products(arch):
        for shapes, result in tiles_with("gradients", "ids", "loss", most="ids"):
            yield f"{name} {shapes} {result}", [
                functools.partial(as_on, shapes, call, *size, dtype, precision, result)
                for size in TILES[shapes]
            ]


def clip_loss(arch: str) -> Cases:
    """Both passes with every kind of product: matches by offset, and by ids with smoothing."""
    yield from cross_entropy(kernels.clip_loss.clip_loss, arch, "gradients", "smoothed")


def info_nce(arch: str) -> Cases:
    """The same, where only rows choose."""
    yield from cross_entropy(kernels.info_nce.info_nce, arch, "rows", "rows smoothed")


def cross_entropy(loss: Callable, arch: str, plain: str, smoothed: str) -> Cases:
    def call(rows, cols, dtype, precision, smoothed, few):
        torch.set_float32_matmul_precision(precision)
        x, y = torch.zeros(rows, 64, dtype=dtype), torch.zeros(cols, 64, dtype=dtype)
        matches = (None, torch.arange(rows), torch.arange(cols)) if smoothed else (0, None, None)
        with mock.patch.object(_ids, "FEW", few):
            loss(x, y, torch.ones(()), *matches, 0.1 if smoothed else 0.0, *[True] * 3)

    for name, dtype, precision in products(arch):
        for shapes, result in tiles_with(plain, smoothed, most=smoothed):
            few = 0 if shapes == "aligned" else 1000  # ids are sorted, or compared
            arguments = dtype, precision, result == smoothed, few
            yield f"{name} {shapes} {result}", [
                functools.partial(as_on, shapes, call, *size, *arguments) for size in TILES[shapes]
            ]


def hard_negatives(arch: str) -> Cases:
    """Every kind of product but float16, which is bfloat16's: matches by offset, and by ids."""
    scale, seed = torch.ones(()), torch.zeros((), dtype=torch.int64)

    def call(rows, cols, dtype, precision, by_ids):
        torch.set_float32_matmul_precision(precision)
        image, text = torch.zeros(rows, 64, dtype=dtype), torch.zeros(cols, 64, dtype=dtype)
        matches = (None, torch.arange(rows), torch.arange(cols)) if by_ids else (0, None, None)
        kernels.hard_negatives.hard_negatives(image, text, scale, *matches, seed, rows**5)

    for name, dtype, precision in products(arch):
        for shapes, sizes in TILES.items():
            by_ids = shapes != "aligned"
            if dtype != torch.float16:
                yield f"{name} {shapes} {'ids' if by_ids else 'offset'}", [
                    functools.partial(as_on, shapes, call, *size, dtype, precision, by_ids)
                    for size in sizes
                ]


def itc_loss(arch: str) -> Cases:
    """All launches with every kind of product, with a teacher and without one."""
    scale = torch.ones(())

    def call(rows, cols, dtype, precision, taught):
        torch.set_float32_matmul_precision(precision)
        query, keys = torch.zeros(rows, 64, dtype=dtype), torch.zeros(cols, 64, dtype=dtype)
        # Of an offset, features as they are; of ids, float32.
        matched = torch.zeros(rows, 64, dtype=dtype if taught else torch.float32)
        count = torch.ones(rows, dtype=torch.int64)
        rest = None, query if taught else None, scale, matched, count, True, True
        kernels.itc_loss.itc_loss(query, keys, scale, *rest)

    for name, dtype, precision in products(arch):
        for shapes, kind in tiles_with("alone", "taught", most="taught"):
            # A teacher's rows come to the student's.
            sizes = [(16, 96), (1, 300)] if shapes == "few" else TILES[shapes]
            yield f"{name} {kind} {shapes}", [
                functools.partial(as_on, shapes, call, *size, dtype, precision, kind == "taught")
                for size in sizes
            ]


# How codes are searched: filtered, or all distances computed, by one program for a row or several.
WAYS = {"": (0, 0), " all": (2**62, 2**62), " shared": (2**62, 0)}


def nearest_code(arch: str) -> Cases:
    """Every dtype, and what adds most to it: norms and lists."""
    def call(rows, codes, shapes, dtype, metric, k, way):
        width, codes = WIDTHS.get(shapes, 64), max(codes, k) * (40 if shapes == "few" else 1)
        x, codebook = (torch.zeros(1, n, width, dtype=dtype) for n in (rows, codes))
        mask = torch.ones(1, rows, dtype=torch.bool) if shapes == "masked" else None
        small, alone = WAYS[way]
        with mock.patch.multiple(  # and whose groups can be shared out are
            kernels.nearest_code, DEFAULT_SMALL=small, ALONE=alone, STEPS=1, SHARED=10**6
        ):
            kernels.nearest_code.nearest_code(x, codebook, metric, k, mask, None)

    cases = [(name, shapes, "l2", 1, "") for name in DTYPES for shapes in SIZES]
    cases += [("float32", "small", "l2", 1, ""), ("float32", "few", "l2", 1, "")]
    cases += [("float16", "few", "dot", 2, "")]
    for way in WAYS:
        cases += [("float16", "masked", "dot", 2, way), ("float32", "masked", "cosine", 16, way)]
        cases += [("float32", "aligned", "l2", 1, way)] if way else []
    for name, shapes, metric, k, way in cases:
        sizes = [(77, 96), (75, 161)] if (shapes, way) == ("masked", " shared") else TILES[shapes]
        top = f" top-{k}" if k > 1 else ""
        yield f"{name} {shapes} {metric}{top}{way}", [
            functools.partial(as_on, shapes, call, *size, shapes, DTYPES[name], metric, k, way)
            for size in sizes
        ]


def code_sums(arch: str) -> Cases:
    """Every dtype, with rows that are aligned and rows that are not."""
    def call(rows, codes, width, dtype):
        index = torch.zeros(1, rows, dtype=torch.int64)
        kernels.code_sums.code_sums(torch.zeros(1, rows, width, dtype=dtype), index, codes)

    for name, dtype in DTYPES.items():
        for shapes, sizes in SIZES.items():
            yield f"{name} {shapes}", [
                functools.partial(call, *size, WIDTHS[shapes], dtype) for size in sizes
            ]


def rows_of_zeros(cols: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Two batches that must run the same binary."""
    return [torch.zeros(rows, cols, dtype=dtype) for rows in (7, 256)]


def gumbel_softmax(arch: str) -> Cases:
    """Every way to take a row, forward and backward."""
    tau, seed = torch.ones(()), torch.zeros((), dtype=torch.int64)

    def call(x, hard):
        offset = len(x) ** 5  # of 32 bits, and of more
        module, rest = kernels.gumbel_softmax, (tau, seed, offset, 1, hard)
        module.gumbel_softmax(x, *rest)
        for need_tau in (False, True):
            module.gumbel_softmax_backward(x, x, *rest, need_tau)

    for name in ("bfloat16", "float32"):
        for cols in LONG:
            for kind, hard in (("soft", False), ("hard", True)):
                yield f"{name} {cols} {kind}", [
                    functools.partial(call, x, hard) for x in rows_of_zeros(cols, DTYPES[name])
                ]


def gumbel_argmax(arch: str) -> Cases:
    """Every way to take a row, for one index, for some and for many."""
    seed = torch.zeros((), dtype=torch.int64)

    def call(x, k):
        kernels.gumbel_argmax.gumbel_argmax(x, seed, len(x) ** 5, 1, k, True)

    cases = [(name, cols, 1) for name in ("bfloat16", "float32") for cols in LONG]
    some = (32, 4), (1000, 4), (1024, 4), (8192, 4), (8192, 100)
    cases += [("float32", cols, k) for cols, k in some]
    for name, cols, k in cases:
        yield f"{name} {cols} top-{k}", [
            functools.partial(call, x, k) for x in rows_of_zeros(cols, DTYPES[name])
        ]


def gaussian_sample(arch: str) -> Cases:
    """Short rows, aligned and not, and rows that programs share."""
    seed = torch.zeros((), dtype=torch.int64)

    def call(x):
        offset = len(x) ** 5
        kernels.gaussian_sample.gaussian_sample(x, x, seed, offset, -30.0, 20.0)
        d_kl = torch.ones(len(x))
        kernels.gaussian_sample.gaussian_sample_backward(x, d_kl, x, x, seed, offset, -30.0, 20.0)

    for name in ("bfloat16", "float32"):
        for cols in (8, 64, 1000, 16384):
            yield f"{name} {cols}", [
                functools.partial(call, x) for x in rows_of_zeros(cols, DTYPES[name])
            ]


# What only modules call, by the names of the kernels' files.


def _straight_through(arch: str) -> Cases:
    """Rows that are aligned, and others, with a mask."""
    from tilewise.kernels import _straight_through

    def call(x, keep):
        pull, keep = (None, None) if keep is None else (torch.ones(()), keep[: len(x)])
        _straight_through.rotate_back(x, x, x, pull, keep, 1e-6)

    keep = torch.ones(256, 1, dtype=torch.bool)
    for name in ("bfloat16", "float32"):
        for cols, mask in ((61, keep), (256, None)):
            yield f"{name} {cols}{' masked' if mask is not None else ''}", [
                functools.partial(call, x, mask) for x in rows_of_zeros(cols, DTYPES[name])
            ]


def _moving_averages(arch: str) -> Cases:
    """A step of learning, the sums of several processes, and codes that follow later."""
    from tilewise.kernels import _moving_averages

    def call(codes, dim, cosine, reduced, sums_too):
        embed, enabled = torch.zeros(1, codes, dim), torch.ones((), dtype=torch.bool)
        size = torch.zeros(1, codes)
        counts, sums = torch.zeros(1, codes, dtype=torch.int64), torch.zeros(1, codes, dim)
        if reduced:
            both = torch.zeros(1, codes, dim + 1)
            counts, sums = both[..., 0], both[..., 1:]
        counts, sums = (counts, sums) if sums_too else (None, None)
        rest = (enabled if reduced else None), 0.2, 1e-5, True, cosine, 1e-6
        _moving_averages.moving_averages(size, embed, embed.clone(), counts, sums, *rest)

    for name, dim, *rest in (
        ("plain", 64, False, False, True), ("cosine reduced", 61, True, True, True),
        ("later", 2048, False, False, False),
    ):
        yield f"{dim} {name}", [functools.partial(call, k, dim, *rest) for k in (100, 4096)]


def _enqueue(arch: str) -> Cases:
    """Queues of the features' dtype and of float32, with ids and without."""
    from tilewise.kernels import _enqueue

    def call(x, dtype, ids):
        queue = torch.zeros(300, x.shape[1], dtype=dtype)
        pointer = torch.zeros((), dtype=torch.int64)
        ids = torch.zeros(len(x), dtype=torch.int64) if ids else None
        places = torch.zeros(300, dtype=torch.int64)
        _enqueue.enqueue(queue, queue, places, pointer, x, x, ids, 0, len(x), -100)

    for name, cols, queue, ids in (
        ("bfloat16", 256, torch.float32, True), ("float16", 256, torch.float16, False),
        ("float32", 61, torch.float32, True),
    ):
        yield f"{name} {cols}{' ids' if ids else ''}", [
            functools.partial(call, x, queue, ids) for x in rows_of_zeros(cols, DTYPES[name])
        ]


def _matched(arch: str) -> Cases:
    """With a queue and without one, of rows that are aligned and that are not."""
    from tilewise.kernels import _matched

    def call(keys, queued):
        queue = torch.zeros(300, keys.shape[1], dtype=keys.dtype) if queued else None
        ids = torch.zeros(len(keys) + 300 * queued, dtype=torch.int64)
        _matched.matched_by_ids(keys, queue, ids[: len(keys)], ids)

    for name, cols, queued in (
        ("bfloat16", 256, True), ("float16", 61, False), ("float32", 61, True),
        ("float32", 1024, False),
    ):
        yield f"{name} {cols}{' queue' if queued else ''}", [
            functools.partial(call, x, queued) for x in rows_of_zeros(cols, DTYPES[name])
        ]
