"""The tools that Triton kernels are tested with: they must fail where a kernel is wrong."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.common import fresh
from tests.triton_tools import figures, gate, interpreter, product_loops
from tests.triton_tools.checker import checked


@triton.jit
def scale_rows(
    x_ptr, y_ptr, sums_ptr, rows, cols, stride, BUG: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """y = 2 * x and row sums; ROWS rows per program, and one planted bug."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDTH)
    keep = (row < rows)[:, None] & (col < cols)[None, :]
    offset = row[:, None] * stride + col[None, :]
    load_mask, store_mask, store_offset = keep, keep, offset
    if BUG == "load beyond the rows":
        load_mask = (row < rows + 1)[:, None] & (col < cols)[None, :]
    if BUG == "load beyond the columns":
        load_mask = (row < rows)[:, None] & (col < cols + 1)[None, :]
    if BUG == "store beyond the rows":
        store_mask = (row < rows + 1)[:, None] & (col < cols)[None, :]
    if BUG == "rows overlap":
        store_offset = (row[:, None] - (tl.program_id(0) > 0)) * stride + col[None, :]
    if BUG == "last column missing":
        store_mask = keep & (col < cols - 1)[None, :]
    if BUG == "every lane stores the first column":
        store_offset = row[:, None] * stride + col[None, :] * 0
    x = tl.load(x_ptr + offset, mask=load_mask, other=0.0)
    tl.store(y_ptr + store_offset, 2 * x, mask=store_mask)
    if BUG == "stores twice":
        tl.store(y_ptr + offset, x, mask=keep)
    if BUG == "stores to the input":
        tl.store(x_ptr + offset, x, mask=keep)
    if BUG == "reads a neighbour's rows":
        x = tl.load(y_ptr + offset - tl.program_id(0) * stride, mask=keep, other=0.0)
    if BUG == "reads before writing":
        x = tl.load(sums_ptr + row, mask=row < rows, other=0.0)[:, None] + x
    if BUG == "adds atomically":
        tl.atomic_add(sums_ptr + row, tl.sum(x, 1), mask=row < rows)
    else:
        tl.store(sums_ptr + row, tl.sum(x, 1), mask=row < rows)


def launch_scale_rows(bug, rows=7, cols=6):
    x = torch.arange(float(rows * (cols + 2))).view(rows, cols + 2)[:, :cols]
    y, sums = torch.empty(rows, cols + 2)[:, :cols], torch.empty(rows)
    grid = (triton.cdiv(rows, 4),)
    scale_rows[grid](x, y, sums, rows, cols, x.stride(0), BUG=bug, ROWS=4, WIDTH=8)
    return x, y, sums


def test_checker_passes_a_correct_kernel():
    with checked({scale_rows: ["y_ptr", "sums_ptr"]}) as launches:
        x, y, sums = launch_scale_rows("")
    assert torch.equal(y, 2 * x) and torch.allclose(sums, x.sum(1)) and len(launches) == 1


@pytest.mark.parametrize("bug, message", [
    ("load beyond the rows", r"program \(1, 0, 0\) loads out of bounds"),
    ("load beyond the columns", "loads out of bounds of the view: x_ptr, element 6"),
    ("store beyond the rows", "stores out of bounds"),
    ("rows overlap", "races: two programs store to y_ptr, element 24"),
    ("last column missing", "no program stores to y_ptr, 7 elements from 5"),
    ("every lane stores the first column", "stores twice to y_ptr in one instruction"),
    ("stores twice", "stores twice to y_ptr, element 0"),
    ("stores to the input", "stores to x_ptr, which is no output"),
    ("reads a neighbour's rows", "races: it loads what another program stores: y_ptr, element 24"),
    ("reads before writing", "loads, before any store, sums_ptr, element 0"),
    ("adds atomically", "atomic"),
])
def test_checker_finds(bug, message):
    with pytest.raises(Exception, match=message), checked({scale_rows: ["y_ptr", "sums_ptr"]}):
        launch_scale_rows(bug)


@triton.jit
def product(a_ptr, b_ptr, c_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    c = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=PRECISION)
    tl.store(c_ptr + at, c.to(c_ptr.dtype.element_ty))


def interpreted_product(a, b, precision="ieee", dtype=torch.float32):
    c = torch.empty(a.shape, dtype=dtype)
    product[(1,)](a, b, c, N=len(a), PRECISION=precision)
    return c


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_products_of_values(dtype):
    a, b = torch.randn(2, 16, 16).to(dtype)
    torch.testing.assert_close(interpreted_product(a, b), a.float() @ b.float())


@triton.jit
def convert(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_round_to_nearest_even(dtype):
    half_ulp = torch.finfo(dtype).eps / 2
    special = [0.0, -0.0, 1 + half_ulp, 1 + 3 * half_ulp, -1 - half_ulp, 1e-40, float("-inf"),
               float("nan")]
    x = torch.cat([torch.tensor(special), torch.randn(56)])
    y = torch.empty(64, dtype=dtype)
    convert[(1,)](x, y, N=64)
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bfloat16_is_read_as_it_is(dtype):
    special = [1e-39, -1e-39, 9.2e-41, 1.2e-38, 0.0, -0.0, float("inf"), float("nan")]
    x = torch.cat([torch.tensor(special), torch.randn(56)]).bfloat16()
    y = torch.empty(64, dtype=dtype)
    convert[(1,)](x, y, N=64)
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert y[0] != 0 and torch.equal(y.signbit(), x.signbit())


@triton.jit
def fused(x_ptr, y_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(y_ptr + tl.arange(0, N), tl.fma(x, x, -(x * x)))


def test_fused_products_round_once():
    x, y = torch.tensor([1 + 2.0**-12, 3.0, 0.1, -7e10]), torch.empty(4)
    fused[(1,)](x, y, N=4)
    assert y[0] == 2.0**-24 and torch.equal(y, (x.double() ** 2 - (x * x).double()).float())


def test_float32_precisions_differ_as_they_should():
    a, b = torch.randn(2, 32, 32)
    exact = a.double() @ b.double()
    error = {p: (interpreted_product(a, b, p) - exact).abs().max().item()
             for p in ("ieee", "tf32x3", "tf32")}
    assert error["ieee"] < 1e-5 and error["tf32x3"] < 1e-5 and 1e-3 < error["tf32"] < 3e-2


def test_tf32_keeps_ten_bits():
    x = np.array([1 + 2.0**-10, 1 + 2.0**-11, 1 + 2.0**-12, -3.5, np.inf, np.nan], np.float32)
    expected = [1 + 2.0**-10, 1 + 2.0**-10, 1.0, -3.5, np.inf, np.nan]
    np.testing.assert_array_equal(interpreter.round_to_tf32(x), np.float32(expected))


def run_without_interpreter(code: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *code], env=environment, cwd=gate.TABLE.parents[1], timeout=280,
        capture_output=True, text=True,
    )


@pytest.mark.slow
def test_normal_variates_take_no_approximate_root():
    """tl.sqrt may become one, and variates have the same bits on every GPU."""
    result = run_without_interpreter(["-c", """
from tests.triton_tools import cases, offline
with offline.launching_for("sm_90") as launched:
    name, calls = next(cases.gaussian_sample("sm_90"))
    calls[0]()
assert [launch.name for launch in launched] == ["sample_tile", "differentiate_tile"], launched
for launch in launched:
    assert "sqrt.rn.f32" in launch.binary.asm["ptx"]
    assert "sqrt.approx" not in launch.binary.asm["ptx"]
"""])
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("lanes, stride, clocks", [
    (16, 32, 16), (16, 16, 16), (2, 32, 2), (1, 32, 1), (16, 1, 2), (32, 1, 4), (8, 8, 8),
])
def test_clocks_of_shared_memory(lanes, stride, clocks):
    """Of four words a thread, four rows apart: words of one bank wait for one another."""
    assert product_loops.Shared(lanes, 4, stride).clocks(4) == clocks


def test_the_loop_of_a_product_is_found():
    add = "        /*0010*/                   FFMA R0, R1, R2, R0 ;\n"
    turn = "        /*0020*/               @P0 BRA `(.L_x_{}) ;\n"
    code = f"\n.L_x_1:\n{add}{turn.format(1)}\n.L_x_2:\n{add * 3}{turn.format(2)}{turn.format(3)}"
    loop = product_loops.loop_of(f"{code}\n.L_x_3:\n{add * 5}")
    assert product_loops.INSTRUCTION.findall(loop) == ["FFMA"] * 3 + ["BRA"]


def test_loops_are_of_products_with_several_tiles():
    result = fresh.run("""
from tests.triton_tools import product_loops
found = list(product_loops.launches("sm_90", compiling=False))
assert len(found) >= len(product_loops.CASES) + 2 * len(product_loops.TILES)
assert all(launch.products or "transposed" in name for name, launch in found)
for kernel in ("sigmoid_tile ", "transposed "):
    of_tiles = [launch.made_from for name, launch in found if name.startswith(kernel)]
    assert len(set(of_tiles)) == len(product_loops.TILES), of_tiles
""", TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stdout + result.stderr


def test_gate():
    """Kernels obey the rules, with the figures of the table: those out of date, and some others."""
    gate_run = ["-m", "tests.triton_tools.gate", "--changed", "--most", "8", "--sample", "4"]
    result = run_without_interpreter(gate_run)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


def test_gate_finds_spills():
    result = run_without_interpreter(["-c", """
from tests.triton_tools import figures, gate
from tilewise.kernels import sigmoid_loss
big = sigmoid_loss.TILES["sm_90", "half"]._replace(cols=256, pieces=1, tma=False)
sigmoid_loss.TILES["sm_90", "half"] = big
key = "sigmoid_tile", "sm_90", "bfloat16 masked gradients"
task = "sigmoid_loss", "sm_90"
recipes = {gate.key_of(row): row for row in gate.rows_of(*task, None)}
assert gate.stale(recipes, gate.read_table()[1]), "a tile is part of what a row is made from"
print(figures.broken_rules(*gate.compiled([key], recipes, {key: task})))
"""])
    assert "bytes of stack" in result.stdout and "two are wanted" in result.stdout, result.stderr


def test_gate_rules():
    fine = {"arch": "sm_86", "case": "bfloat16", "products": True, "binaries": 1,
            "registers": 128, "stack": 0, "shared": 99 * 1024, "programs": 2, "matrix": 8}
    assert not figures.broken_rules(fine)
    bad = {"binaries": 2, "stack": 8, "shared": 99 * 1024 + 1, "programs": 1, "matrix": 0}
    for name, value in bad.items():
        assert len(figures.broken_rules({**fine, name: value})) == 1, name


def test_gate_sees_every_change():
    _, table = gate.read_table()
    recipes = {key: dict(row) for key, row in table.items()}
    rows = [dict(row) for row in table.values()]
    assert not gate.differences(rows, table) and not gate.stale(recipes, table)
    rows[0]["registers"] += 1
    assert len(gate.differences(rows, table)) == 1
    changed = list(recipes)[3]
    recipes[changed]["made_from"] = "another"
    recipes["new", "sm_90", "case"] = {"made_from": "new"}
    assert gate.stale(recipes, table) == [changed, ("new", "sm_90", "case")]
