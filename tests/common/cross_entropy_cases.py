"""What tests of losses made of cross entropies share: their cases, results and magnitudes."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.common.contrastive_cases import CASES, Case, duplicated, related
from tilewise.reference._matches import matches

CROSS_ENTROPY_CASES = CASES + [
    *(Case(f"clip-scale-{scale}", related(60, 60, 32, noise=0.3), scale)
      for scale in (1.0, 14.3, 100.0)),
    Case("duplicated-scale-100", duplicated(50, 16), logit_scale=100.0),
    Case("unmatched-scale-100", related(1, 1, 8, noise=0.1), logit_scale=100.0, positives=1),
]
ROWS, COLUMNS = 1, 0  # the dimension along which those choose


def outputs(
    loss_function: Callable, case: Case, features: tuple[Tensor, Tensor], dtype: torch.dtype,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """The loss and its gradients, of a scale in `dtype`."""
    where = {"dtype": dtype, "device": features[0].device, "requires_grad": True}
    scale = torch.tensor(case.logit_scale, **where)
    leaves = [*(x.detach().requires_grad_() for x in features), scale]
    loss = loss_function(*leaves, positives=case.positives, label_smoothing=smoothing)
    gradients = torch.autograd.grad(loss, leaves)
    return {
        "loss": loss.detach(), **dict(zip(("d_image", "d_text", "d_scale"), gradients, strict=True))
    }


def magnitudes(
    case: Case, x: Tensor, y: Tensor, smoothing: float = 0.0,
    sides: tuple[int, ...] = (ROWS, COLUMNS),
) -> dict[str, float]:
    """Sums of the absolute values of each output's terms, with what a rounded logit does.

    Of the mean over `sides` of their cross entropies.
    """
    z = x @ y.T * case.logit_scale
    pairs = matches(x, y, case.positives).double()
    dz, terms = torch.zeros_like(z), torch.zeros((), dtype=z.dtype)
    for d in sides if z.numel() else ():
        count = pairs.sum(d, keepdim=True)
        weight = (count > 0).double() / (len(sides) * (count > 0).sum().clamp(min=1))
        target = (1 - smoothing) * pairs / count.clamp(min=1) + smoothing / z.shape[d]
        dz = dz + weight * (torch.softmax(z, d) + target)
        terms = terms + (weight * target * (1 + z.abs() + z.logsumexp(d, keepdim=True).abs())).sum()
    dz = dz * (1 + z.abs())
    size = abs(case.logit_scale)

    def largest(x):
        return float(x.max()) if x.numel() else 0.0

    return {
        "loss": float(terms),
        "d_image": size * largest(dz @ y.abs()),
        "d_text": size * largest(dz.T @ x.abs()),
        "d_scale": float((dz * (x @ y.T).abs()).sum()),
    }
