"""Each smooth function as one of a float matrix alone, with the bound that its docstring states."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import tilewise as tw

B, N = 4, 6
LABELS = torch.tensor([2, 0, 5, 2])
POSITIVE = torch.tensor([[True, False, True, False, False, True]]).expand(B, N)
REFERENCES = torch.tensor([[2, 0, 5, 2, 1], [2, 4, 0, 3, -1]])  # of one text, of words 0 ... 5


@dataclass
class Case:
    """call(x, tau) of x (B, N); bound(x, tau) of |call(x, tau) - call(x, 0)|."""

    call: Callable[..., Tensor]
    bound: Callable[[Tensor, float], Tensor]
    exponent: Callable[[Tensor], float] | None  # the error falls as exp(-exponent / tau)
    values: bool = False  # in the dtype of x


def gaps(x: Tensor, k: int = 1) -> Tensor:
    """From the k-th largest of each row to the next."""
    ordered = x.sort(-1, descending=True).values
    return ordered[..., k - 1] - ordered[..., k]


def closest(x: Tensor) -> float:
    """The smallest distance of two elements of a row."""
    return float(x.sort(-1).values.diff(dim=-1).min())


def pairs(x: Tensor, tau: float) -> Tensor:
    """exp(-distance / tau) of positives and negatives."""
    distance = (x[..., :, None] - x[..., None, :]).abs()
    chosen = POSITIVE[..., :, None] & ~POSITIVE[..., None, :]
    return torch.exp(-distance / tau)[chosen].view(B, -1).mean(1)


def least(x: Tensor) -> float:
    return float(gaps(x).min())


def wrong(x: Tensor, tau: float) -> Tensor:
    return (N - 1) * torch.exp(-gaps(x) / tau)


def of_f1(x: Tensor, tau: float) -> Tensor:
    counts = torch.bincount(LABELS, minlength=N)
    return torch.where(counts > 0, 3 * wrong(x, tau).sum() / counts.clamp(min=1), 0.0)


S = tw.smooth
CASES = {
    "maximum": Case(S.maximum, lambda x, tau: tau * math.log(N), None, True),
    "onehot_argmax": Case(S.onehot_argmax, lambda x, tau: wrong(x, tau)[:, None], least, True),
    "argmax": Case(S.argmax, lambda x, tau: (N - 1) * wrong(x, tau), least),
    "topk": Case(
        lambda x, tau, **o: S.topk(x, 2, tau, **o),
        lambda x, tau: math.sqrt(2 * (N - 2)) * torch.exp(-gaps(x, 2) / (2 * tau))[:, None],
        lambda x: float(gaps(x, 2).min()) / 2, True,
    ),
    "rank": Case(S.rank, lambda x, tau: (N - 1) * math.exp(-closest(x) / tau), closest),
    "sort": Case(
        S.sort, lambda x, tau: (N - 1) * closest(x) * math.exp(-closest(x) / tau)
        if tau < closest(x) else (N - 1) * tau / math.e, closest, True,
    ),
    "accuracy": Case(
        lambda x, tau, **o: S.accuracy(x, LABELS, tau, **o),
        lambda x, tau: wrong(x, tau).mean(), None,
    ),
    "topk_accuracy": Case(
        lambda x, tau, **o: S.topk_accuracy(x, LABELS, 2, tau, **o),
        lambda x, tau: math.sqrt(2 * (N - 2)) * torch.exp(-gaps(x, 2) / (2 * tau)).mean(),
        None,
    ),
    "f1": Case(
        lambda x, tau, **o: S.f1(x, LABELS, tau, average=None, **o), of_f1, None
    ),
    "auc": Case(
        lambda x, tau, **o: S.auc(x, POSITIVE, tau, **o), pairs, lambda x: float(
            (x[POSITIVE].view(B, -1, 1) - x[~POSITIVE].view(B, 1, -1)).abs().min()
        ),
    ),
    "bleu": Case(
        # The bound is that of matches; their mean over n is off by no more where none is near 0.
        lambda x, tau, **o: S.bleu(x[None], REFERENCES[None], tau, max_n=2, **o),
        lambda x, tau: 8 * wrong(x, tau).sum(), None,
    ),
}  # fmt: skip


def matrix(seed: int = 0) -> Tensor:
    """No two elements of a row are closer than 0.1; the labels win in half of the rows."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(B, N, generator=generator, device="cpu").argsort(-1)
    x = 0.4 * order + 0.3 * torch.rand(B, N, generator=generator, device="cpu")
    x = x.double()
    x[:2, :] -= 3 * torch.nn.functional.one_hot(x[:2].argmax(-1), N)
    x[torch.arange(2), LABELS[:2]] = 3.0
    return x
