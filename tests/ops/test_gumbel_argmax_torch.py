"""tilewise.gumbel_argmax within torch: tracing, autocast, what it keeps, errors."""

import pytest
import torch

import tilewise as tw
from tests.common import random_cases as cases
from tests.common.random_cases import kernels, normal

backend = pytest.fixture(cases.serve)


@kernels
@pytest.mark.parametrize("log_prob", [False, True])
def test_backward_keeps_no_matrix_of_its_own(backend, log_prob):
    """Nothing without log-probabilities; with them the logits and the indices."""
    x = normal(40, 33).float().requires_grad_()
    saved = cases.Saved()
    with saved:
        result = tw.gumbel_argmax(x, 2, seed=1, log_prob=log_prob)
    if log_prob:
        assert saved.bytes_beyond(x, result[0]) <= 64
    else:
        assert not saved.tensors and not result.requires_grad


def step(x):
    index, log_prob = tw.gumbel_argmax(2 * x, 2, dim=0, seed=12, log_prob=True)
    return index, (log_prob * x.detach()[0]).sum()


@kernels
def test_compiled(backend):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for columns in (4, 4, 7):
        x = normal(5, columns).float().requires_grad_()
        (index, value), (expected_index, expected) = compiled(x), step(x)
        assert torch.equal(index, expected_index)
        torch.testing.assert_close(value, expected)
        ours, eager = (torch.autograd.grad(v, x)[0] for v in (value, expected))
        torch.testing.assert_close(ours, eager)
