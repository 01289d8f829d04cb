"""The Triton backend of nearest_code, in the interpreter: what no other op promises."""

import contextlib
from unittest import mock

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

import tilewise as tw
from tests.common.codebook_cases import CASES, clusters, near, normal
from tests.ops.test_nearest_code import METRICS, assert_same
from tests.triton_tools import interpreter
from tests.triton_tools.checker import MemoryFault, checked
from tilewise.kernels import (
    _nearest_code_exact,
    _nearest_code_filter,
    _nearest_code_plan,
    _nearest_code_recheck,
)
from tilewise.kernels import nearest_code as kernels
from tilewise.kernels._common import Tile
from tilewise.reference.nearest_code import NearestCode, _distance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_NAME = {case.name: case for case in CASES}
OUTPUTS = {
    _nearest_code_filter.centre_codes: ["centre_ptr"],
    _nearest_code_filter.measure_codes: ["norm_ptr", "half_ptr"],
    _nearest_code_filter.pack_codes: ["w_ptr", "bias_ptr", "limits_ptr"],
    _nearest_code_filter.pack_rows: ["norm_ptr", "z_ptr", "bounds_ptr"],
    _nearest_code_filter.filter_tile: ["minima_ptr"],
    _nearest_code_recheck.recheck: ["index_ptr", "distance_ptr", "left_ptr"],
    _nearest_code_exact.brute: ["index_ptr", "distance_ptr"],
    _nearest_code_exact.brute_shares: ["key_ptr", "nearest_ptr"],
    _nearest_code_exact.merge_lists: ["index_ptr", "distance_ptr"],
}


def search(x, codebook, metric="l2", k=None, mask=None):
    """The kernels alone, for (N, D) or (H, N, D) rows; compares with the reference."""
    rows = x.view(-1, *x.shape[-2:]) if x.dim() == 3 else x[None]
    codes = codebook if codebook.dim() == 3 else codebook[None]
    flat = None if mask is None else mask.expand(x.shape[:-1]).reshape(rows.shape[:2])
    index, distance = kernels.nearest_code(rows, codes, metric, k or 1, flat, None)
    assert index.shape == distance.shape == (*rows.shape[:2], k or 1)
    assert index.dtype == torch.int64 and distance.dtype == torch.float32
    shape = x.shape[:-1] if k is None else (*x.shape[:-1], k)
    return NearestCode(index.reshape(shape), distance.reshape(shape))


def check(x, codebook, *args, **kwargs):
    exact = tw.reference.nearest_code(x, codebook, *args, **kwargs)
    assert_same(search(x, codebook, *args, **kwargs), exact)


def wrong_rows(x, codebook, metric="l2"):
    exact = tw.reference.nearest_code(x, codebook, metric)
    return (search(x, codebook, metric).index != exact.index).sum()


def draw(make, n, k, d, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(n, k, d)


@pytest.fixture
def small_tiles(monkeypatch):
    """So that small problems have many tiles, and blocks of groups."""
    tile = Tile(16, 32, 16, pieces=1, warps=1, stages=1, tma=False)
    monkeypatch.setitem(_nearest_code_plan.TILES, ("interpreter", "half"), tile)
    blocks = _nearest_code_plan.Blocks(
        pack_rows=16, pack_groups=2, pack_width=16,
        recheck_rows=16, recheck_groups=4, recheck_width=16, recheck_warps=1,
        brute_rows=16, brute_codes=32,
    )
    monkeypatch.setattr(_nearest_code_plan, "INTERPRETER_BLOCKS", blocks)
    return tile


@contextlib.contextmanager
def recorded():
    """Yields a list that every launch inside the block is added to: kernel, arguments, options."""
    launches = []
    run = InterpretedFunction.run

    def record(self, *args, **kwargs):
        launches.append((self, args, kwargs))
        return run(self, *args, **kwargs)

    with mock.patch.object(InterpretedFunction, "run", record):
        yield launches


def check_accesses(*args):
    """Searches, then runs every launch again under the checker; returns the kernels launched."""
    with recorded() as launches:
        kernels.nearest_code(*args, None)
    for kernel, arguments, options in launches:
        with checked({kernel: OUTPUTS[kernel]}):
            kernel.run(*arguments, **options)
    return [kernel.fn.__name__ for kernel, *_ in launches]


ALL = [
    "centre_codes", "measure_codes", "pack_codes", "pack_rows", "filter_tile", "recheck", "brute",
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n, k, d", [(64, 64, 32), (33, 70, 17), (1, 1, 1)])
def test_memory_accesses(n, k, d, metric):
    x, codes = draw(clusters, n, k, d)
    assert check_accesses_but_the_last(x[None], codes[None], metric, 1, None) == ALL


def check_accesses_but_the_last(*args):
    """`brute` has nothing to do here, and would have to store every element."""
    with mock.patch.dict(OUTPUTS, {_nearest_code_exact.brute: []}):
        return check_accesses(*args)


def test_memory_accesses_of_lists_heads_and_masks(small_tiles):
    x, codes = torch.randn(2, 17, 19).bfloat16(), torch.randn(2, 66, 19).half()
    names = check_accesses_but_the_last(x, codes, "cosine", 3, torch.rand(2, 17) < 0.7)
    assert names == ALL


@pytest.mark.parametrize("metric", METRICS)
def test_memory_accesses_of_brute_force(monkeypatch, metric):
    """Rows that bounds mean nothing for, and small problems, to which those of no width belong."""
    x, codes = torch.randn(2, 9, 19), torch.randn(2, 40, 19)
    x[..., 0] = float("inf")  # by "cosine" as far as NaN from everything, which needs no search
    check_all = check_accesses_but_the_last if metric == "cosine" else check_accesses
    assert check_all(x, codes, metric, 2, None) == ALL
    monkeypatch.setitem(kernels.SMALL, "interpreter", 2 * 9 * 40 * 19)
    assert check_accesses(x, codes, metric, 2, torch.rand(2, 9) < 0.5) == ALL[-1:]
    assert check_accesses(x[..., :0], codes[..., :0], metric, 1, None) == ALL[-1:]
    monkeypatch.setattr(kernels, "ALONE", 0)
    shared = ["brute_shares", "merge_lists"]
    assert check_accesses(x, codes, metric, 2, torch.rand(2, 9) < 0.5) == shared


def test_checker_sees_a_workspace_that_is_too_small():
    x, codes = draw(normal, 40, 40, 16)
    with recorded() as launches:
        search(x, codes)
    kernel, arguments, options = launches[4]
    minima = arguments[4][:, :-1].clone()  # a row less
    with pytest.raises(MemoryFault), checked({kernel: OUTPUTS[kernel]}):
        kernel.run(*arguments[:4], minima, *arguments[5:], **options)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["duplicates", "clusters", "scales", "zeros"])
def test_many_tiles(small_tiles, name, metric):
    check(*BY_NAME[name].tensors(sizes=(37, 110, 19)), metric)


@pytest.mark.parametrize("name, metric", [("integers", "l2"), ("clusters", "dot")])
def test_many_tiles_in_lists(small_tiles, name, metric):
    check(*BY_NAME[name].tensors(sizes=(30, 110, 19)), metric, 3)
    check(*BY_NAME[name].tensors(sizes=(15, 70, 6)), metric, 16)


def test_more_in_a_list_than_groups():
    check(*draw(normal, 20, 13, 5), "l2", 13)


def test_descriptors_and_pointers_agree(monkeypatch):
    x, codes = draw(near, 70, 130, 40)
    usual = search(x, codes)
    tiles = _nearest_code_plan.TILES
    tile = tiles["interpreter", "half"]
    monkeypatch.setitem(tiles, ("interpreter", "half"), tile._replace(tma=not tile.tma))
    assert_same(search(x, codes), usual)


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded"])
def test_layouts(layout):
    x, codes = torch.randn(3, 20, 10), torch.randn(3, 40, 10)
    change = {
        "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "strided": lambda t: t.repeat_interleave(2, 1)[:, ::2],
        "offset": lambda t: torch.cat([t[..., :1], t], -1)[..., 1:],
        "expanded": lambda t: t[:1].expand(3, -1, -1),
    }[layout]
    check(change(x), change(codes), "cosine")
    check(change(x)[0], change(codes)[0], "l2")


@pytest.mark.parametrize("metric", METRICS)
def test_masked_rows_are_not_searched(metric):
    x, codes = torch.randn(2, 33, 7), torch.randn(2, 20, 7)
    x[:, ::4] = float("nan")
    mask = torch.arange(33) % 4 != 0
    check(x, codes, metric, mask=mask)
    check(x, codes, metric, 3, mask=torch.stack([mask, ~mask]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_codes_of_different_dtypes(dtype):
    x, codes = draw(near, 40, 50, 9)
    for other in DTYPES:
        check(x.to(dtype), codes.to(other))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["normal-97x65x16", "nan_codes", "infinities", "zeros"])
def test_brute_force_alone(monkeypatch, name, metric):
    monkeypatch.setitem(kernels.SMALL, "interpreter", 2**30)
    check(*BY_NAME[name].tensors(), metric)
    check(*BY_NAME[name].tensors(), metric, 4)


@pytest.mark.parametrize("metric", METRICS)
def test_rows_of_zeros_are_as_far_from_every_finite_code(metric):
    x, codes = draw(normal, 20, 80, 9)
    x[::2] = 0
    check(x, codes, metric, 2)
    codes[0] = float("nan")
    codes[2, 3] = float("inf")
    check(x, codes, metric, 2)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("x_scale, code_scale", [(8e37, 1e-2), (1e-2, 8e37), (8e37, 1e-40)])
def test_norms_that_float32_does_not_hold(x_scale, code_scale, metric):
    x, codes = draw(normal, 30, 60, 40)
    check(x.clamp(-4, 4) * x_scale, codes.clamp(-4, 4) * code_scale, metric, 2)
    check(x[::7].clamp(-4, 4) * x_scale, codes.clamp(-4, 4) * code_scale, metric)


def bounds_of(x, codebook, metric):
    """What the filter makes of (N, D) rows: scores and margins (N, groups), s, t, m, groups."""
    plan = kernels.plan_for("interpreter", 1)
    packed = kernels.pack(codebook[None], metric, plan)
    _, z, bounds = kernels.launch_pack_rows(x[None], packed, metric, plan)
    minima = kernels.launch_filter(z, bounds, packed, plan)[0, : len(x)].double()
    beta, a, b, c = bounds[0, :, : len(x), None].double()
    p, q, t = packed.limits[0].double()
    scale = 2.0 ** np.clip(13 - (np.frexp(packed.half.max().item())[1] - 1), -126, 126)
    code = torch.arange(len(codebook))
    step = plan.tile.cols // kernels.GROUP_SIZE
    group = code // plan.tile.cols * step + code % step
    return minima, a * p + b * q + beta * t + c, beta * scale, scale, packed.centre[0], group


def exact_scores(x, codebook, metric, s, t, m):
    """The scores that the distances of the contract stand for, in 80-bit floats, (N, K)."""
    distance = _distance(x.double()[:, None], codebook.double()[None], metric).numpy()
    x, m, s = (v.double().numpy().astype(np.longdouble) for v in (x, m, s))
    distance = distance.astype(np.longdouble)
    if metric == "l2":
        return s * t / 2 * (distance - np.square(x - m).sum(1, keepdims=True))
    offset = (x * m).sum(1, keepdims=True)
    if metric == "cosine":
        distance = (distance - 1) * np.sqrt(np.square(x).sum(1, keepdims=True))
    return s * t * (distance + offset)


FINITE = [
    case.name for case in CASES
    if case.sizes[0] > 60 and all(tensor.isfinite().all() for tensor in case.tensors())
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", FINITE)
def test_bounds_hold(name, metric):
    x, codes = BY_NAME[name].tensors()
    least, margin, s, t, m, group = bounds_of(x, codes, metric)
    exact = exact_scores(x, codes, metric, s, t, m)
    assert (errors(least, exact, group) <= margin).all()


def errors(least, exact, group):
    """How far the least score of each row and group is from the truth; 0 for empty groups."""
    off = torch.zeros_like(least)
    for g in group.unique():
        off[:, g] = torch.from_numpy(
            np.abs(exact[:, group == g].min(1) - least[:, g].numpy()).astype(np.float64)
        )
    return off


def between_codes(n, k, d):
    """Rows nearly in the middle between two codes, which float16 holds exactly."""
    codes = torch.randint(-8, 9, (k, d)).float()
    pairs = codes[torch.randint(k, (2, n))]
    return pairs.mean(0) + 1e-3 * torch.randn(n, d), codes


def twin_codes(n, k, d):
    """Rows that float16 holds exactly, and pairs of codes that it does not tell apart."""
    codes = torch.nn.functional.normalize(torch.randn(k // 2, d)).repeat(2, 1)
    return torch.randint(-9, 10, (n, d)).float(), codes + 1e-4 * torch.randn(k, d)


def around_the_centre(n, k, d):
    """All codes are nearly as far, in float32."""
    return 2.0**-23 * torch.randn(n, d), torch.nn.functional.normalize(torch.randn(k, d))


def far_rows(n, k, d):
    """All codes are nearly as far, in float64."""
    return 2.0**50 * torch.randn(n, d), torch.randn(k, d)


TERMS = {
    "A": (between_codes, "l2", 19), "B": (twin_codes, "dot", 3),
    "T": (around_the_centre, "l2", 19), "C": (far_rows, "l2", 19),
}


@pytest.mark.parametrize("term", TERMS)
def test_every_term_of_the_margin_is_needed(monkeypatch, term):
    """Without it, a search is wrong."""
    make, metric, d = TERMS[term]
    monkeypatch.setattr(kernels, "centre_of", lambda codes, metric: torch.zeros(1, d))
    x, codes = draw(make, 64, 200, d)
    assert wrong_rows(x, codes, metric) == 0
    launch = kernels.launch_pack_rows

    def without(x, packed, *rest):
        norm, z, bounds = launch(x, packed, *rest)
        (packed.limits if term == "T" else bounds)[:, {"A": 1, "B": 2, "T": 2, "C": 3}[term]] = 0.0
        return norm, z, bounds

    monkeypatch.setattr(kernels, "launch_pack_rows", without)
    assert wrong_rows(x, codes, metric) > 0


def cut_products(monkeypatch, size):
    """Makes `tl.dot` wrong by `size` times what its terms could lose to cut accumulators."""
    generator = np.random.default_rng(0)

    def dot(self, a, b, d, *rest):
        exact = interpreter._dot(self, a, b, d, *rest)
        terms = np.abs(a.data.astype(np.float32)) @ np.abs(b.data.astype(np.float32))
        lost = size * a.data.shape[1] * 2.0**-22 * terms
        sign = generator.choice(np.float32([-1, 1]), lost.shape)
        return TensorHandle((exact.data + sign * lost).astype(np.float32), exact.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.mark.parametrize("metric", METRICS)
def test_matrix_units_may_cut_instead_of_round(monkeypatch, metric):
    cut_products(monkeypatch, 1)
    for name in ("integers", "one_cluster"):
        x, codes = BY_NAME[name].tensors()
        least, margin, s, t, m, group = bounds_of(x, codes, metric)
        exact = exact_scores(x, codes, metric, s, t, m)
        assert (errors(least, exact, group) <= margin).all()
        assert wrong_rows(x, codes, metric) == 0


def test_matrix_units_may_not_lose_more(monkeypatch):
    cut_products(monkeypatch, 8)
    x, codes = BY_NAME["integers"].tensors()
    least, margin, s, t, m, group = bounds_of(x, codes, "dot")
    assert (errors(least, exact_scores(x, codes, "dot", s, t, m), group) > margin).any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("make", [normal, near])
def test_few_groups_are_left_over(make, metric):
    """What the speed depends on, for data like that of training."""
    x, codes = draw(make, 32, 512, 64)
    least, margin, *_ = bounds_of(x, codes, metric)
    limit = (least + margin).amin(1, keepdim=True)
    assert (least - margin <= limit).sum(1).double().mean() < 1.3


def test_one_code_out_of_line_spoils_one_group():
    x, codes = draw(normal, 64, 256, 16)
    codes[70, 3] = 1e12
    least, margin, *_ = bounds_of(x, codes, "l2")
    assert ((margin / margin.median()) > 100).sum(1).eq(1).all()


@pytest.mark.parametrize("heads, rows, count", [(1, 150, 3), (5, 20, 3)])
def test_workspace_does_not_grow_with_the_batch(monkeypatch, heads, rows, count):
    """It is cut into chunks of rows, or of heads."""
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", 64 * 128 * 2 if heads > 1 else 64 * 128)
    x, codes = torch.randn(heads, rows, 9), torch.randn(heads, 20, 9)
    with recorded() as launches:
        check(x, codes, "cosine", 2)
    chunks = [args for kernel, args, _ in launches if kernel.fn.__name__ == "filter_tile"]
    assert len(chunks) == count
    for z, _, _, bounds, minima, *_ in chunks:
        assert z.base.nbytes + bounds.nbytes + minima.nbytes <= kernels.WORKSPACE_BYTES
