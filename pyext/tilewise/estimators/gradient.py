"""Estimates as numbers, to be looked at."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewise import estimators
from tilewise.estimators import _samples
from tilewise.estimators._distributions import Categorical, Distribution, Gaussian


def gradient(
    f: _samples.Function,
    distribution: Distribution,
    estimator: str | Callable[..., Tensor] = "score_function",
    num_samples: int | None = None,
    **options: Any,
) -> Categorical | Gaussian:
    r"""An estimate of d/dtheta E f for each row, without a backward pass of yours.

        tw.estimators.gradient(f, Categorical(logits), "rebar", num_samples=8, tau=0.3).logits

    Args:
        f: as the estimator takes it.
        distribution: a `Categorical` or a `Gaussian`.
        estimator: a function of this module, or its name.
        num_samples: None leaves it to the estimator; `exact` has none.
        options: of the estimator.

    Returns:
        The gradients in the place of the distribution's tensors, in their shapes. Row b is the
        gradient of row b's expectation; no `.grad` of a parameter changes.

    Cost: the estimator's, forward and backward.

    Raises:
        ValueError: an estimator that does not exist. What the estimator raises.
    """
    if isinstance(estimator, str):
        known = [key for key, value in vars(estimators).items() if callable(value)]
        if estimator not in known or not estimator.islower() or estimator == "gradient":
            raise ValueError(f"estimator: there is no {estimator!r} in tilewise.estimators")
    function = getattr(estimators, estimator) if isinstance(estimator, str) else estimator
    if num_samples is not None:
        options["num_samples"] = num_samples
    leaves = type(distribution)(*(x.detach().requires_grad_() for x in distribution))
    with torch.enable_grad():
        expectation = function(f, leaves, **options)
        return type(distribution)(*torch.autograd.grad(expectation.sum(), leaves))
