"""Gradients through the sample are those of the ops."""

import torch

import tilewise as tw
from tests.estimators.cases import TWO, curved, normal
from tilewise.estimators import Categorical, Gaussian, gumbel_softmax, reparameterized


def test_relaxed_samples_are_the_ops():
    for hard in (False, True):
        logits = TWO.expand(3, 2, 4).clone().requires_grad_()
        found = gumbel_softmax(curved, Categorical(logits), 5, tau=0.7, hard=hard, seed=1)
        (ours,) = torch.autograd.grad(found.sum(), logits)
        y = tw.gumbel_softmax(logits.expand(5, 3, 2, 4), 0.7, hard, seed=1)
        (theirs,) = torch.autograd.grad(curved(y).mean(0).sum(), logits)
        torch.testing.assert_close(ours, theirs)


def test_gaussian_samples_are_the_ops():
    mean, logvar = (x.clone().requires_grad_() for x in normal(3))
    found = reparameterized(lambda z: z.sin().sum(-1), Gaussian(mean, logvar), 5, seed=1)
    z = tw.gaussian_sample(mean.expand(5, 3, 3), logvar.expand(5, 3, 3), seed=1).z
    expected = z.sin().sum(-1).mean(0)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(x.sum(), (mean, logvar)) for x in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_a_temperature_that_learns():
    tau = torch.tensor(0.5, requires_grad=True)
    gumbel_softmax(curved, Categorical(TWO.expand(3, 2, 4)), 5, tau=tau, seed=1).sum().backward()
    assert tau.grad.abs() > 0
