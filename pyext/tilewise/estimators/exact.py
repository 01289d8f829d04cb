"""The sum over all outcomes, the yardstick of the estimators."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise.estimators import _samples
from tilewise.estimators._distributions import Distribution
from tilewise.reference._precision import accumulate_dtype

OUTCOMES = 2**16


def exact(f: _samples.Function, distribution: Distribution) -> Tensor:
    r"""The expectation itself.

        E f = sum_y p(y) f(y),    d/dtheta E f = sum_y f(y) d/dtheta p(y)

    Args:
        f: of (O, B, ..., K), all O outcomes one-hot, gives (O, B).
        distribution: a `Categorical` of at most 65,536 outcomes: K to the number of variables.

    Returns:
        (B,), differentiable in the logits and in f's parameters, any number of times.

    Cost: one call of f with every outcome of every row.

    Raises:
        ValueError, TypeError: too many outcomes; an argument of the wrong shape or dtype.
    """
    logits = _samples.logits_of(distribution, 1, "exact")[0]
    logs = F.log_softmax(logits.to(accumulate_dtype(logits)), -1)
    logs = logs.reshape(len(logits), -1, logits.shape[-1])  # (B, M, K)
    variables, categories = logs.shape[1:]
    if categories**variables > OUTCOMES:
        raise ValueError(
            f"logits: expected at most {OUTCOMES} outcomes, got {categories} ** {variables}"
        )
    places = torch.arange(variables, device=logits.device)
    number = torch.arange(categories**variables, device=logits.device)
    index = number[:, None] // categories**places % categories  # (O, M)
    outcomes = F.one_hot(index, categories).to(logits.dtype)
    outcomes = outcomes.view(-1, 1, *logits.shape[1:]).expand(-1, *logits.shape)
    p = logs[:, places, index].sum(-1).exp().T  # (O, B)
    found = torch.where(p > 0, _samples.values(f, outcomes), 0.0)
    return (p * found).sum(0)
