"""Kernels that only modules have: each does what plain torch does on other devices."""

import copy

import pytest
import torch

import tilewise as tw
from tests.triton_tools.checker import Updated, checked
from tests.triton_tools.launches import counted
from tilewise.kernels import _enqueue, _moving_averages, _straight_through
from tilewise.nn.losses.itc_loss import NO_ID
from tilewise.nn.quantizers import _codebook
from tilewise.nn.quantizers import _straight_through as estimator
from tilewise.nn.quantizers._unit import EPS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROTATED = {_straight_through.rotate_tile: ["out_ptr"]}
AVERAGED = {
    _moving_averages.average_sizes: [Updated("size_ptr"), "totals_ptr"],
    _moving_averages.average_codes: [Updated("mean_ptr"), Updated("code_ptr")],
}
ENQUEUED = {
    _enqueue.write_tile: [Updated(f"{x}_queue_ptr") for x in ("image", "text", "id")],
    _enqueue.advance: [Updated("pointer_ptr")],
}


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        yield


# The rotation


def rotation_error(found, grad, x, q, pull):
    """Against float64, in units of what rounding the terms may cost."""
    wide = [v.double() for v in (grad, x, q)]
    truth = estimator._rotate_back(*wide, None if pull is None else pull.double())
    size = sum(v.norm(dim=-1, keepdim=True) for v in wide) * 10
    return ((found.double() - truth).abs() / size.clamp(min=1e-30)).amax()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, dim", [(1, 1), (70, 19), (33, 64), (3, 2100)])
def test_rotation_is_no_worse_than_torchs(rows, dim, dtype):
    grad, x, q = (torch.randn(rows, dim).to(dtype) for _ in range(3))
    for pull in (None, torch.tensor(0.3)):
        with checked(ROTATED):
            found = _straight_through.rotate_back(grad, x, q, pull, None, EPS)
        theirs = estimator._rotate_back(grad.float(), x.float(), q.float(), pull).to(dtype)
        assert found.dtype == dtype and found.shape == x.shape
        ours, eager = (rotation_error(y, grad, x, q, pull) for y in (found, theirs))
        assert ours <= 1.5 * eager + torch.finfo(torch.float32).eps


def test_rotation_of_odd_rows():
    """Zeros, a row that turns by half a circle, padding that is NaN, and any strides."""
    x, q = torch.randn(40, 10), torch.randn(40, 10)
    x[3], q[4], x[5] = 0, 0, -q[5]
    x[7], x[8] = 1e-9, float("nan")
    keep = (torch.arange(40) != 8)[:, None]
    grad = torch.randn(10, 1, 40).expand(10, 3, 40)[:, 1].t()
    pull = torch.tensor(0.5)
    with checked(ROTATED):
        found = _straight_through.rotate_back(
            grad, torch.stack([x, x], 2)[..., 1], q.t().contiguous().t(), pull, keep, EPS
        )
    expected = estimator.masked(estimator._rotate_back(grad, x, q, pull), keep)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found[8] == 0).all()
    assert _straight_through.rotate_back(*[x[:0]] * 3, None, keep[:0], EPS).shape == (0, 10)


# Moving averages


def codebook(heads=1, codes=30, dim=7, **settings):
    defaults = dict(
        decay=0.8, eps=1e-5, kmeans_init=False, kmeans_iters=1, threshold_ema_dead_code=0,
        use_cosine_sim=False, ema_update=True, learnable=False, sync=False,
    )
    return _codebook.Codebook(dim, codes, heads, **defaults | settings)


def averaged(book, call):
    """The buffers after `call`, by torch in float64, by torch and by the kernels."""
    found = []
    for dtype, backend in ((torch.float64, "cpu"), (torch.float32, "cpu"), (None, "triton")):
        other = copy.deepcopy(book)
        other = other if dtype is None else other.to(dtype)
        with tw.backend(backend), checked(AVERAGED):
            call(other)
        found.append([other.cluster_size, other.embed_avg, other.embed])
    return zip(*found, strict=True)


@pytest.mark.parametrize("enabled", [None, True, False])
@pytest.mark.parametrize("settings", [
    dict(), dict(heads=3, use_cosine_sim=True), dict(codes=1100, dim=3, decay=0.0),
    dict(dim=1500, codes=9, use_cosine_sim=True), dict(ema_update=False), dict(decay=1.0),
], ids=str)
def test_averages_are_torchs(settings, enabled):
    """Also where sums came from several processes, beside their counts in one tensor."""
    book = codebook(**settings)
    h, k, d = book.embed.shape
    counts, sums = torch.randint(0, 5, (h, k)), torch.randn(h, k, d)
    flag = None if enabled is None else torch.tensor(enabled)
    both = torch.cat([counts.float().unsqueeze(-1), sums], -1)
    for n, s in ((counts, sums), (both[..., 0], both[..., 1:])):
        for exact, eager, ours in averaged(
            book, lambda b, n=n, s=s: b.average(n, s, enabled=flag)
        ):
            error, theirs = ((x.double() - exact).abs().amax() for x in (ours, eager))
            assert error <= 2 * theirs + 1e-6 * exact.abs().amax()


@pytest.mark.parametrize("cosine", [False, True])
def test_codes_can_follow_later(cosine):
    book = codebook(heads=2, use_cosine_sim=cosine)
    book.cluster_size.uniform_(0, 3)
    for exact, _, ours in averaged(book, lambda b: b.refresh()):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


def test_nothing_changes_where_it_is_not_enabled():
    book = codebook(heads=2)
    before = copy.deepcopy(book.state_dict())
    with tw.backend("triton"):
        book.average(torch.ones(2, 30), torch.randn(2, 30, 7), enabled=torch.tensor(False))
    assert all(torch.equal(x, before[name]) for name, x in book.state_dict().items())


# Queues


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size, batches", [(50, (20, 20, 20)), (8, (5, 8, 30, 1)), (40, (0, 3))])
def test_queues_are_torchs(size, batches, dtype, ids):
    """Also where a batch goes over the end, and where it is longer than the queue."""
    theirs = tw.nn.ItcLoss(6, queue_size=size)
    ours = copy.deepcopy(theirs)
    for n in batches:
        image, text = torch.randn(n, 6).to(dtype), torch.randn(n, 12).to(dtype)[:, ::2]
        number = torch.randint(100, (n,)) if ids else None
        theirs._enqueue(image, text, number)
        with tw.backend("triton"), checked(ENQUEUED) as launches:
            ours._enqueue(image, text, number)
        assert len(launches) == (2 if n else 0)
        for name, x in ours.state_dict().items():
            assert torch.equal(x, theirs.state_dict()[name]), name
    assert ours.queue_pointer == sum(batches) % size


# What torch asks of operators


def operands():
    grad, x, q = (torch.randn(9, 5) for _ in range(3))
    keep, pull = torch.arange(9)[:, None] != 3, torch.tensor(0.5)
    size, embed = torch.rand(2, 4), torch.randn(2, 4, 5)
    counts, sums, flag = torch.randint(3, (2, 4)), torch.randn(2, 4, 5), torch.tensor(True)
    queue, ids, pointer = torch.randn(7, 5), torch.arange(7), torch.tensor(5)
    return {
        "rotate_back": [(grad, x, q, *rest, EPS) for rest in ((None, None), (pull, keep))],
        "moving_averages": [
            (size, embed.clone(), embed, *rest, 0.2, 1e-5, True, False, EPS)
            for rest in ((counts, sums, flag), (None, None, None))
        ],
        "enqueue": [
            (queue, queue.clone(), ids, pointer, x[:3], q[:3], *rest, NO_ID)
            for rest in ((ids[:3].clone(), 0, 3), (None, 1, 0))
        ],
        "matched_by_ids": [(x, queue, ids, torch.arange(16)), (x, None, ids, torch.arange(9))],
    }


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("name", operands())
def test_opcheck(name, number):
    operator = getattr(torch.ops.tilewise_triton, name).default
    torch.library.opcheck(operator, operands()[name][number])


@pytest.mark.parametrize("name", ["moving_averages", "enqueue"])
def test_autograd_sees_what_is_written(name):
    """A graph that saved a buffer must say so, and not use what stands there now."""
    operator = getattr(torch.ops.tilewise_triton, name).default
    arguments = operands()[name][0]
    writes = [a.alias_info is not None for a in operator._schema.arguments]
    before = [x._version for x, written in zip(arguments, writes, strict=True) if written]
    operator(*arguments)
    after = [x._version for x, written in zip(arguments, writes, strict=True) if written]
    assert len(before) > 2 and all(a > b for a, b in zip(after, before, strict=True))


def quantizer_step(module, x):
    quantized, index, loss = module(x)
    (grad,) = torch.autograd.grad(quantized.square().sum() + loss, x)
    return quantized, index, loss, grad, *module.state_dict().values()


def itc_step(module, x, ids=None):
    features = [x, x.flip(0), x.detach() * 2, x.detach() + 1]
    loss = module(*features, ids)
    grads = torch.autograd.grad(loss, [x, module.temperature])
    return loss, *grads, *module.state_dict().values()


MODULES = {
    "nn.VectorQuantizer": (lambda: tw.nn.VectorQuantizer(8, 20), quantizer_step),
    "nn.VectorQuantizer cosine": (
        lambda: tw.nn.VectorQuantizer(8, 20, use_cosine_sim=True, rotation_trick=True),
        quantizer_step,
    ),
    "nn.ItcLoss": (lambda: tw.nn.ItcLoss(8, queue_size=30), itc_step),
    "nn.ItcLoss ids": (  # and queues that are not of the features' dtype
        lambda: tw.nn.ItcLoss(8, queue_size=30).bfloat16(),
        lambda module, x: itc_step(module, x, torch.arange(24) % 9),
    ),
}


@pytest.mark.parametrize("name", MODULES)
@torch.enable_grad()
def test_a_graph_learns_what_the_module_learns(name):
    make, step = MODULES[name]
    module, x = make(), torch.randn(24, 8, requires_grad=True)
    with tw.backend("cpu"):
        expected = step(copy.deepcopy(module), x)
    with tw.backend("triton"):
        eager, compiled = copy.deepcopy(module), copy.deepcopy(module)
        graph = torch.compile(compiled, backend="aot_eager", fullgraph=True)
        results = step(eager, x), step(graph, x)
    for found in results:
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_inference_mode():
    """Buffers of a module that was made outside change, as torch's own operations change them."""
    for make, step in ((MODULES["nn.VectorQuantizer"][0], None), (MODULES["nn.ItcLoss"][0], 4)):
        module = make()
        before = copy.deepcopy(module.state_dict())
        with torch.inference_mode(), tw.backend("triton"):
            module(*[torch.randn(24, 8)] * (step or 1))
        changed = [not torch.equal(x, before[name]) for name, x in module.state_dict().items()]
        assert sum(changed) >= 3


def test_the_reference_has_no_kernel():
    with counted() as count, tw.backend("reference"):
        module = tw.nn.VectorQuantizer(8, 20)
        module._codebook.refresh()
    assert not count.triton
