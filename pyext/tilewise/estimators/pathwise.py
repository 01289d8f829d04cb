"""Gradients through the sample itself."""

from torch import Tensor

from tilewise.estimators import _samples
from tilewise.estimators._distributions import Distribution
from tilewise.ops import _arguments
from tilewise.ops.gumbel_softmax import gumbel_softmax as relaxed_sample


def reparameterized(
    f: _samples.Function,
    distribution: Distribution,
    num_samples: int = 1,
    *,
    seed: Tensor | int | None = None,
) -> Tensor:
    r"""The pathwise gradient: a Gaussian's sample is a function of its mean and variance.

        z = mean + exp(logvar / 2) e,    d/dtheta E f(z) = E f'(z) dz/dtheta

    Unbiased for an f that is differentiable (a step in f is not seen).

    Args:
        f: of samples (S, B, ...), gives (S, B); differentiable.
        distribution: a `Gaussian`; for a `Categorical` see `gumbel_softmax`.
        num_samples: S.
        seed: an int or an int64 tensor of one element; equal seeds give equal samples. None draws
            one from torch's default generator.

    Returns:
        (B,), the mean of f over the samples.

    Cost: f forward and backward for each sample.

    Raises:
        ValueError, TypeError: an argument of the wrong type, shape or dtype, named in the text.

    Paper: Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014; Rezende, Mohamed and
    Wierstra, ICML 2014.
    """
    device = distribution[0].device
    z, _, _ = _samples.normal(
        distribution, num_samples, _arguments.seed(seed, device), "reparameterized"
    )
    return _samples.values(f, z).mean(0)


def gumbel_softmax(
    f: _samples.Function,
    distribution: Distribution,
    num_samples: int = 1,
    *,
    tau: Tensor | float = 1.0,
    hard: bool = False,
    seed: Tensor | int | None = None,
) -> Tensor:
    r"""The pathwise gradient of relaxed categories.

        y = softmax((logits + g) / tau),    d/dtheta E f(one-hot) ~ E f'(y) dy/dtheta

    Biased: it is the gradient of another expectation, which nears the wanted one as tau falls,
    while the variance grows as 1 / tau.

    Args:
        f: of relaxed samples (S, B, ..., K), gives (S, B); differentiable.
        distribution: a `Categorical`.
        num_samples: S.
        tau: a float, at least 0, or a tensor of one element, which may learn.
        hard: f sees the one-hot sample, with the gradient of the relaxed one (straight-through
            Gumbel-softmax). Otherwise the value is that of f between the categories.
        seed: as in `reparameterized`.

    Returns:
        (B,), the mean of f over the samples.

    Cost: f forward and backward for each sample.

    Raises:
        ValueError, TypeError: an argument of the wrong type, shape or dtype, named in the text.

    Paper: Jang, Gu and Poole, Categorical Reparameterization with Gumbel-Softmax, ICLR 2017;
    Maddison, Mnih and Teh, The Concrete Distribution, ICLR 2017.
    """
    logits = _samples.logits_of(distribution, num_samples, "gumbel_softmax")
    seed = _arguments.seed(seed, logits.device)
    return _samples.values(f, relaxed_sample(logits, tau, hard, seed=seed)).mean(0)
