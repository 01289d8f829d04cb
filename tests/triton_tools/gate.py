"""Static gate: what each shipped Triton kernel compiles to, on every architecture, without a GPU.

`python -m tests.triton_tools.gate` compiles all, checks the rules and compares with the table
kernels/static_gate.csv. `--write` renews the table: read its diff. `--quick` compiles the cases
that are most likely to break a rule.
"""

import argparse
import csv
import functools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import triton

from tilewise.kernels import (
    clip_loss,
    code_sums,
    gaussian_sample,
    gumbel_argmax,
    gumbel_softmax,
    hard_negatives,
    itc_loss,
    nearest_code,
    sigmoid_loss,
)

TABLE = Path(__file__).parents[2] / "kernels" / "static_gate.csv"
NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx90a", "gfx942")
KEY = ("kernel", "arch", "case")
FIGURES = ("binaries", "registers", "stack", "shared", "programs", "matrix", "instructions")

# Bytes of shared memory: of one program, of one SM.
SHARED = {
    "sm_80": (163, 164), "sm_86": (99, 100), "sm_89": (99, 100), "sm_90": (227, 228),
    "sm_100": (227, 228), "sm_120": (99, 100), "gfx90a": (64, 64), "gfx942": (64, 64),
}
# Two batch sizes of a kind must run the same binary.
SIZES = {"aligned": [(128, 256), (256, 128)], "masked": [(129, 1), (7, 96)]}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WIDTHS = {"aligned": 64, "masked": 61}  # of rows that no matrix product pads
# Of rows that random ops take whole, in two halves or in blocks.
LONG = (32, 1000, 8192, 16384, 50257)
QUICK = (
    "bfloat16 masked gradients", "tf32x3 masked gradients", "bfloat16 masked smoothed",
    "tf32x3 masked smoothed", "bfloat16 masked ids", "masked cosine top-16", "float32 masked",
    "float32 16384 soft", "float32 8192 top-4", "float32 1000",
)
WITH_PRODUCTS = (
    "sigmoid_tile", "clip_sums_tile", "clip_gradient_tile", "filter_tile", "itc_sums_tile",
    "itc_weights_tile", "negatives_tile",
)
MATRIX = re.compile(r"HGMMA|HMMA|UTC\w*MMA|v_mfma")
OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)


def products(arch: str) -> list[tuple[str, torch.dtype, str]]:
    """Every kind of product there: its name, the features' dtype, torch's precision setting."""
    precisions = {"ieee": "highest", "tf32x3": "high", "tf32": "medium"}
    kinds = [("bfloat16", torch.bfloat16, "highest"), ("float16", torch.float16, "highest")]
    for precision in precisions if arch in NVIDIA else ["ieee"]:
        kinds.append((f"float32 {precision}", torch.float32, precisions[precision]))
    return kinds


def sigmoid_loss_launches(arch: str) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """Every case that sigmoid_loss can launch: its name, and calls that must share one kernel."""
    scale, bias = torch.ones(()), torch.zeros(())

    def call(rows, cols, dtype, precision, result):
        torch.set_float32_matmul_precision(precision)
        image, text = torch.zeros(rows, 64, dtype=dtype), torch.zeros(cols, 64, dtype=dtype)
        by_ids = result == "ids"
        matches = (None, torch.arange(rows), torch.arange(cols)) if by_ids else (0, None, None)
        needed = result != "loss"
        sigmoid_loss.sigmoid_loss(image, text, scale, bias, *matches, *[needed] * 4)

    for name, dtype, precision in products(arch):
        for shapes, sizes in SIZES.items():
            for result in ("gradients", "ids", "loss"):
                yield f"{name} {shapes} {result}", [
                    functools.partial(call, *size, dtype, precision, result) for size in sizes
                ]


def clip_loss_launches(arch: str) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """Both passes with every kind of product: matches by offset, and by ids with smoothing."""
    def call(rows, cols, dtype, precision, smoothed):
        torch.set_float32_matmul_precision(precision)
        image, text = torch.zeros(rows, 64, dtype=dtype), torch.zeros(cols, 64, dtype=dtype)
        matches = (None, torch.arange(rows), torch.arange(cols)) if smoothed else (0, None, None)
        clip_loss.clip_loss(
            image, text, torch.ones(()), *matches, 0.1 if smoothed else 0.0, *[True] * 3
        )

    for name, dtype, precision in products(arch):
        for shapes, sizes in SIZES.items():
            for result in ("gradients", "smoothed"):
                arguments = dtype, precision, result == "smoothed"
                yield f"{name} {shapes} {result}", [
                    functools.partial(call, *size, *arguments) for size in sizes
                ]


def hard_negatives_launches(arch: str) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """Every kind of product but float16, which is bfloat16's: matches by offset, and by ids."""
    scale, seed = torch.ones(()), torch.zeros((), dtype=torch.int64)

    def call(rows, cols, dtype, precision, by_ids):
        torch.set_float32_matmul_precision(precision)
        image, text = torch.zeros(rows, 64, dtype=dtype), torch.zeros(cols, 64, dtype=dtype)
        matches = (None, torch.arange(rows), torch.arange(cols)) if by_ids else (0, None, None)
        hard_negatives.hard_negatives(image, text, scale, *matches, seed, rows**5)

    for name, dtype, precision in products(arch):
        for shapes, matches in (("aligned", "offset"), ("masked", "ids")):
            if dtype != torch.float16:
                yield f"{name} {shapes} {matches}", [
                    functools.partial(call, *size, dtype, precision, matches == "ids")
                    for size in SIZES[shapes]
                ]


def itc_loss_launches(arch: str) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """Both passes with every kind of product; where weights are split, that pass alone as well."""
    scale = torch.ones(())

    def call(rows, cols, dtype, precision, split):
        torch.set_float32_matmul_precision(precision)
        query, keys = torch.zeros(rows, 64, dtype=dtype), torch.zeros(cols, 64, dtype=dtype)
        if split:
            itc = itc_loss.ItcLoss(query, keys, scale, None, query)
            itc.means(itc.teacher, torch.zeros(2, rows), itc.splits)
        else:
            matched, count = torch.zeros(rows, 64), torch.ones(rows, dtype=torch.int64)
            itc_loss.itc_loss(query, keys, scale, None, None, scale, matched, count, True, True)

    for name, dtype, precision in products(arch):
        for shapes, sizes in SIZES.items():
            for split in [False] if dtype == torch.float32 else [False, True]:
                yield f"{name} {'split ' if split else ''}{shapes} gradients", [
                    functools.partial(call, *size, dtype, precision, split) for size in sizes
                ]


def nearest_code_launches(arch: str) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """Every dtype, and what adds most to it: norms and lists."""
    def call(rows, codes, width, dtype, metric, k, masked):
        x, codebook = (torch.zeros(1, n, width, dtype=dtype) for n in (rows, max(codes, k)))
        mask = torch.ones(1, rows, dtype=torch.bool) if masked else None
        with mock.patch.object(nearest_code, "DEFAULT_SMALL", 0):
            nearest_code.nearest_code(x, codebook, metric, k, mask, None)

    cases = [(name, shapes, "l2", 1) for name in DTYPES for shapes in SIZES]
    cases += [("float16", "masked", "dot", 2), ("float32", "masked", "cosine", 16)]
    for name, shapes, metric, k in cases:
        arguments = WIDTHS[shapes], DTYPES[name], metric, k, shapes == "masked"
        yield f"{name} {shapes} {metric}" + (f" top-{k}" if k > 1 else ""), [
            functools.partial(call, *size, *arguments) for size in SIZES[shapes]
        ]


def code_sums_launches(arch: str) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """Every dtype, with rows that are aligned and rows that are not."""
    def call(rows, codes, width, dtype):
        index = torch.zeros(1, rows, dtype=torch.int64)
        code_sums.code_sums(torch.zeros(1, rows, width, dtype=dtype), index, codes)

    for name, dtype in DTYPES.items():
        for shapes, sizes in SIZES.items():
            yield f"{name} {shapes}", [
                functools.partial(call, *size, WIDTHS[shapes], dtype) for size in sizes
            ]


def rows_of_zeros(cols: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Two batches that must run the same binary."""
    return [torch.zeros(rows, cols, dtype=dtype) for rows in (7, 256)]


def gumbel_softmax_launches(arch: str) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """Every way to take a row, forward and backward."""
    tau, seed = torch.ones(()), torch.zeros((), dtype=torch.int64)

    def call(x, hard):
        offset = len(x) ** 5  # of 32 bits, and of more
        gumbel_softmax.gumbel_softmax(x, tau, seed, offset, 1, hard)
        for need_tau in (False, True):
            gumbel_softmax.gumbel_softmax_backward(x, x, tau, seed, offset, 1, hard, need_tau)

    for name in ("bfloat16", "float32"):
        for cols in LONG:
            for kind, hard in (("soft", False), ("hard", True)):
                yield f"{name} {cols} {kind}", [
                    functools.partial(call, x, hard) for x in rows_of_zeros(cols, DTYPES[name])
                ]


def gumbel_argmax_launches(arch: str) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """Every way to take a row, for one index, for some and for many."""
    seed = torch.zeros((), dtype=torch.int64)

    def call(x, k):
        gumbel_argmax.gumbel_argmax(x, seed, len(x) ** 5, 1, k, True)

    cases = [(name, cols, 1) for name in ("bfloat16", "float32") for cols in LONG]
    cases += [("float32", cols, k) for cols, k in ((32, 4), (1000, 4), (8192, 4), (8192, 100))]
    for name, cols, k in cases:
        yield f"{name} {cols} top-{k}", [
            functools.partial(call, x, k) for x in rows_of_zeros(cols, DTYPES[name])
        ]


def gaussian_sample_launches(arch: str) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """Short rows, aligned and not, and rows that programs share."""
    seed = torch.zeros((), dtype=torch.int64)

    def call(x):
        offset = len(x) ** 5
        gaussian_sample.gaussian_sample(x, x, seed, offset, -30.0, 20.0)
        d_kl = torch.ones(len(x))
        gaussian_sample.gaussian_sample_backward(x, d_kl, x, x, seed, offset, -30.0, 20.0)

    for name in ("bfloat16", "float32"):
        for cols in (32, 1000, 16384):
            yield f"{name} {cols}", [
                functools.partial(call, x) for x in rows_of_zeros(cols, DTYPES[name])
            ]


OPS = (
    sigmoid_loss_launches, clip_loss_launches, hard_negatives_launches, itc_loss_launches,
    nearest_code_launches, code_sums_launches, gumbel_softmax_launches, gumbel_argmax_launches,
    gaussian_sample_launches,
)


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def nvidia_figures(kernel) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([tool("cuobjdump"), "-res-usage", file.name], text=True)
        code = subprocess.check_output(
            [tool("nvdisasm"), "-c", file.name], text=True, stderr=subprocess.DEVNULL
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    opcodes = OPCODE.findall(code)
    threads = kernel.metadata.num_warps * 32
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    by_shared = SHARED[f"sm_{kernel.metadata.target.arch}"][1] * 1024 // (
        kernel.metadata.shared + 1024
    )
    return {
        "registers": registers, "stack": stack, "shared": kernel.metadata.shared,
        "programs": min(by_registers, by_shared, 2048 // threads),
        "matrix": sum(bool(MATRIX.match(opcode)) for opcode in opcodes),
        "instructions": len(opcodes),
    }


def amd_figures(kernel) -> dict[str, int]:
    code = kernel.asm["amdgcn"]

    def number(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])

    registers, waves = number("vgpr_count"), kernel.metadata.num_warps
    by_registers = 4 * min(512 // (-(-registers // 8) * 8), 8) // waves
    by_shared = 64 * 1024 // max(kernel.metadata.shared, 1)
    return {
        "registers": registers,
        "stack": number("private_segment_fixed_size") + 4 * number("vgpr_spill_count"),
        "shared": kernel.metadata.shared, "programs": min(by_registers, by_shared),
        "matrix": len(MATRIX.findall(code)),
        "instructions": len(re.findall(r"^\t[vs]_|^\t(?:ds|global|buffer)_", code, re.M)),
    }


def rows_of(op: Callable, arch: str, quick: bool) -> list[dict]:
    """One row for each kernel that a case of the op launches on `arch`."""
    from tests.triton_tools.offline import compiling_for

    torch.set_num_threads(1)
    rows = []
    with compiling_for(arch) as launched:
        for case, calls in op(arch):
            if quick and not case.endswith(QUICK):
                continue
            launched.clear()
            for call in calls:
                call()
            count = len(launched) // len(calls)  # calls launch the same kernels, in one order
            names = [kernel.metadata.name for kernel in launched[:count]]
            for i, kernel in enumerate(launched[:count]):
                before = names[:i].count(names[i])
                figures = nvidia_figures(kernel) if arch in NVIDIA else amd_figures(kernel)
                rows.append({
                    "kernel": names[i] + (f" {before + 1}" if before else ""),
                    "arch": arch, "case": case,
                    "binaries": len(set(map(id, launched[i::count]))), **figures,
                })
    return rows


def broken_rules(row: dict) -> list[str]:
    """What is wrong with a row; nothing, for a kernel that may ship."""
    broken = []
    if row["binaries"] > 1:
        broken.append("another batch size compiles again")
    if row["stack"]:
        broken.append(f"{row['stack']} bytes of stack")
    if row["shared"] > SHARED[row["arch"]][0] * 1024:
        broken.append(f"{row['shared']} bytes of shared memory do not fit")
    if row["programs"] < 2:
        broken.append(f"{row['programs']} program per SM, two are wanted")
    plain = row["arch"] in NVIDIA and "ieee" in row["case"]  # no float32 matrix units there
    plain |= row.get("kernel", WITH_PRODUCTS[0]) not in WITH_PRODUCTS
    if not row["matrix"] and not plain:
        broken.append("no matrix instructions")
    return broken


def measure(quick: bool) -> list[dict]:
    """All rows; two processes at a time."""
    tasks = [(op, arch, quick) for op in OPS for arch in NVIDIA + AMD]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return [row for rows in pool.map(rows_of, *zip(*tasks, strict=True)) for row in rows]


def read_table() -> tuple[str, dict[tuple, dict]]:
    """The Triton version that the table was made with, and its rows by key."""
    with open(TABLE, newline="") as file:
        version = file.readline().removeprefix("# triton ").strip()
        rows = [
            {k: v if k in KEY else int(v) for k, v in row.items()} for row in csv.DictReader(file)
        ]
    return version, {tuple(row[k] for k in KEY): row for row in rows}


def write_table(rows: list[dict]) -> None:
    with open(TABLE, "w", newline="") as file:
        file.write(f"# triton {triton.__version__}\n")
        writer = csv.DictWriter(file, KEY + FIGURES, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def differences(rows: list[dict], complete: bool) -> list[str]:
    """How the rows differ from the table. Another Triton gives other figures: rules only."""
    version, table = read_table()
    if version != triton.__version__:
        return []
    found = {tuple(row[k] for k in KEY): row for row in rows}
    lines = [f"{key}: not in the table" for key in found.keys() - table.keys()]
    if complete:
        lines += [f"{key}: in the table only" for key in table.keys() - found.keys()]
    for key in found.keys() & table.keys():
        lines += [
            f"{key}: {name} {table[key][name]} in the table, now {found[key][name]}"
            for name in FIGURES if table[key][name] != found[key][name]
        ]
    return sorted(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew the table")
    parser.add_argument("--quick", action="store_true", help="leave out the easier cases")
    arguments = parser.parse_args()
    rows = measure(arguments.quick)
    problems = [
        f"{row['kernel']} {row['arch']} {row['case']}: {rule}"
        for row in rows for rule in broken_rules(row)
    ]
    if arguments.write:
        write_table(rows)
    else:
        problems += differences(rows, complete=not arguments.quick)
    print(*problems, f"{len(rows)} kernels, {len(problems)} problems", sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
