"""GumbelQuantizer against the formula that multiplies one-hot vectors with the codebook."""

import copy

import pytest
import torch

import tilewise as tw
from tests.common.contrastive_cases import DEVICE
from tests.common.gumbel_cases import eager, quantizer, step
from tests.common.quantizer_cases import CLOSE, rows
from tilewise import _backend
from tilewise.nn.quantizers import _gumbel_codes


@pytest.fixture(params=[1 << 19, 100, 1], ids=["one tile", "3 rows", "1 row"])
def tiles(request, monkeypatch):
    for name in ("CPU_TILE", "GPU_TILE"):
        monkeypatch.setattr(_gumbel_codes, name, request.param)


def assert_same_step(module, x, values=CLOSE, **options):
    ours, our_gradients = step(module, module, x, **options)
    theirs, their_gradients = step(lambda x, **o: eager(module, x, **o), module, x, **options)
    assert torch.equal(ours[1], theirs[1])
    torch.testing.assert_close(ours[0], theirs[0], **values)
    torch.testing.assert_close(ours[2], theirs[2], **CLOSE)
    for a, b in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# The formula


@pytest.mark.parametrize("settings", [
    dict(), dict(kl_weight=0.0), dict(tau=0.2), dict(tau=0.7, learnable_tau=True), dict(tau=0.0),
], ids=str)
def test_hard_is_the_formula(settings, tiles):
    exact = dict(rtol=0, atol=0)
    assert_same_step(quantizer(**settings), rows(5, 7, 16), exact, seed=3, row_offset=11)


def test_ties_at_tau_0_have_no_gradient():
    """Logits so large that float32 swallows the noise: the one-hot vector is still constant."""
    module = tw.nn.GumbelQuantizer(4, 3, tau=0.0)
    torch.nn.init.constant_(module.proj.weight, 1e9)
    _, gradients = step(module, module, torch.ones(1, 2, 4))
    assert all(g.isfinite().all() for g in gradients) and (gradients[0] == 0).all()


@pytest.mark.parametrize("settings", [
    dict(), dict(kl_weight=0.0), dict(tau=0.7, learnable_tau=True),
], ids=str)
def test_soft_is_the_formula(settings, tiles):
    module = quantizer(straight_through=False, **settings)
    assert_same_step(module, rows(5, 7, 16), seed=3, row_offset=11)
    module.eval()  # hard in evaluation
    quantized, index, _ = module(rows(5, 7, 16))
    assert torch.equal(quantized, module.codebook[index])


@pytest.mark.parametrize("settings", [dict(), dict(tau=0.7, learnable_tau=True)], ids=str)
def test_evaluation_takes_the_most_likely_code(settings, tiles):
    module, x = quantizer(**settings).eval(), rows(5, 7, 16)
    assert_same_step(module, x)
    quantized, index, _ = module(x)
    assert torch.equal(index, module.proj(x).argmax(-1))
    state = torch.get_rng_state()
    again = module(x, seed=8)
    assert torch.equal(index, again[1]) and torch.equal(quantized, again[0])
    assert torch.equal(state, torch.get_rng_state())
    assert module(x[:, :0])[0].shape == (5, 0, 8)


def test_evaluation_draws_if_asked():
    module, x = quantizer(sample_in_eval=True), rows(5, 7, 16)
    trained = module(x, seed=8)
    for a, b in zip(module.eval()(x, seed=8), trained, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(module(x, seed=9)[1], trained[1])


@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_backends_agree(backend, straight_through):
    why_not = _backend.why_not(backend, torch.device(DEVICE))
    if why_not:
        pytest.skip(why_not)
    module, x = quantizer(straight_through=straight_through, learnable_tau=True), rows(3, 5, 16)
    results = []
    for name in (backend, "reference"):
        with tw.backend(name):
            results.append(step(module, module, x, seed=3, row_offset=2))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert torch.equal(results[0][0][1], results[1][0][1])


def test_draws_follow_the_default_generator():
    module, x = quantizer(), rows(9, 16)
    torch.manual_seed(4)
    first, second = module(x)[1], module(x)[1]
    torch.manual_seed(4)
    assert torch.equal(module(x)[1], first) and not torch.equal(first, second)


def test_codes_are_as_frequent_as_likely():
    module = quantizer(2, 5, 3)
    x = rows(1, 2).expand(20_000, 2)
    _, index, _ = module(x, seed=1)
    found = torch.bincount(index, minlength=5) / len(x)
    torch.testing.assert_close(found, module.proj(x[0]).softmax(-1).detach(), rtol=0, atol=0.015)


def test_processes_continue_each_other():
    """Ranks with one seed and their row offsets give what one process would."""
    module, x = quantizer(), rows(6, 7, 16)
    whole, whole_gradients = step(module, module, x, seed=5)
    parts = [
        module(part, seed=5, row_offset=14 * rank) for rank, part in enumerate(x.split(2))
    ]
    assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])
    assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
    torch.testing.assert_close(torch.stack([part[2] for part in parts]).mean(), whole[2])
    grad = rows(6, 7, 8, seed=9)
    total = sum((q * g).sum() for (q, *_), g in zip(parts, grad.split(2), strict=True))
    total = total + 1e3 * sum(part[2] for part in parts) / 3
    ours = torch.autograd.grad(total, module.parameters())
    torch.testing.assert_close(ours, whole_gradients[1:], rtol=1e-4, atol=1e-4)


# Layouts, masks, sizes


@pytest.mark.parametrize("settings, shape", [
    (dict(), (5, 16)), (dict(), (2, 3, 4, 16)), (dict(channel_last=False), (2, 16, 9)),
    (dict(accept_image_fmap=True), (2, 16, 5, 3)), (dict(accept_3d_fmap=True), (2, 16, 3, 2, 4)),
], ids=str)
def test_layouts(settings, shape):
    module, x = quantizer(**settings), rows(*shape)
    last = settings == {}
    expected, index, loss = eager(module, x if last else x.movedim(1, -1), seed=3)
    quantized, our_index, our_loss = module(x, seed=3)
    assert torch.equal(our_index, index)
    assert torch.equal(quantized, expected if last else expected.movedim(-1, 1))
    torch.testing.assert_close(our_loss, loss, **CLOSE)
    assert torch.equal(module.get_codes_from_indices(index), quantized)
    assert torch.equal(module.get_output_from_indices(index), quantized)
    assert (module.get_codes_from_indices(torch.full_like(index, -1)) == 0).all()


@pytest.mark.parametrize("settings", [dict(), dict(straight_through=False)], ids=str)
def test_masked_rows_have_no_part(settings):
    module = quantizer(**settings)
    x, mask = rows(3, 40, 16), rows(3, 40) > 0
    assert_same_step(module, x, seed=2, mask=mask)
    clean, clean_gradients = step(module, module, x, seed=2, mask=mask)
    x[~mask] = float("nan")  # padding may be anything
    padded, gradients = step(module, module, x, seed=2, mask=mask)
    assert (gradients[0][~mask] == 0).all()
    for a, b in zip((*clean, *clean_gradients), (*padded, *gradients), strict=True):
        assert torch.equal(a, b)


def test_lengths_are_masks():
    module, x = quantizer(), rows(3, 6, 16)
    lens = torch.tensor([6, 0, 2])
    by_lens = module(x, lens=lens, seed=1)
    by_mask = module(x, mask=torch.arange(6) < lens[:, None], seed=1)
    for a, b in zip(by_lens, by_mask, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("settings", [dict(), dict(straight_through=False)], ids=str)
def test_no_rows(settings):
    module = quantizer(**settings)
    (quantized, index, loss), gradients = step(module, module, rows(0, 4, 16))
    assert quantized.shape == (0, 4, 8) and index.shape == (0, 4) and loss == 0
    assert all((g == 0).all() for g in gradients)
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    (_, index, loss), _ = step(module, module, rows(2, 4, 16), mask=nothing)
    assert loss == 0 and (index == -1).all()


def test_codes_can_be_switched_off():
    module = quantizer()
    with torch.no_grad():
        module.proj.bias[3:] = -torch.inf
    (_, index, loss), gradients = step(module, module, rows(200, 16), seed=1)
    assert index.max() == 2 and loss.isfinite() and all(g.isfinite().all() for g in gradients)


def test_usage():
    module, x, mask = quantizer(), rows(3, 40, 16), rows(3, 40) > -1
    _, index, _, usage = module(x, mask=mask, return_usage=True)
    counts = torch.bincount(index[mask], minlength=32)
    p = counts[counts > 0] / counts.sum()
    assert isinstance(usage, tw.nn.CodeUsage) and torch.equal(usage.counts, counts)
    torch.testing.assert_close(usage.perplexity, (-(p * p.log()).sum()).exp())
    torch.testing.assert_close(usage.used, (counts > 0).float().mean())


# Precision


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype, straight_through, kl_weight):
    """Logits that are the same in every precision: what differs is the precision of the rest."""
    module = quantizer(straight_through=straight_through, kl_weight=kl_weight, tau=0.8)
    with torch.no_grad():
        module.proj.weight.copy_((16 * module.proj.weight).round() / 16)
        module.proj.bias.zero_()
    module.to(dtype)
    exact, x = copy.deepcopy(module).double(), rows(30, 16).round()
    (q, index, loss), gradients = step(module, module, x.to(dtype), seed=1)
    theirs, expected = step(lambda x, **o: eager(exact, x, **o), exact, x.double(), seed=1)
    assert q.dtype == dtype and loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert torch.equal(index, theirs[1])
    size = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-7  # the noise is float32
    torch.testing.assert_close(loss.double(), theirs[2], rtol=1e-5, atol=1e-6)
    for a, b in zip((q, *gradients), (theirs[0], *expected), strict=True):
        assert a.dtype == dtype
        scale = b.abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=4 * size, atol=4 * size * scale)


@pytest.mark.parametrize("straight_through", [True, False])
def test_autocast(straight_through):
    module = quantizer(straight_through=straight_through, tau=0.7, learnable_tau=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        (q, index, loss), gradients = step(module, module, rows(20, 16), seed=1)
    assert q.dtype == loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    if straight_through:
        assert torch.equal(q, module.codebook[index])


def test_divergence_is_accurate():
    """Against float64, no worse than the eager formula in float32."""
    for scale in (1e-3, 1.0, 30.0):
        logits = scale * rows(200, 1000)
        p = torch.softmax(logits.double(), -1)
        exact = (p * (torch.log_softmax(logits.double(), -1) + torch.tensor(1000.0).log())).sum(-1)
        q = torch.softmax(logits, -1)
        eagerly = (q * torch.log(q * 1000 + 1e-10)).sum(-1)
        tau, seed = torch.ones(()), torch.tensor(0)
        _, _, ours = torch.ops.tilewise.gumbel_codes(
            logits, rows(1000, 1), tau, seed, 0, "hard", True
        )
        error, allowed = (ours - exact).abs().max(), (eagerly - exact).abs().max()
        assert error <= allowed + 1e-6


# Gradients


@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("frozen", ["proj", "embed", "both"])
def test_only_what_was_asked_for_has_a_gradient(straight_through, frozen):
    module = quantizer(straight_through=straight_through)
    for name in ("proj", "embed"):
        getattr(module, name).requires_grad_(frozen not in (name, "both"))
    x = rows(10, 16).requires_grad_()
    quantized, _, loss = module(x, seed=1)
    quantized.sum().backward(retain_graph=True)
    assert x.grad.abs().sum() > 0
    assert (module.proj.weight.grad is None) == (frozen != "embed")
    assert (module.embed.weight.grad is None) == (frozen != "proj")
    x.grad = None
    module.zero_grad()
    loss.backward()
    assert x.grad.abs().sum() > 0 and module.embed.weight.grad is None
    assert not quantizer().requires_grad_(False)(x.detach())[2].requires_grad


def test_no_second_derivative():
    module, x = quantizer(), rows(10, 16).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)


def test_gradients_repeat():
    module, x = quantizer(), rows(500, 16)
    _, first = step(module, module, x, seed=1)
    _, second = step(module, module, x, seed=1)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_registration():
    logits, codebook, tau = rows(6, 5), rows(5, 3), torch.tensor(0.7)
    for kind in ("hard", "soft", "mode"):
        for differentiable in (True, False):
            inputs = [x.clone().requires_grad_(differentiable) for x in (logits, codebook, tau)]
            torch.library.opcheck(
                torch.ops.tilewise.gumbel_codes, (*inputs, torch.tensor(1), 0, kind, True)
            )
