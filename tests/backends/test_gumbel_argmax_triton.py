"""The Triton backend of gumbel_argmax, in the interpreter: what no other op promises."""


import pytest
import torch

from tests.backends.test_gumbel_softmax_triton import programs
from tests.triton_tools.checker import checked
from tilewise.kernels import _gumbel_blocks, _rows
from tilewise.kernels import gumbel_argmax as kernels
from tilewise.kernels import gumbel_softmax as softmax_kernels

INF, NAN = float("inf"), float("nan")
SEED = torch.tensor(-5)


def sample(x, k=1, row_offset=0, log_prob=False):
    return kernels.gumbel_argmax(x, SEED, row_offset, x.dim() - 1, k, log_prob)


def one_hot(x, row_offset=0):
    tau = torch.ones(())
    return softmax_kernels.gumbel_softmax(x, tau, SEED, row_offset, x.dim() - 1, True)


@pytest.fixture
def small_tiles(monkeypatch):
    """Rows of more than 64 columns are walked in blocks of 32."""
    monkeypatch.setattr(_rows, "LONGEST", 64)
    monkeypatch.setattr(_rows, "BLOCK", 32)


def hard_rows(cols):
    """Masks, NaN, both infinities, ties."""
    x = torch.randn(7, cols)
    x[1, : cols - 1], x[2] = -INF, -INF
    x[3, cols // 2] = NAN
    x[4, cols // 3 :] = INF
    x[5] = 2.0**30
    x[6], x[6, 1] = NAN, -INF
    return x


@pytest.mark.parametrize("cols", [9, 64, 65, 128])
def test_many_indices_begin_with_few(small_tiles, monkeypatch, cols):
    """One after another among registers, in blocks, and by sorting: the same order."""
    x = hard_rows(cols)
    one, _ = sample(x, 1, row_offset=2**33)
    some, _ = sample(x, 5, row_offset=2**33)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 8 * cols)  # two rows at a time
    monkeypatch.setattr(kernels, "SELECTED", 1)
    every, _ = sample(x, cols, row_offset=2**33)
    assert torch.equal(every[:, :1], one) and torch.equal(every[:, :5], some)
    assert torch.equal(every.sort(1).values, torch.arange(cols).expand(7, -1))
    masked = torch.where(x == x, x, -INF) == -INF
    for row, last in zip(every, masked.sum(1).tolist(), strict=True):
        assert row[cols - last :].tolist() == sorted(row[cols - last :].tolist())
    assert every[2, 0] == 0 and every[6, 0] == 0 and torch.equal(every[5], torch.arange(cols))


@pytest.mark.parametrize("cols", [9, 64, 70])
def test_points_where_the_one_hot_sample_has_its_one(small_tiles, cols):
    x = torch.randn(16, cols)
    x[:8, ::3] = -INF
    x[12:] = 1e6 + torch.rand(4, cols)  # ties
    index, _ = sample(x, row_offset=-7)
    assert torch.equal(index[:, 0], one_hot(x, -7).argmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, cols, k", [
    (1, 1, 1), (5, 7, 1), (5, 7, 3), (3, 63, 40), (2, 80, 1), (2, 80, 16), (2, 80, 22), (0, 3, 2),
])
def test_memory_accesses(small_tiles, monkeypatch, rows, cols, k, dtype):
    x = torch.randn(rows, 2 * cols + 1).to(dtype)[:, ::2][:, :cols]
    monkeypatch.setattr(kernels, "FEWEST", 4)
    selecting = {kernels.select_from_rows: ["index_ptr"]}
    if cols > 32:  # of rows that are not aligned
        selecting = {
            kernels.select_from_blocks: ["z_ptr", "index_ptr"],
            kernels.select_from_selected: ["index_ptr"],
        }
    if k > (16 if cols > 64 else 32):  # of three blocks more than LONGEST
        selecting = {kernels.perturb_tile: ["z_ptr"]}
    with checked(selecting) as launches:
        index, _ = sample(x, k)
    monkeypatch.setattr(kernels, "select", lambda *_: index)
    measured = {_gumbel_blocks.measure_blocks: ["top_ptr", "index_ptr", "total_ptr"]}
    logarithms = {kernels.log_softmax_at: ["value_ptr"]}
    if cols > 32:  # of rows that are not aligned
        logarithms = {kernels.log_softmax_of_blocks: ["value_ptr"], **measured}
    with checked(logarithms) as values:
        sample(x, k, log_prob=True)
    assert (len(launches), len(values)) == (len(selecting), len(logarithms)) if rows else not values


@pytest.mark.parametrize("k", [1, 4, 32])
def test_few_wide_rows_have_many_programs(monkeypatch, k):
    """Row after row, one program a row would leave most of a GPU idle; and no row is sorted."""
    monkeypatch.setattr(torch.Tensor, "sort", None)
    with programs() as grids:
        sample(torch.zeros(2, 150_000), k)
        sample(torch.zeros(2, 150_000), k, log_prob=True)
    blocks = 2 * 150_000 // _rows.BLOCK
    assert [n >= blocks for n in grids] == [True, False, True, False, True, False]


@pytest.mark.parametrize("cols", [33, 100])
@pytest.mark.parametrize("k", [1, 5, 33])
def test_log_probabilities(small_tiles, cols, k):
    x = 5 * torch.randn(6, cols)
    x[1, 2:], x[2], x[3, 5], x[4, 6], x[5, 0] = -INF, -INF, NAN, INF, 1e4
    index, value = sample(x, k, log_prob=True)
    exact = x.double().log_softmax(1).gather(1, index)
    torch.testing.assert_close(value.double(), exact, rtol=3e-7, atol=3e-7, equal_nan=True)
    assert sample(x, k)[1].shape == (0,)
