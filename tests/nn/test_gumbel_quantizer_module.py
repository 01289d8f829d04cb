"""GumbelQuantizer as a module: taming's checkpoints, state, compilation, memory, messages."""

import copy
import importlib
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewise as tw
from tests.common.contrastive_cases import DEVICE
from tests.common.fresh import peak_bytes_each
from tests.common.gumbel_cases import quantizer, step
from tests.common.quantizer_cases import CLOSE, NoHostReads, rows
from tilewise import _backend

KERNEL = _backend.choose(torch.device(DEVICE)) != "reference"

# taming-transformers


class Published(nn.Module):
    """What taming's module computes, in its state dict's layout, in a few lines."""

    def __init__(self, num_hiddens, embedding_dim, n_embed, kl_weight=5e-4, temp_init=1.0):
        super().__init__()
        self.temperature, self.kl_weight, self.straight_through = temp_init, kl_weight, True
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embedding_dim)

    def forward(self, z):
        logits = self.proj(z)
        y = F.gumbel_softmax(logits, tau=self.temperature, dim=1, hard=True)
        p = torch.softmax(logits, 1)
        loss = self.kl_weight * (p * torch.log(p * p.shape[1] + 1e-10)).sum(1).mean()
        return torch.einsum("bnhw,nd->bdhw", y, self.embed.weight), loss, (None, None, y.argmax(1))


def published(kind):
    arguments = dict(kl_weight=0.3, temp_init=0.6)
    if kind == "formula":
        return Published(16, 8, 32, **arguments)
    module = importlib.import_module("taming.modules.vqvae.quantize")
    if not hasattr(module, "GumbelQuantize"):
        pytest.skip("this version of taming-transformers has no GumbelQuantize")
    return module.GumbelQuantize(16, 8, 32, **arguments)


@pytest.mark.parametrize("kind", ["formula", "taming"])
def test_is_tamings(kind, monkeypatch):
    if kind == "taming":
        pytest.importorskip("taming.modules.vqvae.quantize")
    theirs = published(kind)
    seeded = lambda *args, **kwargs: tw.gumbel_softmax(*args, seed=3, **kwargs)  # noqa: E731
    monkeypatch.setattr(F, "gumbel_softmax", seeded)
    x = rows(2, 16, 5, 7)
    their_x = x.clone().requires_grad_()
    quantized, loss, (_, _, index) = theirs(their_x)
    ((quantized * rows(2, 8, 5, 7, seed=9)).sum() + 1e3 * loss).backward()
    expected = [their_x.grad, *(p.grad for p in theirs.parameters())]

    by_state = tw.nn.GumbelQuantizer(16, 32, 8, kl_weight=0.3, tau=0.6, accept_image_fmap=True)
    by_state.load_state_dict(theirs.state_dict())
    for ours in (by_state, tw.nn.from_taming(theirs)):
        (q, i, l), gradients = step(ours, ours, x, seed=3)  # noqa: E741
        assert torch.equal(i, index) and torch.equal(q, quantized)
        torch.testing.assert_close(l, loss, **CLOSE)
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b.view(a.shape), rtol=1e-4, atol=1e-4)
    ours.eval(), theirs.eval()
    assert torch.equal(ours(x, seed=3)[1], theirs(x)[2][2])  # draws in evaluation, as theirs
    theirs.load_state_dict(tw.nn.to_taming(ours))


def test_from_a_state_dict_of_tamings():
    theirs = Published(16, 8, 32)
    state = {"quantize." + key: x for key, x in theirs.state_dict().items()}
    ours = tw.nn.from_taming(state, prefix="quantize.", kl_weight=1e-8, sample_in_eval=False)
    assert (ours.dim, ours.codebook_size, ours.codebook_dim) == (16, 32, 8)
    assert ours.kl_weight == 1e-8 and not ours.sample_in_eval and ours.straight_through
    assert torch.equal(ours.codebook, theirs.embed.weight) and ours.tau == 1
    with torch.no_grad():
        ours.proj.weight.zero_()
    assert theirs.proj.weight.abs().sum() > 0


# As a module


@pytest.mark.parametrize("settings", [
    dict(tau=tw.nn.CosineSchedule(steps=4)), dict(learnable_tau=True), dict(),
], ids=str)
def test_state_copies_and_pickles(settings):
    module, x = quantizer(**settings), rows(9, 16)
    if "tau" in settings:
        module.step()
    other = tw.nn.GumbelQuantizer(16, 32, 8, **settings)
    other.load_state_dict(module.state_dict())
    for copied in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for a, b in zip(module(x, seed=3), copied(x, seed=3), strict=True):
            assert torch.equal(a, b)
        assert copied.tau == module.tau
        if "tau" in settings:
            copied.step()
            assert copied.tau == torch.tensor(settings["tau"](2))


def test_half_precision_keeps_the_temperature():
    module = quantizer(tau=tw.nn.CosineSchedule()).half()
    assert module.proj.weight.dtype == module.codebook.dtype == torch.float16
    assert module.tau.dtype == torch.float32


def test_tau_of_the_call():
    module, x = quantizer(straight_through=False, tau=5.0), rows(9, 16)
    ours = module(x, tau=0.5, seed=1)[0]
    assert torch.equal(ours, quantizer(straight_through=False, tau=0.5)(x, seed=1)[0])
    tau = torch.tensor(0.5, requires_grad=True)
    module(x, tau=tau, seed=1)[0].sum().backward()
    assert tau.grad.abs() > 0


def test_no_host_reads():
    module, seed = quantizer(tau=tw.nn.CosineSchedule()), torch.tensor(3)
    with NoHostReads():
        step(module, module, rows(3, 9, 16), mask=rows(3, 9) > 0, seed=seed, return_usage=True)
        module.step()
        module.eval()(rows(3, 9, 16))


@pytest.mark.parametrize("settings", [
    dict(tau=tw.nn.CosineSchedule(steps=4)), dict(straight_through=False, learnable_tau=True),
    dict(accept_image_fmap=True, kl_weight=0.0),
], ids=str)
def test_compiles_into_one_graph(settings):
    torch._dynamo.reset()
    module = quantizer(**settings)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for size in (6, 5, 7):
        shape = (size, 16, 3, 3) if "accept_image_fmap" in settings else (size, 9, 16)
        seed = torch.tensor(size)
        ours = step(compiled, module, rows(*shape), seed=seed, row_offset=size)
        theirs = step(module, module, rows(*shape), seed=seed, row_offset=size)
        torch.testing.assert_close(ours, theirs, **CLOSE)
        if "tau" in settings:
            module.step()
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(rows(*shape)), module(rows(*shape)))


def test_trains():
    """Two codes learn to tell two clusters apart, and the codes to be where they are."""
    module = quantizer(2, 2, tau=tw.nn.ExponentialSchedule(1.0, 0.1, 0.02), kl_weight=1e-3)
    x = torch.cat([rows(50, 2) * 0.1 + 2, rows(50, 2, seed=1) * 0.1 - 2])
    optimiser = torch.optim.Adam(module.parameters(), lr=0.05)
    for seed in range(150):
        quantized, _, loss = module(x, seed=seed)
        optimiser.zero_grad()
        (F.mse_loss(quantized, x) + loss).backward()
        optimiser.step()
        module.step()
    assert F.mse_loss(module.eval()(x)[0], x) < 0.1


# Memory


@pytest.mark.parametrize("straight_through", [True, False])
def test_only_logits_are_kept_for_the_backward_pass(straight_through):
    module, x = quantizer(16, 512, straight_through=straight_through), rows(300, 16)
    kept = {}

    def pack(tensor):
        if tensor.numel() >= 300 * 512:
            kept[tensor.data_ptr()] = tensor.shape
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x, seed=1)
    assert list(kept.values()) == [(300, 512)]


def prepare(n, k, backward, device):
    module = tw.nn.GumbelQuantizer(16, k).to(device)
    step(module, module, torch.randn(64, 16, device=device))
    x = torch.randn(n, 16, device=device)
    return lambda: step(module, module, x) if backward else module(x)


@pytest.mark.alone
@pytest.mark.skipif(not KERNEL, reason="the reference stores noise")
def test_nothing_of_the_size_of_the_logits_is_made():
    n, k = 8192, 2048
    forward, both = peak_bytes_each(prepare, [
        dict(n=n, k=k, backward=backward, device=DEVICE) for backward in (False, True)
    ])
    logits = n * k * 4
    assert forward < 1.6 * logits  # they themselves, and work space
    assert both < 2.8 * logits  # and their gradient


# Messages


@pytest.mark.parametrize("settings, error, text", [
    (dict(codebook_size=0), ValueError, "codebook_size: expected at least 1, got 0"),
    (dict(tau=-0.5), ValueError, "tau: expected at least 0, got -0.5"),
    (dict(accept_image_fmap=True, accept_3d_fmap=True), ValueError, "accept_3d_fmap"),
    (dict(tau=tw.nn.CosineSchedule(), learnable_tau=True), ValueError, "expected False beside"),
    (dict(remap="used.npy"), TypeError, "remap"),
], ids=str)
def test_bad_arguments(settings, error, text):
    with pytest.raises(error, match=text):
        tw.nn.GumbelQuantizer(**{"dim": 16, "codebook_size": 32, **settings})


@pytest.mark.parametrize("arguments, error, text", [
    (dict(x=rows(2, 15)), ValueError, r"x: expected \(..., 16\), got \(2, 15\)"),
    (dict(x=rows(2, 16).long()), TypeError, "x: expected a floating point tensor"),
    (dict(mask=rows(2)), TypeError, "mask: expected a bool tensor"),
    (dict(mask=rows(3) > 0), ValueError, r"mask: expected \(2,\)"),
    (dict(tau=-1.0), ValueError, "tau: expected at least 0, got -1.0"),
    (dict(tau="1"), TypeError, "tau: expected a tensor or a float, got str"),
    (dict(tau=torch.ones(2)), ValueError, "tau: expected one real element"),
    (dict(seed=1.5), TypeError, "seed"),
    (dict(row_offset=0.5), TypeError, "row_offset"),
], ids=str)
def test_bad_input(arguments, error, text):
    with pytest.raises(error, match=text):
        quantizer()(**{"x": rows(2, 16), **arguments})
