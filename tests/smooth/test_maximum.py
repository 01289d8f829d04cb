"""The maximum, where it is and its index."""

import math

import torch

import tilewise as tw


def test_maximum_is_a_scaled_logsumexp_and_its_gradient_the_softmax():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    found = tw.smooth.maximum(x, 0.3)
    torch.testing.assert_close(found, 0.3 * torch.logsumexp(x / 0.3, -1))
    found.sum().backward()
    torch.testing.assert_close(x.grad, tw.smooth.onehot_argmax(x.detach(), 0.3))
    torch.testing.assert_close(x.grad, torch.softmax(x.detach() / 0.3, -1))


def test_excess_of_equal_maxima():
    x = torch.tensor([2.0, 2.0, 2.0, -50.0])
    for tau in (1.0, 0.1):
        torch.testing.assert_close(tw.smooth.maximum(x, tau), torch.tensor(2 + tau * math.log(3)))


def test_argmax_is_the_mean_index():
    x = torch.tensor([[0.0, 0.0, -math.inf], [-100.0, 5.0, -100.0]])
    torch.testing.assert_close(tw.smooth.argmax(x), torch.tensor([0.5, 1.0]))
    big = torch.zeros(5000, dtype=torch.float16)
    big[4321] = 40
    assert tw.smooth.argmax(big, 0.5) == 4321  # no float16
