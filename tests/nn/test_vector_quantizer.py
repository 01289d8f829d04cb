"""VectorQuantizer against lucidrains' module and against its own equations."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import tilewise as tw
from tests.common.contrastive_cases import DEVICE
from tests.common.fresh import peak_bytes_each
from tests.common.quantizer_cases import (
    CLOSE,
    HEADS,
    NoHostReads,
    assert_same_state,
    assert_same_step,
    assert_trains_alike,
    quantizer,
    rows,
    step,
)
from tilewise import _backend
from tilewise.nn.quantizers import _codebook, _sampling
from tilewise.nn.quantizers._sampling import systematic_sample

# Against lucidrains


@pytest.mark.parametrize("settings", [
    dict(),
    dict(rotation_trick=False, decay=0.5, eps=0.1),
    dict(use_cosine_sim=True),
    dict(use_cosine_sim=True, rotation_trick=False, decay=0.99, eps=1e-3),
    dict(HEADS, commitment_weight=0.25),
    dict(HEADS, separate_codebook_per_head=True),
    dict(heads=4, codebook_dim=4, use_cosine_sim=True, separate_codebook_per_head=True),
    dict(codebook_dim=5),
    dict(freeze_codebook=True),
    dict(threshold_ema_dead_code=1e-9),  # bookkeeping without replacements
], ids=str)
def test_training_equals_lucidrains(settings):
    peer = pytest.importorskip("vector_quantize_pytorch")
    ours = quantizer(**settings)
    theirs = peer.VectorQuantize(16, 32, **settings)
    x = assert_trains_alike(ours, theirs, steps=4)
    ours.eval(), theirs.eval()
    for a, b in zip(ours(x)[:2], theirs(x)[:2], strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("settings, shape", [
    (dict(accept_image_fmap=True), (2, 16, 5, 7)),
    (dict(accept_3d_fmap=True), (2, 16, 3, 2, 5)),
    (dict(channel_last=False), (2, 16, 9)),
    (dict(HEADS, accept_image_fmap=True), (2, 16, 3, 3)),
    (dict(), (5, 16)),
    (dict(HEADS), (5, 16)),
], ids=str)
def test_layouts_are_lucidrains(settings, shape):
    peer = pytest.importorskip("vector_quantize_pytorch")
    ours = quantizer(**settings)
    theirs = peer.VectorQuantize(16, 32, **settings)
    theirs.load_state_dict(ours.state_dict())
    assert_same_step(ours, theirs, rows(*shape))


@pytest.mark.parametrize("keep", [True, False])
def test_masks_are_lucidrains(keep):
    peer = pytest.importorskip("vector_quantize_pytorch")
    settings = dict(return_zeros_for_masked_padding=keep, rotation_trick=False)
    ours, theirs = quantizer(**settings), peer.VectorQuantize(16, 32, **settings)
    theirs.load_state_dict(ours.state_dict())
    x, lens = rows(4, 50, 16), torch.tensor([50, 3, 0, 20])
    assert_same_step(ours, theirs, x, lens=lens)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("cosine", [False, True])
def test_kmeans_equals_lucidrains(cosine, monkeypatch):
    peer = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")
    x, start = rows(200, 16), rows(1, 12, 16, seed=1)
    if cosine:
        x, start = F.normalize(x, dim=-1), F.normalize(start, dim=-1)
    sample = _sampling.Sample(start, torch.ones(1, 12, 1, dtype=torch.bool), torch.tensor([200]))
    monkeypatch.setattr(_codebook, "sample_rows", lambda *_, **__: [sample])
    ours = quantizer(codebook_size=12, kmeans_init=True, kmeans_iters=5, use_cosine_sim=cosine)
    ours._codebook.initialise(x, None)
    means, bins = peer.kmeans(x[None], 12, 5, cosine, sample_fn=lambda *_: start)
    assert torch.equal(ours._codebook.cluster_size, bins.clamp(min=1).float())
    torch.testing.assert_close(ours._codebook.embed, means, rtol=1e-4, atol=1e-5)
    sums = means * bins.clamp(min=1).unsqueeze(-1)
    torch.testing.assert_close(ours._codebook.embed_avg, sums, rtol=1e-4, atol=1e-4)


# Gradients


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_follow_the_equations(rotate, dtype):
    module = quantizer(
        learnable_codebook=True, rotation_trick=rotate, commitment_weight=0.3, codebook_weight=2.0
    )
    x = rows(40, 16).to(dtype)
    (q, index, loss), grad_x = step(module, x)
    assert q.dtype == dtype and loss.dtype == torch.float32

    leaf = x.double().requires_grad_()
    codes = module.codebook.detach().double().requires_grad_()
    chosen = codes[index]
    turned = _turn(leaf, chosen) if rotate else leaf + (chosen - leaf).detach()
    expected = 0.3 * F.mse_loss(leaf, chosen.detach()) + 2.0 * F.mse_loss(chosen, leaf.detach())
    ((turned * rows(40, 16, seed=9)).sum() + 3.0 * expected).backward()
    tolerance = dict(rtol=0.02, atol=0.02) if dtype == torch.bfloat16 else CLOSE
    torch.testing.assert_close(q.double(), turned, **tolerance)
    torch.testing.assert_close(loss.double(), expected, **CLOSE)
    torch.testing.assert_close(grad_x.double(), leaf.grad, **tolerance)
    torch.testing.assert_close(module._codebook.embed.grad[0].double(), codes.grad, **tolerance)


def _turn(x, q):
    """The rotation that turns each row into its code, as a matrix, constant in x."""
    with torch.no_grad():
        a, b = (F.normalize(v, dim=-1).unsqueeze(-1) for v in (x, q))  # (N, D, 1)
        w = F.normalize(a + b, dim=1)
        matrix = torch.eye(x.shape[-1]).to(x) - 2 * w @ w.mT + 2 * b @ a.mT
        matrix = matrix * (q.norm(dim=-1) / x.norm(dim=-1))[:, None, None]
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def test_only_what_was_asked_for_has_a_gradient():
    module = quantizer()
    x = rows(10, 16).requires_grad_()
    module(x)[2].backward()  # the loss alone
    assert x.grad.abs().sum() > 0
    x.grad = None
    module(x)[0].sum().backward()  # quantized alone
    assert x.grad.abs().sum() > 0
    assert not module(x.detach())[2].requires_grad
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(module(x)[2], x, create_graph=True)


# Masks, layouts, sizes


@pytest.mark.parametrize("settings", [
    dict(), dict(use_cosine_sim=True), dict(HEADS, separate_codebook_per_head=True),
    dict(codebook_dim=6, threshold_ema_dead_code=0.5), dict(kmeans_init=True, kmeans_iters=2),
], ids=str)
def test_masked_rows_have_no_part(settings):
    ours, alone = quantizer(**settings), quantizer(**settings)
    x, mask = rows(3, 40, 16), rows(3, 40) > 0
    x[~mask] = float("nan")
    torch.manual_seed(1)
    (q, index, loss), grad = step(ours, x, mask=mask)
    torch.manual_seed(1)
    q_alone, index_alone, loss_alone = alone(x[mask])
    assert torch.equal(index[mask], index_alone) and (index[~mask] == -1).all()
    torch.testing.assert_close(q[mask], q_alone)
    torch.testing.assert_close(loss, loss_alone)
    assert (q[~mask] == 0).all() and (grad[~mask] == 0).all()
    assert_same_state(ours, alone)


@pytest.mark.parametrize("settings", [dict(), dict(HEADS), dict(use_cosine_sim=True)], ids=str)
def test_no_rows(settings):
    module = quantizer(threshold_ema_dead_code=2, **settings)
    before = module.codebook.clone()
    (q, index, loss), _ = step(module, rows(0, 4, 16))
    assert q.shape == (0, 4, 16) and index.shape[:2] == (0, 4) and loss == 0
    (_, index, loss), _ = step(module, rows(2, 4, 16), mask=torch.zeros(2, 4, dtype=torch.bool))
    assert loss == 0 and (index == -1).all()
    torch.testing.assert_close(module.codebook, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings, shape", [
    (dict(), (2, 9, 16)), (dict(HEADS), (2, 9, 16)), (dict(codebook_dim=3), (2, 9, 16)),
    (dict(HEADS, separate_codebook_per_head=True, accept_image_fmap=True), (2, 16, 3, 4)),
    (dict(codebook_dim=3, channel_last=False, use_cosine_sim=True), (2, 16, 7)),
], ids=str)
def test_output_from_indices(settings, shape):
    module = quantizer(**settings).eval()
    q, index, _ = module(rows(*shape))
    torch.testing.assert_close(module.get_output_from_indices(index), q)
    codes = module.get_codes_from_indices(index)
    if not module.has_projections:
        assert torch.equal(codes, q)
    nothing = torch.full_like(index, -1)
    assert (module.get_codes_from_indices(nothing) == 0).all()


# Learning


def test_dead_codes_become_rows_of_the_batch():
    module = quantizer(threshold_ema_dead_code=2.0, decay=0.5)
    book, x = module._codebook, rows(200, 16)
    book.cluster_size.fill_(100.0)
    book.cluster_size[0, ::3] = 0.0
    book.embed[0, ::3] = 50.0  # far from every row
    book.embed_avg.copy_(book.embed * book.cluster_size.unsqueeze(-1))
    module(x)
    revived = module.codebook[::3]
    match = (revived[:, None] == x).all(-1)  # (dead, N)
    assert (match.sum(1) == 1).all() and (match.sum(0) <= 1).all()
    assert (book.cluster_size[0, ::3] == 2).all()
    torch.testing.assert_close(book.embed_avg[0, ::3], 2 * revived)
    assert not (module.codebook[1::3, None] == x).all(-1).any()


@pytest.mark.parametrize("total", [0, 1, 5, 12, 13, 1000])
@pytest.mark.parametrize("repeat", [False, True])
def test_systematic_sample(total, repeat):
    wanted = rows(2, 24) > 0
    totals = torch.full((2, 1), total)
    seen = set()
    for seed in range(50):
        torch.manual_seed(seed)
        place = systematic_sample(wanted, totals, torch.randint(2**62, (2, 2, 1)), repeat)
        assert (place[~wanted] == -1).all() and (place < max(total, 1)).all()
        for head in range(2):
            chosen = place[head][place[head] >= 0].tolist()
            number = int(wanted[head].sum())
            assert len(chosen) == (number * (total > 0) if repeat else min(number, total))
            assert len(set(chosen)) == min(number, total)
            seen |= set(chosen)
    assert len(seen) >= 0.6 * total


@pytest.mark.parametrize("settings", [dict(), dict(HEADS, separate_codebook_per_head=True)],
                         ids=str)
def test_kmeans_starts_near_the_data(settings):
    module = quantizer(kmeans_init=True, **settings)
    x = rows(400, 16) + 7
    x[3] = float("inf")
    first = module(x)[2]
    fitted = module.eval()(x[4:])[2]
    assert first.isinf() and fitted < 0.75  # mean squared deviation in the data is 1
    assert module._codebook.initted
    codes = module.codebook.clone()
    assert codes.isfinite().all()
    again = quantizer(kmeans_init=True, **settings)
    again.load_state_dict(module.state_dict())
    again(x[4:])  # no second k-means
    assert (again.codebook - codes).abs().max() < 1.5
    few = quantizer(kmeans_init=True)
    few(rows(5, 16))
    assert few.codebook.isfinite().all()


def test_bad_rows_do_not_stay():
    clean, module = quantizer(threshold_ema_dead_code=1), quantizer(threshold_ema_dead_code=1)
    x = rows(50, 16)
    bad = torch.cat([x, torch.full((2, 16), float("nan")), torch.full((1, 16), float("inf"))])
    torch.manual_seed(1)
    loss = module(bad)[2]
    torch.manual_seed(1)
    clean(x)
    assert not loss.isfinite()  # the loss tells
    assert_same_state(module, clean)


def test_evaluation_and_freezing_change_nothing():
    module = quantizer(threshold_ema_dead_code=5, kmeans_init=True)
    before = copy.deepcopy(module.state_dict())
    module.eval()(rows(40, 16))
    module.train()(rows(40, 16), freeze_codebook=True)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


def test_usage():
    module = quantizer(**HEADS, separate_codebook_per_head=True)
    x, mask = rows(3, 40, 16), rows(3, 40) > -1
    _, index, _, usage = module(x, mask=mask, return_usage=True)
    evaluated = copy.deepcopy(module).eval()
    _, index_2, _, usage_2 = evaluated(x, mask=mask, return_usage=True)
    for index, usage in ((index, usage), (index_2, usage_2)):  # noqa: B020
        for head in range(2):
            counts = torch.bincount(index[mask][:, head], minlength=32)
            p = counts[counts > 0] / counts.sum()
            assert torch.equal(usage.counts[head], counts)
            torch.testing.assert_close(usage.perplexity[head], (-(p * p.log()).sum()).exp())
            torch.testing.assert_close(usage.used[head], (counts > 0).float().mean())
    one = quantizer()(x, return_usage=True)[3]
    assert one.counts.shape == (32,) and one.perplexity.shape == one.used.shape == ()


# As a module


def test_copies_and_pickles():
    module = quantizer(kmeans_init=True, use_cosine_sim=True)
    module(rows(60, 16))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_state(module, other, rtol=0, atol=0)
        assert torch.equal(module.eval()(rows(9, 16))[1], other.eval()(rows(9, 16))[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("learnable", [False, True])
def test_half_precision_keeps_the_codes(dtype, learnable):
    module = quantizer(codebook_dim=8, learnable_codebook=learnable).to(dtype)
    assert module._codebook.embed.dtype == module._codebook.cluster_size.dtype == torch.float32
    assert module.project_in.weight.dtype == dtype
    (q, _, loss), grad = step(module, rows(20, 16).to(dtype))
    assert q.dtype == grad.dtype == dtype and loss.dtype == torch.float32
    assert module.double().codebook.dtype == torch.float64


@pytest.mark.parametrize("settings", [
    dict(kmeans_init=True, threshold_ema_dead_code=2),
    dict(HEADS, separate_codebook_per_head=True, use_cosine_sim=True, threshold_ema_dead_code=2),
], ids=str)
def test_no_host_reads(settings):
    module = quantizer(**settings)
    for read in (lambda: bool(torch.ones(())), lambda: torch.ones(3)[torch.ones(3) > 0]):
        with pytest.raises(AssertionError), NoHostReads():
            read()
    if settings.get("kmeans_init"):  # two steps look whether it is over
        step(module, rows(3, 40, 16)), step(module, rows(3, 40, 16))
    with NoHostReads():
        for _ in range(2):
            step(module, rows(3, 40, 16), mask=rows(3, 40) > 0, return_usage=True)
        module.eval()(rows(3, 40, 16), return_usage=True)
    with NoHostReads():  # k-means itself
        module._codebook.initialise(rows(30, module.codebook_dim), rows(30) > 0)


@pytest.mark.parametrize("settings", [
    dict(threshold_ema_dead_code=2, return_zeros_for_masked_padding=False),
    dict(HEADS, kmeans_init=True, kmeans_iters=2, use_cosine_sim=True),
    dict(learnable_codebook=True, rotation_trick=False, accept_image_fmap=True),
], ids=str)
def test_compiles_into_one_graph(settings):
    torch._dynamo.reset()
    eager, module = quantizer(**settings), quantizer(**settings)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for number, size in enumerate((6, 6, 5)):
        shape = (size, 16, 3, 3) if "accept_image_fmap" in settings else (size, 9, 16)
        x, results = rows(*shape, seed=size), []
        if settings.get("kmeans_init") and number == 0:
            x *= torch.inf  # k-means waits, in the graph too
        for one in (eager, compiled):
            torch.manual_seed(size)
            results.append(step(one, x))
        (ours, grad), (theirs, their_grad) = results
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        torch.testing.assert_close(grad, their_grad, equal_nan=True)
        assert_same_state(module, eager)
    assert not module._codebook.needs_init
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), eager.eval()(x))


def prepare_step(n, k, device):
    module = tw.nn.VectorQuantizer(32, k, threshold_ema_dead_code=2).to(device)
    step(module, torch.randn(64, 32, device=device))
    x = torch.randn(n, 32, device=device)
    return lambda: step(module, x)


@pytest.mark.alone
@pytest.mark.skipif(_backend.choose(torch.device(DEVICE)) == "reference", reason="no kernel")
def test_memory_grows_with_rows_not_with_rows_times_codes():
    small, large = peak_bytes_each(prepare_step, [
        dict(n=n, k=2048, device=DEVICE) for n in (4096, 32768)
    ])
    # The step's own tensors take 5 times 32 floats a row; the matrix would take 2048.
    assert large - small < 12 * (32768 - 4096) * 32 * 4


@pytest.mark.parametrize("arguments, error, text", [
    (dict(codebook_size=0), ValueError, "codebook_size: expected at least 1, got 0"),
    (dict(ema_update=True, learnable_codebook=True), ValueError, "ema_update"),
    (dict(accept_image_fmap=True, accept_3d_fmap=True), ValueError, "accept_3d_fmap"),
])
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        quantizer(**arguments)


@pytest.mark.parametrize("settings, call, error, text", [
    (dict(), lambda m: m(rows(2, 15)), ValueError, r"x: expected \(..., 16\), got \(2, 15\)"),
    (dict(accept_image_fmap=True), lambda m: m(rows(2, 16, 4)), ValueError, "4 dimensions"),
    (dict(), lambda m: m(rows(2, 16).long()), TypeError, "x: expected a floating point tensor"),
    (dict(), lambda m: m(rows(2, 16), mask=rows(2)), TypeError, "mask: expected a bool tensor"),
    (dict(), lambda m: m(rows(2, 16), mask=rows(3) > 0), ValueError, r"mask: expected \(2,\)"),
    (dict(), lambda m: m(rows(2, 16), lens=torch.ones(2)), ValueError, "lens: expected one length"),
    (dict(), lambda m: m(rows(1, 2, 16), lens=[2]), TypeError, "lens: expected a tensor"),
    (HEADS, lambda m: m.get_codes_from_indices(torch.zeros(3, 5).long()), ValueError, "indices"),
])
def test_bad_input(settings, call, error, text):
    with pytest.raises(error, match=text):
        call(quantizer(**settings))
