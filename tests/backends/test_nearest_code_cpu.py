"""The C++ backend of nearest_code: the ladder of filters, tiles, threads, memory."""

import pytest
import torch
import torch.nn.functional as F

import tilewise as tw
from tests.common import fresh
from tests.common.codebook_cases import CASES
from tests.common.concurrency import holds_after_fork, in_threads
from tests.ops.test_nearest_code import METRICS, assert_same, check

BY_NAME = {case.name: case for case in CASES}
# Several blocks of rows, several chunks of the codebook, and sizes that nothing divides.
LARGE = [
    ("near", (600, 4200, 8)), ("clusters", (200, 4500, 20)), ("one_cluster", (200, 700, 70)),
    ("common_offset", (300, 600, 65)), ("duplicates", (200, 5000, 12)), ("scales", (500, 600, 17)),
    ("outlier_code", (120, 4200, 64)), ("outlier_row", (2100, 130, 64)), ("zeros", (300, 300, 130)),
    ("nan_codes", (200, 4400, 9)), ("opposite", (120, 300, 257)), ("denormal", (100, 300, 48)),
    ("infinities", (150, 300, 40)), ("integers", (300, 700, 5)),
]


@pytest.fixture(autouse=True)
def cpu_backends():
    with tw.backend("cpu"):
        yield


@pytest.mark.parametrize("name, sizes", LARGE, ids=str)
def test_over_blocks_and_chunks(name, sizes):
    x, codebook = BY_NAME[name].tensors(sizes=sizes)
    for metric in METRICS:
        check(x, codebook, metric)
    check(x, codebook, "l2", 16)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", [case.name for case in CASES if "normal" not in case.name])
def test_float64(name, metric):
    check(*BY_NAME[name].tensors(torch.float64), metric)
    check(*BY_NAME[name].tensors(torch.float32, torch.float64), metric)
    check(*BY_NAME[name].tensors(torch.float64, torch.float32), metric)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e150, 1e200], ids=str)
def test_float64_far_from_one(scale):
    """Squares overflow or vanish; the reference's order of NaN, infinity and zero holds."""
    x, codebook = BY_NAME["near"].tensors(torch.float64)
    for metric in METRICS:
        check(x * scale, codebook * scale, metric)
        check(x, codebook * scale, metric)
        check(x * scale, codebook, metric)


def test_random_rows_of_one_problem_at_every_scale():
    """Blocks mix rows that the integers settle with rows that need a finer filter."""
    torch.manual_seed(3)
    codebook = torch.randn(600, 40)
    codebook[300:400] = codebook[300] + 1e-5 * torch.randn(100, 40)
    x = torch.randn(800, 40) * torch.randn(800, 1).mul(8).exp()
    x[::7] = codebook[300] + 1e-5 * torch.randn(115, 40)
    x[::31], x[5] = 0.0, float("nan")
    for metric in METRICS:
        check(x, codebook, metric, 3)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 47, 48, 63, 64, 65, 100, 129])
def test_every_kind_of_row_length(dim):
    torch.manual_seed(dim)
    check(torch.randn(101, dim), torch.randn(130, dim))


@pytest.mark.parametrize("codes", [31, 32, 33, 63, 64, 65, 127, 129, 4095, 4096, 4097])
def test_codebooks_that_fill_panels_and_chunks_or_not(codes):
    torch.manual_seed(codes)
    check(torch.randn(99, 6), torch.randn(codes, 6), "l2", 5)


def test_rows_longer_than_integers_can_sum():
    torch.manual_seed(0)
    check(torch.randn(9, 33000), torch.randn(70, 33000))


def test_no_dimensions():
    for metric in METRICS:
        check(torch.zeros(20, 0), torch.zeros(70, 0), metric)


def test_more_distances_than_int32_can_count():
    torch.manual_seed(0)
    x, codebook = torch.randn(40_000, 4), torch.randn(60_000, 4)  # 2.4e9 of them
    ours = tw.nearest_code(x, codebook)
    for rows in (slice(0, 50), slice(39_950, 40_000)):
        exact = tw.reference.nearest_code(x[rows], codebook)
        assert_same(type(ours)(ours.index[rows], ours.distance[rows]), exact)


@pytest.mark.parametrize("name", ["near", "clusters", "common_offset"])
def test_same_for_every_thread_count_and_split(threads, name):
    x, codebook = BY_NAME[name].tensors(sizes=(1100, 500, 24))
    expected = tw.nearest_code(x, codebook)
    for count in (1, 2, 3, 4, 4):
        threads(count)
        assert_same(tw.nearest_code(x, codebook), expected)
    prepared = tw.prepare_codebook(codebook)
    for size in (1, 7, 100, 1000):
        for codes in (codebook, prepared):
            parts = [tw.nearest_code(part, codes) for part in x[:300].split(size)]
            assert torch.equal(torch.cat([p.index for p in parts]), expected.index[:300])


def test_few_rows_share_the_threads_by_codes(threads):
    x, codebook = BY_NAME["duplicates"].tensors(sizes=(3, 9000, 5))
    for count in (1, 4):
        threads(count)
        check(x, codebook, "l2", 16)


@pytest.mark.alone
def test_calls_from_several_threads():
    x, codebook = BY_NAME["clusters"].tensors(sizes=(500, 300, 16))
    expected = tw.nearest_code(x, codebook)
    for got in in_threads(lambda: tw.nearest_code(x, codebook)):
        assert_same(got, expected)


def test_a_codebook_packed_elsewhere_is_refused():
    prepared = tw.prepare_codebook(torch.randn(70, 8))
    op = torch.ops.tilewise.nearest_code
    x = torch.randn(1, 9, 8)
    for codebook, metric in ((torch.randn(1, 71, 8), "l2"), (torch.randn(1, 70, 8), "dot")):
        with pytest.raises(ValueError, match="packed"):
            op(x, codebook, metric, 1, None, prepared.packed)
    with pytest.raises(ValueError, match="packed"):
        op(x, torch.randn(1, 70, 8), "l2", 1, None, torch.zeros(1, 3, dtype=torch.uint8))


def prepare_memory(rows, dim, codes, kind):
    """Runs in a process of its own: see tests.common.fresh."""
    torch.manual_seed(0)
    x, codebook = torch.randn(rows, dim), torch.randn(codes, dim)
    if kind == "clusters":  # float32 has to help
        codebook = codebook[torch.arange(codes) % 2] + 1e-4 * codebook
    tw.nearest_code(x[:64], codebook[:64])
    return lambda: tw.nearest_code(x, codebook)


@pytest.mark.alone
def test_memory_is_linear():
    """No N x K: that would be 512 MiB in the larger problem."""
    kinds, sizes = ("normal", "clusters"), ((4096, 2048), (16384, 8192))
    cases = [dict(rows=n, dim=16, codes=k, kind=kind) for kind in kinds for n, k in sizes]
    peaks = fresh.peak_bytes_each(prepare_memory, cases)
    for kind, small, large in zip(kinds, peaks[::2], peaks[1::2], strict=True):
        linear = 16384 * 24 + 8192 * (16 + 80) + (8192 * 64 if kind == "clusters" else 0)
        figures = f"{kind}: {small / 2**20:.1f} -> {large / 2**20:.1f} MiB"
        assert large - small <= 2 * linear + 2**20, figures
        assert small <= 12 * 2**20, figures  # the workspaces of two threads


UNIT_SCRIPT = """
import torch, tilewise as tw
from tilewise import _extension
from tests.common.codebook_cases import CASES
from tests.common.concurrency import holds_after_fork, in_threads
from tests.ops.test_nearest_code import METRICS, check
from tests.backends.test_nearest_code_cpu import BY_NAME
with tw.backend("cpu"):
    for case in CASES:
        for metric in METRICS:
            check(*case.tensors(), metric)
        check(*case.tensors(), "l2", min(5, case.sizes[1]))
    for name in ("clusters", "scales", "common_offset"):
        check(*BY_NAME[name].tensors(sizes=(150, 300, 50)))
    for dim in (1, 4, 12, 20, 48, 100, 129):
        check(torch.randn(101, dim), torch.randn(130, dim))
info = _extension.build_info()
print(info["cpu_capability"], info["integer_unit"])
"""
UNITS = ["none", "pairs", "vnni", "amx"]


@pytest.mark.parametrize("capability, unit", [
    ("default", "none"), ("avx2", "none"), ("avx2", "pairs"),
    ("avx512", "none"), ("avx512", "pairs"), ("avx512", "vnni"),
])
def test_every_instruction_set_and_integer_unit(capability, unit):
    """The environment lowers what is used, and the indices stay."""
    best, order = torch.backends.cpu.get_cpu_capability(), ["DEFAULT", "AVX2", "AVX512"]
    if best in order and order.index(capability.upper()) > order.index(best):
        pytest.skip(f"this CPU has {best}; torch, told to use more, dies of it")
    child = fresh.run(
        UNIT_SCRIPT, ATEN_CPU_CAPABILITY=capability, TILEWISE_INTEGER_UNIT=unit
    )
    assert child.returncode == 0, child.stderr[-2000:]
    used_capability, used_unit = child.stdout.split()
    if best in order:
        assert used_capability == capability.upper()
    assert UNITS.index(used_unit) <= UNITS.index(unit)


@pytest.mark.alone
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork():
    x, codebook = BY_NAME["clusters"].tensors(sizes=(500, 300, 64))
    expected = tw.nearest_code(x, codebook)
    assert holds_after_fork(
        lambda: torch.equal(tw.nearest_code(x, codebook).index, expected.index)
    )


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_settings_of_torch_products_change_nothing(precision):
    """torch.mm may multiply in bfloat16 under them."""
    x, codebook = BY_NAME["clusters"].tensors(sizes=(150, 600, 64))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        check(x, codebook)
    finally:
        torch.set_float32_matmul_precision(before)


def extremes():
    """float64 where squares overflow or vanish, though the numbers do not."""
    generator = torch.Generator().manual_seed(0)
    x, codes = (1e-10 * torch.randn(n, 16, dtype=torch.float64, generator=generator)
                for n in (100, 200))
    codes[7, 0] = 1.0
    for power in (-500, -505, -511, 505):
        yield "l2", x * 2.0**power, codes * 2.0**power
    far = codes * 1e160
    far[9], far[9, 0] = 0.0, 1.35e154
    rows = x * 1e160
    rows[:, 0] = 1.3e154
    yield "l2", rows, far  # the nearest code's norm overflows
    against = -codes.abs()
    against[9] = 1e200
    yield "cosine", x.abs(), against  # at a distance of 1, which is the smallest
    for a, b in ((1e-150, 1e-153), (1e-145, 1e-158), (1e10, 1e-150), (1e-150, 1e10)):
        yield "dot", x * a, codes * b
        yield "cosine", x * a, codes * b


@pytest.mark.parametrize("case", range(13))
def test_float64_whose_squares_leave_the_range(case):
    metric, x, codebook = list(extremes())[case]
    check(x, codebook, metric)


def test_unit_vectors_and_images():
    """A sphere, where distances concentrate, and bytes, where they tie."""
    torch.manual_seed(0)
    x, codebook = (F.normalize(torch.randn(n, 128), dim=1) for n in (300, 600))
    for metric in METRICS:
        check(x, codebook, metric, 2)
    images = torch.randint(0, 256, (300, 48)).float() / 255
    check(images, images[torch.randint(300, (200,))])
