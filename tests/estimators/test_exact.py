"""The sum over all outcomes, written once more by hand."""

import itertools

import torch

from tests.estimators.cases import TWO, curved
from tilewise.estimators import Categorical, exact


def test_is_the_sum_over_all_outcomes():
    logits = torch.stack([TWO, TWO.flip(0)]).double().requires_grad_()
    found = exact(curved, Categorical(logits))
    p, expected = torch.softmax(logits, -1), torch.zeros(2).double()
    for i, j in itertools.product(range(4), repeat=2):
        y = torch.zeros(1, 1, 2, 4).double()
        y[..., 0, i] = y[..., 1, j] = 1
        expected = expected + p[:, 0, i] * p[:, 1, j] * curved(y)[0]
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found.sum(), logits),
                            torch.autograd.grad(expected.sum(), logits), strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


def test_categories_that_cannot_be_may_be_infinite():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]]).requires_grad_()
    found = exact(lambda y: 1 / (1 - y[..., 1]) + y[..., 2], Categorical(logits))
    torch.testing.assert_close(found, 1 + torch.softmax(logits, -1)[:, 2])
    found.backward()
    assert logits.grad.isfinite().all()
