"""The C++ backend of the random ops: tiles, threads, instruction sets, memory."""

import pytest
import torch

import tilewise as tw
from tests.common import fresh
from tests.common.concurrency import assert_same_bits, holds_after_fork, in_threads
from tests.common.random_cases import CASES, DTYPES, HALVES, Case, largest, masked, normal, strided
from tests.ops import test_gaussian_sample, test_gumbel_argmax, test_gumbel_softmax


@pytest.fixture(autouse=True)
def cpu_backends():
    with tw.backend("cpu"):
        yield


BIG = [  # rows longer than a tile, more rows than a block, and sizes that no vector divides
    Case("many-rows", lambda: normal(3001, 5)),
    Case("long-rows", lambda: 2 * normal(3, 40_001)),
    Case("one-long-row", lambda: normal(1, 200_003), tau=0.5),
    Case("both", lambda: masked(301, 517), tau=0.7),
    Case("columns-first", lambda: normal(517, 301), dim=0),
    Case("in-the-middle", lambda: normal(7, 130, 65), dim=1, tau=2.0),
    Case("in-the-middle-strided", lambda: normal(5, 70, 33), dim=1, layout=strided),
]
big = pytest.mark.parametrize("case", BIG, ids=lambda case: case.name)


@big
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_big_samples(case, dtype):
    for hard in (False, True):
        test_gumbel_softmax.check(case, dtype, hard)


@big
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_big_argmax(case, dtype):
    for k in (None, 5):
        test_gumbel_argmax.check(case, dtype, k)


@pytest.mark.parametrize("k", [1, 16, 17, 64, 65, 300])
def test_any_number_of_categories(k):
    test_gumbel_argmax.check(Case("k", lambda: normal(9, 1025)), torch.float32, k)
    test_gumbel_argmax.check(Case("k-masked", lambda: masked(9, 517)), torch.float32, k)


@pytest.mark.parametrize("shape", [(3001, 5), (3, 40_001), (200_003,), (7, 65, 33)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_big_gaussian(shape, dtype):
    mean, logvar = (normal(*shape, seed=i).to(dtype) for i in (0, 1))
    test_gaussian_sample.check(mean, logvar)


@pytest.mark.parametrize("start", range(1, 73, 8))
def test_every_row_length(start):
    """Remainders of vectors, of calls of the generator, and of both."""
    for cols in range(start, start + 8):
        case = Case("length", lambda cols=cols: normal(3, cols))
        test_gumbel_softmax.check(case, torch.float32)
        test_gumbel_argmax.check(case, torch.float32, min(cols, 3))
        test_gaussian_sample.check(normal(3, cols).float(), normal(3, cols, seed=1).float())


def everything(case: Case, dtype=torch.float32):
    """Every result and gradient of the three ops."""
    x = case.logits(dtype)
    grad, tau = normal(*x.shape, seed=3).to(dtype), torch.tensor(case.tau)
    results = []
    for hard in (False, True):
        results += test_gumbel_softmax.outputs(
            tw.gumbel_softmax, x, tau, grad, hard=hard, **case.sampling
        ).values()
    results += tw.gumbel_argmax(x, min(3, x.shape[case.dim]), log_prob=True, **case.sampling)
    grads = grad, normal(len(x)).float()
    results += test_gaussian_sample.outputs(tw.gaussian_sample, x, x, grads, seed=1).values()
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in BIG if case.name != "both"],
                         ids=lambda case: case.name)
def test_same_bits_for_every_thread_count(threads, case, dtype):
    assert_same_bits(threads, lambda: everything(case, dtype))


WIDE = [  # few rows, which threads share by columns
    Case("one-row", lambda: normal(1, 50_257), tau=0.5),
    Case("a-block-and-one", lambda: normal(2, 4097)),
    Case("masked", lambda: normal(2, 9000).index_fill(1, torch.arange(4000, 8300), -torch.inf)),
    Case("all-masked", lambda: normal(2, 9000).index_fill(0, torch.tensor([1]), -torch.inf)),
    Case("equals", lambda: normal(2, 9000).index_fill(1, torch.tensor([300, 5000]), torch.inf)),
    Case("nan", lambda: normal(3, 9000).index_fill(1, torch.tensor([5000]), torch.nan)),
    Case("columns-first", lambda: normal(9000, 2), dim=0),
]


@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_rows_that_threads_share_have_the_bits_of_one_thread(threads, case):
    """Up to 64 threads: a block is in none, one or several of their shares."""
    x, tau, ours = case.logits(torch.float32), torch.tensor(case.tau), []
    grad = normal(*x.shape, seed=3).float()
    for count in (1, 2, 5, 64):
        threads(count)
        found = [tw.gumbel_argmax(x, k, **case.sampling) for k in (None, 7, 4097)]
        for k in (None, 7):
            found += tw.gumbel_argmax(x, k, log_prob=True, **case.sampling)
        for hard in (False, True):
            found += test_gumbel_softmax.outputs(
                tw.gumbel_softmax, x, tau, grad, hard=hard, **case.sampling
            ).values()
        found.append(tw.gumbel_softmax(x.bfloat16(), **case.sampling))
        ours.append([y.nan_to_num(-3.0) if y.is_floating_point() else y for y in found])
    for others in ours[1:]:
        assert all(map(torch.equal, others, ours[0]))


@pytest.mark.parametrize("shape", [(1, 50_257), (2, 4097), (3, 4, 33, 65), (2, 12_288)], ids=str)
def test_wide_gaussian_rows_have_the_bits_of_one_thread(threads, shape):
    mean, logvar, d_z = (normal(*shape, seed=i).float() for i in range(3))
    mean[-1].view(-1)[5000 % mean[-1].numel()] = torch.nan
    logvar.view(-1)[::7] *= 40  # beyond what is clamped to
    d_kl, seed = torch.arange(1.0, 1 + len(mean)), torch.tensor(5)
    backward = torch.ops.tilewise.gaussian_sample_backward.default
    ours = []
    for count in (1, 2, 5, 64):
        threads(count)
        found = []
        for m, v in ((mean, logvar), (mean.bfloat16(), logvar.bfloat16()),
                     (strided(mean), strided(logvar))):  # fmt: skip
            found += tw.gaussian_sample(m, v, seed=5, row_offset=2)
            for grads in ((d_z, d_kl), (d_z, None), (None, d_kl)):
                g = [None if x is None else x.to(m.dtype) for x in grads]
                found += backward(*g, m, v, seed, 2, -30.0, 20.0)
        ours.append([x.nan_to_num(-3.0) for x in found])
    for others in ours[1:]:
        assert all(map(torch.equal, others, ours[0]))
    alone = tw.gaussian_sample(mean[-1:], logvar[-1:], seed=5, row_offset=2 + len(mean) - 1)
    assert torch.equal(alone[0].nan_to_num(-3.0), ours[-1][0][-1:])
    with tw.backend("reference"):
        z, kl = tw.gaussian_sample(mean, logvar, seed=5, row_offset=2)
    torch.testing.assert_close(ours[-1][0], z.nan_to_num(-3.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[-1][1], kl.nan_to_num(-3.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", [case for case in BIG if case.dim], ids=lambda case: case.name)
def test_strides_change_no_bit(case):
    plain = everything(case)
    for layout in (strided, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)):
        moved = Case(case.name, case.make, case.tau, case.dim, layout)
        assert all(map(torch.equal, everything(moved), plain))


def test_pieces_stay_within_an_outer_index():
    """Of rows that lie across memory, more than one piece takes and no multiple of it."""
    x = normal(3, 4096, 24).float()
    along = tw.gumbel_softmax(x, dim=1, seed=5)
    last = tw.gumbel_softmax(x.transpose(1, 2).contiguous(), seed=5)
    assert torch.equal(along, last.transpose(1, 2))


@pytest.mark.alone
def test_calls_from_several_threads():
    expected = everything(BIG[0])
    for got in in_threads(lambda: everything(BIG[0])):
        assert all(map(torch.equal, got, expected))


@pytest.mark.alone
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork():
    expected = everything(BIG[0])
    assert holds_after_fork(lambda: all(map(torch.equal, everything(BIG[0]), expected)))


SCRIPT = """
import os, torch, tilewise as tw
from tests.ops import test_gaussian_sample, test_gumbel_argmax, test_gumbel_softmax, test_philox
from tests.backends import test_gumbel_softmax_cpu as cpu
from tilewise import _extension
for seed in test_philox.SEEDS:
    test_philox.test_words_of_the_extension(seed)
with tw.backend("cpu"):
    for case in cpu.CHECKED:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for hard in (False, True):
                test_gumbel_softmax.check(case, dtype, hard)
            if "no-columns" not in case.name:
                test_gumbel_argmax.check(case, dtype, 1)
                test_gumbel_argmax.check(case, dtype)
    for start in (1, 17, 33):
        cpu.test_every_row_length(start)
    for dtype in (torch.float32, torch.bfloat16):
        cpu.test_big_gaussian((7, 65, 33), dtype)
    torch.save([cpu.everything(case) for case in cpu.BIG], os.environ["RESULTS"])
print(_extension.build_info()["cpu_capability"])
"""
CHECKED = [case for case in CASES if case.make().numel()] + BIG[3:]


def assert_alike(ours, theirs):
    """To a few roundings; one-hot vectors and indices hardly ever differ."""
    for a, b in zip(ours, theirs, strict=True):
        different = (a != b) if not a.is_floating_point() else ~torch.isclose(
            a, b, rtol=1e-4, atol=1e-5 * largest(b.abs()), equal_nan=True
        )
        assert different.sum() <= 2, different.sum()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability, tmp_path):
    """ATEN_CPU_CAPABILITY lowers what is used: the words stay, values move by roundings."""
    results = tmp_path / "results"
    child = fresh.run(SCRIPT, ATEN_CPU_CAPABILITY=capability, RESULTS=str(results))
    assert child.returncode == 0, child.stderr[-2000:]
    best = torch.backends.cpu.get_cpu_capability()
    expected = "AVX2" if capability == "avx2" and best in ("AVX2", "AVX512") else "DEFAULT"
    assert child.stdout.split()[-1] == expected
    for case, theirs in zip(BIG, torch.load(results), strict=True):
        assert_alike(everything(case), theirs)


def prepare_memory(op, rows, cols, dtype="float32", backward=False):
    """Runs in a process of its own: see tests.common.fresh."""
    x = torch.randn(rows, cols).to(getattr(torch, dtype)).requires_grad_(backward)
    call = {
        "soft": lambda x: tw.gumbel_softmax(x, seed=1),
        "hard": lambda x: tw.gumbel_softmax(x, hard=True, seed=1),
        "argmax": lambda x: tw.gumbel_argmax(x, seed=1),
        "top": lambda x: tw.gumbel_argmax(x, 5, seed=1, log_prob=True)[1],
        "gaussian": lambda x: tw.gaussian_sample(x, x, seed=1)[0],
    }[op]
    grad = torch.ones_like(x, requires_grad=False)

    def step(x, grad):
        y = call(x)
        return (y, *torch.autograd.grad(y, x, grad)) if backward else y

    step(x[:64], grad[:64])  # loads what it needs
    return lambda: step(x, grad)


ROWS, COLS = 4096, 1024  # 16 MiB of float32
# Multiples of the size of the logits: results, and gradients where there are any.
MEMORY = [
    ("soft", False, "float32", 1), ("hard", False, "float32", 1), ("argmax", False, "float32", 0),
    ("top", False, "float32", 0), ("gaussian", False, "float32", 1),
    ("soft", True, "float32", 2), ("hard", True, "float32", 2), ("gaussian", True, "float32", 3),
    ("hard", True, "bfloat16", 2), ("soft", False, "bfloat16", 1),
]


@pytest.mark.alone
def test_memory_is_that_of_the_results():
    """No noise, no perturbed logits, no float32 copy is ever stored."""
    cases = [dict(op=op, backward=backward, dtype=dtype, rows=ROWS, cols=COLS)
             for op, backward, dtype, _ in MEMORY]
    for (op, backward, dtype, times), peak in zip(
        MEMORY, fresh.peak_bytes_each(prepare_memory, cases), strict=True
    ):
        size = ROWS * COLS * (2 if dtype == "bfloat16" else 4)
        extra = peak - times * size
        assert extra <= 4 * 2**20, f"{op} {dtype} {backward}: {extra / 2**20:.1f} MiB too much"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_float32_rounded_once(dtype):
    x = normal(301, 517).to(dtype)
    y = tw.gumbel_softmax(x, 0.7, seed=5)
    assert torch.equal(y, tw.gumbel_softmax(x.float(), 0.7, seed=5).to(dtype))
