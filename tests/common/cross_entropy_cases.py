"""What tests of losses made of cross entropies share: their cases, results and magnitudes."""

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tilewise as tw
from tests.common.budget import assert_within_budget
from tests.common.contrastive_cases import CASES, Case, duplicated, ids, related
from tilewise.reference._matches import matches

CROSS_ENTROPY_CASES = CASES + [
    *(Case(f"clip-scale-{scale}", related(60, 60, 32, noise=0.3), scale)
      for scale in (1.0, 14.3, 100.0)),
    Case("duplicated-scale-100", duplicated(50, 16), logit_scale=100.0),
    Case("unmatched-scale-100", related(1, 1, 8, noise=0.1), logit_scale=100.0, positives=1),
]
ROWS, COLUMNS = 1, 0  # the dimension along which those choose
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def check(
    op: str, eager: Callable, case: Case, dtype: torch.dtype, smoothing: float = 0.0,
    sides: tuple[int, ...] = (ROWS, COLUMNS),
) -> None:
    """What the op gives is no further from float64 than what the eager one gives."""
    pair = case.features(dtype)
    exact = [x.double() for x in pair]
    truth = outputs(getattr(tw.reference, op), case, exact, torch.float64, smoothing)
    scale_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    ours = outputs(getattr(tw, op), case, pair, scale_dtype, smoothing)
    assert_within_budget(
        ours, outputs(eager, case, pair, dtype, smoothing), truth,
        magnitudes(case, *exact, smoothing, sides),
    )


def random_problems(test: Callable) -> Callable:
    """Gives the test a Case, a dtype and a label smoothing, many times."""

    @given(
        b=st.integers(0, 40), n=st.integers(0, 40), d=st.integers(0, 20),
        scale=st.floats(-100, 100), positives=st.integers(-50, 50) | st.none(),
        names=st.integers(1, 30), dtype=st.sampled_from(DTYPES),
        smoothing=st.sampled_from([0.0, 0.1]),
    )
    def test_random_problems(b, n, d, scale, positives, names, dtype, smoothing):
        same = ids(b, n, names) if positives is None else positives
        test(Case("random", related(b, n, d), scale, None, same), dtype, smoothing)

    return test_random_problems


def assert_only_first_rows_count(loss: Callable, x: Tensor, y: Tensor, first: int) -> None:
    """Loss and gradient of x are the same with the first rows of y only."""
    results = []
    for rows in (y, y[:first]):
        leaf = x.clone().requires_grad_()
        value = loss(leaf, rows, 10.0)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


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
