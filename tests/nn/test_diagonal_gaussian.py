"""DiagonalGaussian against diffusers' DiagonalGaussianDistribution."""

import copy
import importlib
import math
import pickle

import pytest
import torch

import tilewise as tw
from tests.common.contrastive_cases import DEVICE
from tests.common.peers import need
from tests.common.quantizer_cases import CLOSE, NoHostReads, rows
from tilewise.receptive_field.__main__ import import_torchvision

RANGE = (-30.0, 20.0)


def parameters(*shape, seed=0):
    """Means near 0, and variances of all sizes: some logarithms lie outside the range."""
    x = rows(*(shape or (3, 8, 4, 5)), seed=seed)
    x[:, x.shape[1] // 2 :] *= 3
    if not shape:
        x[0, -1, 0, :2] = torch.tensor([-50.0, 10.0])
        x[1, -1, 1, :2] = torch.tensor([-29.0, -31.0])
    return x


def theirs(x, **settings):
    need("diffusers", "torchvision")
    import_torchvision()  # which diffusers needs
    vae = importlib.import_module("diffusers.models.autoencoders.vae")
    return vae.DiagonalGaussianDistribution(x, **settings)


# Against diffusers


def test_attributes_are_diffusers():
    x = parameters()
    ours, other = tw.nn.DiagonalGaussian(x), theirs(x)
    for name in ("parameters", "mean", "logvar", "deterministic"):
        a, b = getattr(ours, name), getattr(other, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    torch.testing.assert_close(ours.std, other.std)
    torch.testing.assert_close(ours.var, other.var)
    assert torch.equal(ours.mode(), other.mode())


@pytest.mark.parametrize("function", [
    lambda p, q, z: p.kl(),
    lambda p, q, z: p.kl(q),
    lambda p, q, z: q.kl(p),
    lambda p, q, z: p.nll(z),
    lambda p, q, z: p.nll(z, dims=[1]),
    lambda p, q, z: p.nll(z, [2, 3]),
    lambda p, q, z: p.std + p.var.log() + p.logvar + p.mode(),
], ids=["kl", "kl of two", "kl of two, the other way", "nll", "nll over channels",
        "nll over pixels", "std and var"])
def test_values_and_gradients_are_diffusers(function):
    results = []
    for make in (tw.nn.DiagonalGaussian, theirs):
        inputs = [
            x.double().requires_grad_()
            for x in (parameters(), parameters(seed=1), rows(3, 4, 4, 5, seed=2))
        ]
        x, y, z = inputs
        value = function(make(x), make(y), z)
        weight = rows(*value.shape, seed=3).double()
        gradients = torch.autograd.grad((value * weight).sum(), inputs, allow_unused=True)
        results.append((value, *(torch.zeros(()) if g is None else g for g in gradients)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-9, atol=1e-9)


def test_deterministic_is_diffusers():
    x = parameters()
    ours, other = (make(x, deterministic=True) for make in (tw.nn.DiagonalGaussian, theirs))
    for a, b in (
        (ours.sample(), other.sample()), (ours.kl(), other.kl()), (ours.std, other.std),
        (ours.var, other.var), (ours.nll(ours.mean), other.nll(other.mean)),
        (ours.kl(ours), other.kl(other)),
    ):
        assert torch.equal(a, b)
    assert (tw.nn.DiagonalGaussian(x).kl(ours) == math.inf).all()


def test_samples_have_diffusers_law():
    x = torch.tensor([0.5, -1.0, 2.0, 0.3, -2.0, -40.0]).view(1, 6, 1, 1).expand(1, 6, 100, 500)
    z = tw.nn.DiagonalGaussian(x).sample(seed=0)
    other = theirs(x)
    error = (z.mean((0, 2, 3)) - other.mean[0, :, 0, 0]).abs() / other.std[0, :, 0, 0]
    assert (error < 4 / 50_000**0.5 + 1e-3).all()
    torch.testing.assert_close(z.std((0, 2, 3))[:2], other.std[0, :2, 0, 0], rtol=0.02, atol=0)


# The pass that samples


def test_sample_and_divergence_are_the_functions():
    x = parameters()
    posterior = tw.nn.DiagonalGaussian(x)
    mean, logvar = x.chunk(2, dim=1)
    z, kl = tw.gaussian_sample(mean, logvar, 5, 7, logvar_range=RANGE)
    assert torch.equal(posterior.sample(seed=5, row_offset=7), z)
    assert torch.equal(posterior.kl(), kl)


@pytest.mark.parametrize("order", ["sample, kl", "kl, sample", "sample without gradient, kl"])
def test_gradients_of_sample_and_divergence(order):
    x, weight = parameters(), rows(3, 4, 4, 5, seed=4)
    ours, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    posterior = tw.nn.DiagonalGaussian(ours)
    mean, logvar = expected.chunk(2, dim=1)
    z, kl = tw.gaussian_sample(mean, logvar, 5, logvar_range=RANGE)
    if order == "sample, kl":
        total = (posterior.sample(seed=5) * weight).sum() + posterior.kl().sum()
        ((z * weight).sum() + kl.sum()).backward()
    elif order == "kl, sample":
        total = posterior.kl().sum() + (posterior.sample(seed=5) * weight).sum()
        ((z * weight).sum() + kl.sum()).backward()
    else:
        with torch.no_grad():
            posterior.sample(seed=5)
            posterior.kl()
        total = posterior.kl().sum()
        kl.sum().backward()
    total.backward()
    torch.testing.assert_close(ours.grad, expected.grad, **CLOSE)


def test_divergence_costs_nothing_after_a_sample(monkeypatch):
    calls = []
    module = tw.nn.sampling.diagonal_gaussian

    def counted(*args, **options):
        calls.append(args)
        return tw.gaussian_sample(*args, **options)

    monkeypatch.setattr(module, "gaussian_sample", counted)
    posterior = tw.nn.DiagonalGaussian(parameters().requires_grad_())
    posterior.sample(), posterior.kl(), posterior.kl()
    assert len(calls) == 1


def test_divergence_draws_nothing_and_is_not_shared():
    posterior = tw.nn.DiagonalGaussian(parameters())
    state = torch.get_rng_state()
    kl = posterior.kl()
    assert torch.equal(state, torch.get_rng_state())
    expected = kl.clone()
    kl.zero_()
    assert torch.equal(posterior.kl(), expected)


def test_moments_can_be_assigned():
    mean, var = rows(3, 4, 4, 5, seed=1).requires_grad_(), rows(3, 4, 4, 5, seed=2).exp()
    expected = tw.nn.DiagonalGaussian(torch.cat([mean, var.log()], dim=1))
    for name, value in (("logvar", var.log()), ("std", var.sqrt()), ("var", var)):
        ours = tw.nn.DiagonalGaussian(parameters())
        ours.sample()  # its divergence is that of the old moments
        ours.mean = mean
        setattr(ours, name, value)
        for attribute in ("mean", "logvar", "std", "var"):
            torch.testing.assert_close(getattr(ours, attribute), getattr(expected, attribute))
        torch.testing.assert_close(ours.kl(), expected.kl(), **CLOSE)
        torch.testing.assert_close(ours.sample(seed=1), expected.sample(seed=1), **CLOSE)
        torch.testing.assert_close(
            torch.autograd.grad(ours.kl().sum(), mean)[0], mean.detach(), **CLOSE
        )


# Seeds


def test_generators():
    x = parameters()
    posterior = tw.nn.DiagonalGaussian(x)

    def draw(*seeds):
        return [torch.Generator(DEVICE).manual_seed(seed) for seed in seeds]

    one, = draw(1)
    first, second = posterior.sample(one), posterior.sample(generator=one)
    assert not torch.equal(first, second)
    assert torch.equal(posterior.sample(*draw(1)), first)
    assert torch.equal(posterior.sample(draw(1)), first)

    each = posterior.sample(draw(1, 2, 3))  # a row has its own, whatever the batch
    torch.testing.assert_close(posterior.kl(), tw.nn.DiagonalGaussian(x).kl())
    for i in range(3):
        alone = tw.nn.DiagonalGaussian(x[i : i + 1]).sample(*draw(i + 1))
        assert torch.equal(each[i : i + 1], alone)

    torch.manual_seed(3)
    first, second = posterior.sample(), posterior.sample()
    torch.manual_seed(3)
    assert torch.equal(posterior.sample(), first) and not torch.equal(first, second)


def test_processes_continue_each_other():
    x = parameters()
    whole = tw.nn.DiagonalGaussian(x).sample(seed=3)
    parts = [
        tw.nn.DiagonalGaussian(x[i : i + 1]).sample(seed=3, row_offset=i) for i in range(3)
    ]
    assert torch.equal(torch.cat(parts), whole)


# Shapes and dtypes


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 9), (2, 6, 3, 4), (2, 6, 3, 2, 4), (0, 6, 3, 3)])
def test_shapes(shape):
    x = parameters(*shape)
    posterior, other = tw.nn.DiagonalGaussian(x), tw.nn.DiagonalGaussian(x.flip(0))
    assert posterior.sample().shape == (shape[0], 3, *shape[2:])
    for value in (posterior.kl(), posterior.kl(other), posterior.nll(posterior.mean)):
        assert value.shape == shape[:1]
    dims = list(range(1, len(shape)))
    wide = x.double()
    mean, logvar = wide.chunk(2, dim=1)
    exact = (mean.square() + logvar.clamp(*RANGE).exp() - 1 - logvar.clamp(*RANGE)).sum(dims) / 2
    torch.testing.assert_close(posterior.kl().double(), exact, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    x = parameters().to(dtype)
    x[0, -1, 0, 1] = 18  # its variance is beyond float16
    posterior, other = tw.nn.DiagonalGaussian(x), tw.nn.DiagonalGaussian(x.flip(0))
    exact, exact_other = (tw.nn.DiagonalGaussian(y.double()) for y in (x, x.flip(0)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z = posterior.sample()
    assert z.dtype == posterior.std.dtype == dtype and z.isfinite().all()
    for value, expected in (
        (posterior.kl(), exact.kl()),
        (posterior.kl(other), exact.kl(exact_other)),
        (posterior.nll(z), exact.nll(z.double())),
    ):
        assert value.dtype == wide
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_divergence_from_itself_and_the_standard():
    posterior = tw.nn.DiagonalGaussian(parameters())
    assert (posterior.kl(posterior) == 0).all()
    assert (tw.nn.DiagonalGaussian(torch.zeros(2, 4, 3, 3)).kl() == 0).all()
    tiny = tw.nn.DiagonalGaussian(torch.full((1, 2, 1, 1), 1e-6).double()).kl()
    torch.testing.assert_close(tiny, torch.full((1,), 0.75e-12).double(), rtol=1e-4, atol=0)


# In programs


def test_copies_and_pickles():
    posterior = tw.nn.DiagonalGaussian(parameters())
    posterior.sample(seed=1)
    for other in (copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior))):
        assert torch.equal(other.kl(), posterior.kl())
        assert torch.equal(other.sample(seed=2), posterior.sample(seed=2))


def test_no_host_reads():
    with NoHostReads():
        posterior = tw.nn.DiagonalGaussian(parameters(2, 4, 3, 3))
        posterior.sample(), posterior.kl(), posterior.kl(posterior), posterior.nll(posterior.mean)


def test_compiles_into_one_graph():
    torch._dynamo.reset()

    def loss(x, seed):
        posterior = tw.nn.DiagonalGaussian(x)
        z = posterior.sample(seed=seed)
        return z.square().sum() + posterior.kl().sum() + posterior.nll(z.detach()).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for size in (3, 4, 5):
        results = []
        for function in (compiled, loss):
            x = parameters(size, 8, 4, 5).clamp(-2, 2).requires_grad_()
            value = function(x, torch.tensor(size))
            results.append((value, *torch.autograd.grad(value, x)))
        torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("call, error, text", [
    (lambda d: tw.nn.DiagonalGaussian(rows(2, 3)), ValueError,
     r"parameters: expected \(B, 2 \* C, ...\), an even number of channels, got \(2, 3\)"),
    (lambda d: tw.nn.DiagonalGaussian(rows(4)), ValueError, "parameters: expected"),
    (lambda d: tw.nn.DiagonalGaussian(rows(2, 4).long()), TypeError, "parameters: expected a fl"),
    (lambda d: tw.nn.DiagonalGaussian([1.0]), TypeError, "parameters: .* got list"),
    (lambda d: d.sample(torch.Generator(DEVICE), seed=1), ValueError,
     "seed: expected either generator or seed, got both"),
    (lambda d: d.sample([torch.Generator(DEVICE)] * 2), ValueError,
     "generator: expected one or 3, got 2"),
    (lambda d: d.sample(seed=0.5), TypeError, "seed"),
])
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call(tw.nn.DiagonalGaussian(parameters()))
