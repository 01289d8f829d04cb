"""tilewise.gaussian_sample within torch: tracing, autocast, errors."""

import pytest
import torch

import tilewise as tw
from tests.common import random_cases as cases
from tests.common.random_cases import INF, backends, kernels, normal

backend = pytest.fixture(cases.serve)


def step(mean, logvar):
    z, kl = tw.gaussian_sample(2 * mean, logvar, seed=12, logvar_range=(-30.0, 20.0))
    return (z * mean.detach().cos()).sum() + 0.1 * kl.mean()


@kernels
def test_compiled(backend):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (4, 4, 7):
        leaves = [normal(rows, 5, seed=i).float().requires_grad_() for i in (0, 1)]
        results = []
        for function in (compiled, step):
            value = function(*leaves)
            results.append([value, *torch.autograd.grad(value, leaves)])
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


@backends
def test_inputs_are_left_alone_and_results_are_their_own(backend):
    mean, logvar = normal(4, 9).float(), torch.full((4, 9), -INF)
    copies = mean.clone(), logvar.clone()
    z, kl = tw.gaussian_sample(mean, logvar, seed=1)
    z.add_(1)
    kl.add_(1)
    assert torch.equal(mean, copies[0]) and torch.equal(logvar, copies[1])
