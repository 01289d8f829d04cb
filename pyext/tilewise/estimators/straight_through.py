"""One-hot samples with a gradient that is made up for them."""

import torch
from torch import Tensor

from tilewise.estimators import _conditional, _samples
from tilewise.estimators._distributions import Distribution
from tilewise.ops import _arguments


def straight_through(
    f: _samples.Function,
    distribution: Distribution,
    num_samples: int = 1,
    *,
    tau: float = 1.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    r"""f sees a one-hot sample D, the gradient takes it for the probabilities.

        d/dtheta E f(D) ~ E f'(D) d/dtheta softmax(logits / tau)

    Biased, but for linear f at tau = 1: it replaces f(I_i) - f(D) by f'(D) (I_i - D).

    Args:
        f: of one-hot samples (S, B, ..., K), gives (S, B); differentiable there.
        distribution: a `Categorical`.
        num_samples: S.
        tau: above 0, of the softmax that is differentiated.
        seed: an int or an int64 tensor of one element; equal seeds give equal samples. None draws
            one from torch's default generator.

    Returns:
        (B,), the mean of f over the samples.

    Cost: f forward and backward for each sample.

    Raises:
        ValueError, TypeError: an argument of the wrong type, shape or dtype, named in the text.

    Paper: Bengio, Leonard and Courville, Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation, 2013 (arXiv 1308.3432).
    """
    logits = _samples.logits_of(distribution, num_samples, "straight_through")
    _check(tau)
    sample = _samples.one_hot(logits, _arguments.seed(seed, logits.device))
    p = torch.softmax(logits.detach() / tau, -1)
    return _samples.values(f, sample + _samples.softmax_gradient(p, logits / tau)).mean(0)


def reinmax(
    f: _samples.Function,
    distribution: Distribution,
    num_samples: int = 1,
    *,
    tau: float = 1.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    r"""The straight-through gradient of second order.

        d/dtheta E f(D) ~ E f'(D) (2 J((D + softmax(logits / tau)) / 2) - J(softmax(logits)) / 2),
        J(p) = diag(p) - p p'

    Biased, but for quadratic f at tau = 1: it replaces f(I_i) - f(D) by the trapezoid rule
    (f'(I_i) + f'(D)) (I_i - D) / 2, where straight-through takes the slope at D alone.

    Args:
        f, distribution, num_samples, tau, seed: as in `straight_through`.

    Returns:
        (B,), the mean of f over the samples.

    Cost: f forward and backward for each sample: that of `straight_through`.

    Raises:
        ValueError, TypeError: an argument of the wrong type, shape or dtype, named in the text.

    Paper: Liu, Dong, Liu, Yu and Gao, Bridging Discrete and Backpropagation: Straight-Through and
    Beyond, NeurIPS 2023.
    """
    logits = _samples.logits_of(distribution, num_samples, "reinmax")
    _check(tau)
    sample = _samples.one_hot(logits, _arguments.seed(seed, logits.device))
    fixed = logits.detach()
    middle = (sample + torch.softmax(fixed / tau, -1)) / 2
    second_order = 2 * _samples.softmax_gradient(middle, logits)
    first_order = _samples.softmax_gradient(torch.softmax(fixed, -1), logits) / 2
    return _samples.values(f, sample + second_order - first_order).mean(0)


def gumbel_rao(
    f: _samples.Function,
    distribution: Distribution,
    num_samples: int = 1,
    *,
    tau: float = 1.0,
    num_conditional: int = 10,
    seed: Tensor | int | None = None,
) -> Tensor:
    r"""Straight-through Gumbel-softmax, averaged over the noise that gives the same sample.

        d/dtheta E f(D) ~ E f'(D) E[d/dtheta softmax((logits + g) / tau) | D]

    By Rao and Blackwell it has the mean of `gumbel_softmax(hard=True)` and less variance, for the
    price of noise, not of calls of f. Biased as that is.

    Args:
        f, distribution, num_samples, tau, seed: as in `straight_through`.
        num_conditional: how many noises for each sample.

    Returns:
        (B,), the mean of f over the samples.

    Cost: f forward and backward for each sample; noise and softmax num_conditional times.

    Raises:
        ValueError, TypeError: an argument of the wrong type, shape or dtype, named in the text.

    Paper: Paulus, Maddison and Krause, Rao-Blackwellizing the Straight-Through Gumbel-Softmax
    Gradient Estimator, ICLR 2021.
    """
    logits = _samples.logits_of(distribution, num_samples, "gumbel_rao")
    _check(tau)
    count = _arguments.integer("num_conditional", num_conditional, least=1)
    seed = _arguments.seed(seed, logits.device)
    sample = _samples.one_hot(logits, seed)
    fixed, surrogate = logits.detach(), torch.zeros_like(sample)
    for i in range(count):
        perturbed = _conditional.perturbed(fixed, sample, seed, i + 1)
        surrogate = surrogate + _samples.softmax_gradient(
            torch.softmax(perturbed / tau, -1), logits / tau
        )
    return _samples.values(f, sample + surrogate / count).mean(0)


def _check(tau: float) -> None:
    if not tau > 0:
        raise ValueError(f"tau: expected above 0, got {tau}")
