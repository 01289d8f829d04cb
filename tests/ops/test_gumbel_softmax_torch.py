"""tilewise.gumbel_softmax within torch: what torch tests of its own, autograd, tracing, errors."""

import pytest
import torch

import tilewise as tw
from tests.common import random_cases as cases
from tests.common.compilers import compilers, once
from tests.common.random_cases import KERNELS, NAN, backends, kernels, masked, normal

backend = pytest.fixture(cases.serve)


@backends
@pytest.mark.parametrize("shape, dim, ones", [
    ((5,), 0, 1), ((5,), -1, 1), ((5, 4), 0, 4), ((5, 4), 1, 5), ((5, 4, 3), 1, 15),
    ((5, 4, 3), -1, 20), ((2, 3, 1, 2), 2, 12),
])
def test_shapes_of_one_hot_samples(backend, shape, dim, ones):
    """As torch requires: the shape stays, nothing is negative, each slice holds a single 1."""
    y = tw.gumbel_softmax(normal(*shape).float(), hard=True, dim=dim)
    assert y.shape == shape and y.min() >= 0
    assert (y == 1).sum() == ones and (y == 0).sum() == y.numel() - ones
    assert (y.sum(dim) == 1).all()


@cases.exact_backends
def test_straight_through_frequencies(backend):
    """As torch requires: one-hot samples follow the softmax, to three standard deviations."""
    logits = torch.tensor([0.3, -1.0, 0.9, 0.1]).requires_grad_()
    probabilities = logits.detach().softmax(-1)
    torch.manual_seed(0)
    draws = 100
    counts = sum(tw.gumbel_softmax(logits, hard=True).detach() for _ in range(draws))
    deviation = (draws * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - draws * probabilities) / deviation).abs().max() < 3


@pytest.mark.parametrize("backend, dtype", [
    *((backend, torch.float32) for backend in cases.BACKENDS),
    *((backend, torch.float64) for backend in cases.EXACT),
], indirect=["backend"], ids=str)
def test_soft_and_hard_have_the_same_gradient(backend, dtype):
    """As torch requires: for one state of the generator, to two roundings."""
    gradients = []
    for hard in (False, True):
        logits = torch.zeros(6, 10, dtype=dtype, requires_grad=True)
        torch.manual_seed(11)
        tw.gumbel_softmax(logits, hard=hard).sum().backward()
        gradients.append(logits.grad)
    assert (gradients[0] - gradients[1]).abs().max() <= 2 * torch.finfo(dtype).eps


@cases.exact_backends
@pytest.mark.parametrize("dim", [0, 1])
def test_gradcheck(backend, dim):
    def sample(x, tau):
        return tw.gumbel_softmax(x, tau, dim=dim, seed=5)

    inputs = normal(3, 4).requires_grad_(), torch.tensor(0.7, dtype=torch.float64,
                                                         requires_grad=True)
    assert torch.autograd.gradcheck(sample, inputs)
    assert torch.autograd.gradgradcheck(sample, inputs)


@cases.exact_backends
def test_gradgradcheck_of_the_one_hot_sample(backend):
    """Its gradient, the relaxed sample's, is differentiable too."""
    def sample(x, tau):
        return tw.gumbel_softmax(x, tau, hard=True, seed=5)

    inputs = normal(3, 4).requires_grad_(), torch.tensor(0.7, dtype=torch.float64,
                                                         requires_grad=True)
    assert torch.autograd.gradgradcheck(sample, inputs)


def second_derivatives(x, tau, hard):
    x, tau = x.detach().requires_grad_(), tau.detach().requires_grad_()
    weights = normal(*x.shape, seed=8).to(x.dtype)
    y = tw.gumbel_softmax(x, tau, hard, seed=6)
    first = torch.autograd.grad((y * weights).sum(), (x, tau), create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, tau))]


@kernels
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("tau", [0.0, 0.7])
def test_double_backward(backend, hard, tau):
    x, tau = masked(4, 9), torch.tensor(tau)
    ours = second_derivatives(x.float(), tau, hard)
    with tw.backend("reference"):
        exact = second_derivatives(x, tau.double(), hard)
    for value, truth in zip(ours, exact, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=2e-6)


@kernels
@pytest.mark.parametrize("hard", [False, True])
def test_gradient_is_the_same_where_it_will_be_differentiated(backend, hard):
    x, tau = normal(4, 33).float().requires_grad_(), torch.tensor(0.3, requires_grad=True)
    y = tw.gumbel_softmax(x, tau, hard, seed=6)
    grad = normal(4, 33, seed=2).float()
    plain = torch.autograd.grad(y, (x, tau), grad, retain_graph=True)
    again = torch.autograd.grad(y, (x, tau), grad, retain_graph=True)
    differentiable = torch.autograd.grad(y, (x, tau), grad, create_graph=True)
    assert all(map(torch.equal, plain, again))
    for a, b in zip(plain, differentiable, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def step(x, tau, hard):
    y = tw.gumbel_softmax(2 * x, tau, hard, dim=0, seed=12)
    return (y * x.detach().cos()).sum()


@compilers("hard", (False, True))
def test_compiled(backend, compiler, hard):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler, dynamic=once(compiler))
    for rows in (4, 4, 7):
        x, tau = normal(rows, 5).float().requires_grad_(), torch.tensor(0.5, requires_grad=True)
        results = []
        for function in (compiled, step):
            value = function(x, tau, hard)
            results.append([value, *torch.autograd.grad(value, (x, tau))])
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS[:1], indirect=True)
def test_compiled_without_a_seed(backend):
    """Each call of the compiled function draws anew."""
    torch._dynamo.reset()
    compiled = torch.compile(tw.gumbel_softmax, fullgraph=True, backend="aot_eager")
    x = normal(4, 9).float()
    first, second = compiled(x), compiled(x)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second.sum(-1), torch.ones(4))


X = torch.zeros(3, 4)


@cases.cpu_backends
def test_a_negative_tensor_tau_is_refused(backend):
    with pytest.raises(ValueError, match=r"tau.*at least 0.*-0\.5"):
        tw.gumbel_softmax(X, torch.tensor(-0.5))


@cases.exact_backends
def test_nan_in_a_tensor_tau_is_nan_everywhere(backend):
    """It comes out of a computation, and may not be hidden."""
    assert tw.gumbel_softmax(X, torch.tensor(NAN)).isnan().all()
