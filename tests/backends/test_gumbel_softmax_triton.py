"""The Triton backend of gumbel_softmax, in the interpreter: what no other op promises."""

import contextlib
import math
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

import tilewise as tw
from tests.triton_tools.checker import checked
from tilewise.kernels import _gumbel_blocks, _philox, _rows, _short_rows
from tilewise.kernels import gumbel_softmax as kernels
from tilewise.reference import _philox as reference

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OFFSETS = [0, -2, 2**32 - 1, -(2**63), 2**62 + 5]
SEEDS = [0, 7, -1, 2**63 - 1, -(2**63)]


def scalar(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype)


def seed_of(value):
    return scalar(value, torch.int64)


def sample(x, tau=1.0, seed=3, row_offset=0, dim=-1, hard=False):
    return kernels.gumbel_softmax(x, scalar(tau), seed_of(seed), row_offset, dim % x.dim(), hard)


def gradients(dy, saved, tau=1.0, seed=3, row_offset=0, hard=False, need_tau=True):
    return kernels.gumbel_softmax_backward(
        dy, saved, scalar(tau), seed_of(seed), row_offset, saved.dim() - 1, hard, need_tau
    )


@pytest.fixture
def small_tiles(monkeypatch):
    """Rows of more than 64 columns (32, not aligned) in two halves, of twice that in blocks."""
    monkeypatch.setattr(_rows, "LONGEST", 64)
    monkeypatch.setattr(_rows, "BLOCK", 32)
    monkeypatch.setattr(kernels, "LONGEST_WITH_TAU", 32)


@triton.jit
def store_words(seed_ptr, out_ptr, row_offset, ROWS: tl.constexpr, COLS: tl.constexpr,
                OP: tl.constexpr):
    row = tl.arange(0, ROWS).to(tl.int64) + row_offset
    a, b, c, d = _philox.words(tl.load(seed_ptr), row, tl.arange(0, COLS // 4), OP)
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(out_ptr + at, _philox.in_columns(a, b, c, d).to(tl.int64))


@pytest.mark.parametrize("op", [reference.GUMBEL, reference.GAUSSIAN])
@pytest.mark.parametrize("row_offset", OFFSETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_words_are_the_reference_s(seed, row_offset, op):
    ours = torch.empty(8, 32, dtype=torch.int64)
    store_words[(1,)](seed_of(seed), ours, row_offset, ROWS=8, COLS=32, OP=op)
    assert torch.equal(ours, reference.words(seed_of(seed), 8, 32, row_offset, op))


@triton.jit
def store_gumbel(word_ptr, out_ptr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + at, _philox.gumbel(tl.load(word_ptr + at).to(tl.uint32)))


@pytest.mark.parametrize("words", ["all", "smallest", "largest", "powers", "where branches meet"])
def test_noise_is_exact_to_a_few_ulps(words):
    count = 2**17
    step = torch.arange(count)
    words = {
        "all": step * (2**32 // count) + 1234,
        "smallest": step,
        "largest": 2**32 - 1 - step,
        "powers": (2 ** (step / count * 32).double()).long().clamp(max=2**32 - 1),
        "where branches meet": 2**32 // 3 + (step - count // 2) * 64,
    }[words]
    ours = torch.empty(count)
    store_gumbel[(4,)](words, ours, N=count // 4)
    exact = -torch.log(-torch.log1p(-reference.uniform(words).double()))
    error = (ours.double() - exact).abs()
    assert ours.isfinite().all()
    assert (error <= 1.1e-7 * exact.abs() + 1.4e-7).all(), error.max()


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("tau", [0.2, 0.0])
@pytest.mark.parametrize("cols", [64, 65, 100])
def test_wide_rows_are_as_others(small_tiles, monkeypatch, cols, tau, hard):
    """In halves, in blocks and in one tile: the same noise, one-hot rows with the same bits."""
    x = torch.randn(4, cols)
    x[2, 5], x[3, :60] = INF, -INF
    dy = torch.randn(4, cols)
    y = sample(x, tau, row_offset=-2, hard=hard)
    saved = x if hard else y
    ours = (y, *gradients(dy, saved, tau, row_offset=-2, hard=hard))
    monkeypatch.undo()
    y = sample(x, tau, row_offset=-2, hard=hard)
    expected = (y, *gradients(dy, x if hard else y, tau, row_offset=-2, hard=hard))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=4e-6, equal_nan=True)
    if hard or tau == 0:
        assert torch.equal(ours[0].nan_to_num(2), expected[0].nan_to_num(2))
    assert y[2].isnan().all() and not y[[0, 1, 3]].isnan().any()


def test_a_row_has_the_same_bits_in_every_tile(monkeypatch):
    x = torch.randn(9, 24)
    expected = {hard: sample(x, hard=hard) for hard in (False, True)}
    monkeypatch.setattr(_rows, "INTERPRETER_ELEMENTS", 64)  # two rows in a tile
    for hard, y in expected.items():
        assert torch.equal(sample(x, hard=hard), y)
        assert torch.equal(sample(x[5:], row_offset=5, hard=hard), y[5:])


@pytest.mark.parametrize("stride, halves", [(96, True), (97, False), (112, True)])
def test_halves_are_of_aligned_rows(small_tiles, stride, halves):
    """Others take more registers, whatever the number of columns."""
    x = torch.randn(3, stride)[:, :96]
    outputs = {kernels.sample_halved_row: ["y_ptr"], _gumbel_blocks.sample_blocks: ["y_ptr"]}
    with checked(outputs) as launches:
        y = sample(x)
    assert [launch.kernel == "sample_halved_row" for launch in launches] == [halves]
    torch.testing.assert_close(y, sample(x.contiguous()), rtol=2e-6, atol=4e-6)


def test_long_strides_are_no_multiples_of_a_unit():
    """Kernels multiply by it in 32 bits, in which what is divided by it fits up to 2^35."""
    for stride, unit in ((2**31 - 16, 16), (2**31, 1), (2**35 - 16, 1)):
        assert _short_rows.choose_tile(2, 128, [128, stride], "sm_90").unit == unit
    assert _short_rows.choose_tile(2, 8192, [2**31], "sm_90") is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("rows, cols", [(1, 1), (9, 16), (2, 48), (1, 80), (1, 130)])
def test_memory_accesses(small_tiles, rows, cols, hard, dtype):
    wide = torch.randn(rows, 2 * cols + 1).to(dtype)
    x, dy = wide[:, ::2][:, :cols], torch.randn(1, cols).to(dtype).expand(rows, -1)
    forward = {kernels.sample_rows: ["y_ptr"]}
    backward = {kernels.differentiate_rows: ["out_ptr", "part_ptr"]}
    stride = _rows.as_rows(x, 1).stride(0)
    if _short_rows.choose_tile(rows, cols, [stride], "interpreter") is None:
        forward = {
            _gumbel_blocks.measure_blocks: ["top_ptr", "index_ptr", "total_ptr"],
            _gumbel_blocks.sample_blocks: ["y_ptr"],
        }
        half = _rows.longest(cols if stride % 16 == 0 else 1)
        if not hard and cols <= 2 * half:
            forward = {kernels.sample_halved_row: ["y_ptr"]}
    if cols > kernels.LONGEST_WITH_TAU:
        backward = {
            _gumbel_blocks.measure_gradient_blocks: ["top_ptr", "total_ptr", "inner_ptr"],
            _gumbel_blocks.differentiate_blocks: ["out_ptr", "part_ptr"],
        }
    with checked(forward) as launches:
        y = sample(x, hard=hard)
        sample(x, 0.0, hard=hard)
    assert len(launches) == 2 * len(forward)
    with checked(backward) as launches:
        gradients(dy, x if hard else y, hard=hard)
    assert len(launches) == len(backward)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_any_width_are_taken_whole(dtype, hard):
    """Each number of pieces, aligned and not: rows of a tile do not mix, nor does their noise."""
    outputs = {kernels.sample_rows: ["y_ptr"], kernels.differentiate_rows: ["out_ptr", "part_ptr"]}
    for cols in (1, 4, 5, 17, 33, 64, 65, 128, 300, 640, 1030, 2064, 4112):
        x, dy = (torch.randn(5, cols).to(dtype) for _ in range(2))
        with checked(outputs) as launches:
            y = sample(x, 0.5, row_offset=-2, hard=hard)
            ours, d_tau = gradients(dy, x if hard else y, 0.5, row_offset=-2, hard=hard)
        assert len(launches) == 1 + (cols <= kernels.LONGEST_WITH_TAU)
        z = (x.double() + reference.gumbel(seed_of(3), 5, cols, -2)).mul(2)
        soft = z.softmax(1)
        expected = torch.eye(cols)[z.argmax(1)] if hard else soft
        rounding = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), expected.double(), rtol=rounding, atol=1e-6)
        soft = soft if hard else y.double()
        inner = soft * (dy - (soft * dy).sum(1, keepdim=True)) * 2
        torch.testing.assert_close(ours.double(), inner, rtol=rounding, atol=4 * rounding)


def test_a_row_has_the_same_bits_beside_any_others():
    """Whatever piece of a tile its first one is."""
    for cols in (20, 300):
        x = torch.randn(60, cols)
        y = sample(x)
        for first in (1, 7, 50):
            assert torch.equal(sample(x[first:], row_offset=first), y[first:])


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_few_wide_rows_have_many_programs(hard):
    """Row after row, one program a row would leave most of a GPU idle."""
    x = torch.zeros(2, 150_000)
    with programs() as grids:
        y = sample(x, hard=hard)
        gradients(x, x if hard else y, hard=hard)
    assert len(grids) == 4 and min(grids) >= 2 * 150_000 // _rows.BLOCK


@contextlib.contextmanager
def programs():
    """Yields a list of how many programs each launch inside the block has; none runs."""
    grids = []

    def launch(self, *args, grid, warmup, **kwargs):
        grids.append(math.prod(grid))

    with mock.patch.object(InterpretedFunction, "run", launch):
        yield grids


@pytest.mark.parametrize("cols", [20, 50, 70])
def test_rows_without_a_softmax_are_nan(small_tiles, cols):
    x = torch.randn(5, cols)
    x[0], x[1, -1], x[2, 3] = -INF, NAN, INF
    x[3, 1:] = -INF
    for hard in (False, True):
        for tau in (0.0, 1e-40, INF):
            y = sample(x, tau, hard=hard)
            assert y[:3].isnan().all() and y[4].isfinite().all()
            assert y[3, 0] == 1 and not y[3, 1:].any()
            d_x, d_tau = gradients(torch.ones_like(x)[3:], (x if hard else y)[3:], tau, hard=hard)
            assert not d_x[0].any() and d_x.isfinite().all() and d_tau.isfinite()


@pytest.mark.parametrize("cols", [64, 128, 144])
def test_first_of_equal_logits_wins(small_tiles, cols):
    """Near 2^30 float32 has no room for noise."""
    x = torch.full((3, cols), 2.0**30)
    x[1, :17], x[2, :-1] = -INF, 0
    for y in (sample(x, hard=True), sample(x, 0.0)):
        assert y.argmax(1).tolist() == [0, 17, cols - 1] and torch.equal(y.sum(1), torch.ones(3))


def test_tau_needs_no_host():
    """Its gradient is left out where nobody asks for it, and a tensor tau is read by the kernel."""
    x, dy = torch.randn(2, 4, 9)
    d_x, d_tau = gradients(dy, x, hard=True, need_tau=False)
    assert d_tau.shape == (0,) and torch.equal(d_x, gradients(dy, x, hard=True)[0])


def test_public_function_has_the_kernel_s_result():
    x = torch.randn(3, 4, 5)
    with tw.backend("triton"):
        y = tw.gumbel_softmax(x, 0.7, dim=1, seed=-9, row_offset=2**40)
    assert torch.equal(y, sample(x, 0.7, -9, 2**40, dim=1)) and y.is_contiguous()
