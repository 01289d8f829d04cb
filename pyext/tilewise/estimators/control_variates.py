"""The score function estimator with a relaxed sample as a control variate."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tilewise.estimators import _conditional, _samples
from tilewise.estimators._distributions import Distribution
from tilewise.ops import _arguments
from tilewise.ops.gumbel_softmax import gumbel_softmax
from tilewise.reference._precision import accumulate_dtype


def rebar(
    f: _samples.Function,
    distribution: Distribution,
    num_samples: int = 1,
    *,
    tau: Tensor | float = 0.5,
    eta: Tensor | float = 1.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    r"""`relax` with the control c(y) = eta f(y): f of the relaxed sample.

    Unbiased at every tau and eta. Tensors of one element that require a gradient are learned: the
    backward pass gives them the gradient of the estimate's squared length, and so of its variance.

    Args:
        f: of one-hot and of relaxed samples (S, B, ..., K), gives (S, B); differentiable.
        distribution: a `Categorical`.
        num_samples: S.
        tau: of the relaxed samples, above 0.
        eta: of the control.
        seed: an int or an int64 tensor of one element; equal seeds give equal samples. None draws
            one from torch's default generator.

    Returns:
        (B,), the mean of f over the one-hot samples.

    Cost: f three times forward and twice backward for each sample; twice that where tau or eta
    learns.

    Raises:
        ValueError, TypeError: an argument of the wrong type, shape or dtype, named in the text.

    Paper: Tucker, Mnih, Maddison, Lawson and Sohl-Dickstein, REBAR: Low-variance, unbiased gradient
    estimates for discrete latent variable models, NeurIPS 2017.
    """
    return _relax(
        "rebar", f, distribution, lambda y: eta * f(y), num_samples, tau, seed, [eta, tau]
    )


def relax(
    f: _samples.Function,
    distribution: Distribution,
    control: _samples.Function,
    num_samples: int = 1,
    *,
    tau: Tensor | float = 0.5,
    seed: Tensor | int | None = None,
) -> Tensor:
    r"""The score function estimator, less a control variate whose expectation is known.

        d/dtheta E f(D) = E (f(D) - c(y')) d/dtheta log p(D) + d/dtheta c(y) - d/dtheta c(y'),
        y = softmax((logits + g) / tau),   D = its one-hot,   y' ~ p(y | D)

    Unbiased for every control c: y and y' have the same distribution. The better c(y') tells f(D),
    the less variance.

    Args:
        f: of one-hot samples (S, B, ..., K), gives (S, B). It need not be differentiable.
        distribution: a `Categorical`.
        control: of relaxed samples (S, B, ..., K), gives (S, B); differentiable. The parameters of
            an nn.Module are learned: the backward pass gives them the gradient of the estimate's
            squared length, and so of its variance.
        num_samples: S.
        tau: of the relaxed samples, above 0; learned as well where it requires a gradient.
        seed: as in `rebar`.

    Returns:
        (B,), the mean of f over the one-hot samples.

    Cost: f once, the control twice forward and backward for each sample; twice that where it
    learns.

    Raises:
        ValueError, TypeError: an argument of the wrong type, shape or dtype, named in the text.

    Paper: Grathwohl, Choi, Wu, Roeder and Duvenaud, Backpropagation through the Void, ICLR 2018.
    """
    learned = list(control.parameters()) if isinstance(control, nn.Module) else []
    return _relax("relax", f, distribution, control, num_samples, tau, seed, [*learned, tau])


def _relax(
    name: str, f: _samples.Function, distribution: Distribution, control: _samples.Function,
    num_samples: int, tau: Tensor | float, seed: Tensor | int | None,
    parameters: Sequence[Tensor | float],
) -> Tensor:  # fmt: skip
    if not isinstance(tau, Tensor) and not tau > 0:
        raise ValueError(f"tau: expected above 0, got {tau}")
    logits = _samples.logits_of(distribution, num_samples, name)
    seed = _arguments.seed(seed, logits.device)
    sample = _samples.one_hot(logits, seed)
    learned = [x for x in parameters if isinstance(x, Tensor) and x.requires_grad]
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()  # its gradient is the estimate for each sample
        relaxed = gumbel_softmax(leaf, tau, seed=seed)
        again = torch.softmax(_conditional.perturbed(leaf, sample, seed, 1) / tau, -1)
        first = _samples.values(control, relaxed, "control")
        second = _samples.values(control, again.to(logits.dtype), "control")
        (difference,) = torch.autograd.grad(
            (first - second).sum(), leaf, create_graph=bool(learned)
        )
        values = _samples.values(f, sample)
        advantage = (values.detach() - second).view(*second.shape, *(1,) * (sample.dim() - 2))
        wide = accumulate_dtype(logits)
        score = sample - torch.softmax(logits.detach().to(wide), -1)
        estimate = (advantage * score + difference).mean(0)  # (B, ..., K)
        slopes = torch.autograd.grad(estimate.square().sum(), learned) if learned else ()
    finite = distribution[0].masked_fill(distribution[0] == -torch.inf, 0.0)
    surrogate = _samples.row_sum((estimate.detach() * finite)[None])[0]
    for parameter, slope in zip(learned, slopes, strict=True):
        surrogate = surrogate + (parameter * slope).sum() / len(surrogate)
    return values.mean(0) + _samples.for_gradient(surrogate)
