"""Prints the counts that the pages on random ops quote: `python -m docs.figures.facts`.

What noise in half precision does to `torch.nn.functional.gumbel_softmax`, how finely noise resolves
its tail, and how often `gumbel_argmax` takes logarithms.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import tilewise as tw
from tilewise.reference import _philox

DRAWS = 2**26
RARE = 1e-6  # a tail's probability
STEP = 32  # columns that the CPU kernel of gumbel_argmax looks at together
CATEGORIES = 1000, 50257


def main() -> None:
    """Prints everything; takes about a minute."""
    torch.manual_seed(0)
    print(f"exponential_() and its -log, {DRAWS:,} draws; equal logits, F.gumbel_softmax")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        zeros, values = torch_noise(dtype)
        tied = ", ".join(f"{tied_maxima(dtype, k):.2%} of rows of {k:,}" for k in CATEGORIES)
        print(f"  {str(dtype):15} {zeros} zeros, {values:,} values above the median; "
              f"tied maximum in {tied}")  # fmt: skip
    x = torch.zeros(4, 8)
    print(f"F.gumbel_softmax(tau=0): {int(F.gumbel_softmax(x, tau=0.0).isnan().sum())} of 32 NaN; "
          f"tilewise: {int(tw.gumbel_softmax(x, tau=0.0).isnan().sum())}")  # fmt: skip

    ours, coarse = tail_values()
    print(f"values rarer than {RARE:g}: {ours:,} of ours, {coarse} where "
          "-log(-log(u)) is taken of torch.rand")  # fmt: skip
    u = _philox.uniform(torch.tensor([0, 2**32 - 1])).double()
    least, most = (-torch.log(-torch.log1p(-u))).flip(0).tolist()
    print(f"ours lie from {least:.2f} to {most:.2f}; normal variates within "
          f"{math.sqrt(-2 * math.log(u[0])):.2f}")  # fmt: skip

    for k in CATEGORIES:
        for name, logits in (("equal", torch.zeros(k)), ("normal", torch.randn(k))):
            steps = -(-k // STEP)
            print(f"gumbel_argmax, {k:,} {name} logits: logarithms in {logarithms(logits):.1f} "
                  f"of {steps} steps of {STEP} columns; H_{steps} is "
                  f"{sum(1 / n for n in range(1, steps + 1)):.1f}")  # fmt: skip


def torch_noise(dtype: torch.dtype) -> tuple[int, int]:
    """Zeros of `exponential_()`, and how many values -log of it has where it is large."""
    e = torch.empty(DRAWS, dtype=dtype).exponential_()
    likely = e[e < math.log(2)]  # half of the draws, and those that win
    return int((e == 0).sum()), (-likely.log()).unique().numel()


def tied_maxima(dtype: torch.dtype, k: int, rows: int = 10_000) -> float:
    """The part of rows of k equal logits whose largest sample is not the only one of its size."""
    tied = 0
    for part in torch.arange(rows).split(2**24 // k):
        y = F.gumbel_softmax(torch.zeros(len(part), k, dtype=dtype))
        tied += int(((y == y.amax(1, keepdim=True)).sum(1) > 1).sum())
    return tied / rows


def tail_values() -> tuple[int, int]:
    """How many different variates are rarer than `RARE`: ours, and those of uniforms of 24 bits."""
    ours = _philox.uniform(torch.arange(int(RARE * 2**32) + 1))
    u = 1 - torch.arange(1, int(RARE * 2**24) + 1) / 2**24  # what torch.rand has below 1
    return tuple((-torch.log(v)).unique().numel() for v in (-torch.log1p(-ours), -torch.log(u)))


def logarithms(logits: Tensor, rows: int = 2000) -> float:
    """Steps, on average over rows, in which some bound exceeds the best so far."""
    words = _philox.words(torch.tensor(0), rows, len(logits), 0, _philox.GUMBEL)
    u = _philox.uniform(words)
    z = logits - torch.log(-torch.log1p(-u))
    bits = u.view(torch.int32).float()  # n + m, and more, of u = 2^n (1 + m)
    bound = logits + (127 * math.log(2) + 1e-4 - bits * (math.log(2) / 2**23))
    parts = zip(z.split(STEP, 1), bound.split(STEP, 1), strict=True)
    best, taken = torch.full((rows,), -math.inf), 0
    for values, bounds in parts:
        taken += int((bounds.amax(1) > best).sum())
        best = torch.maximum(best, values.amax(1))
    return taken / rows


if __name__ == "__main__":
    main()
