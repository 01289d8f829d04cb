"""Hard negatives of both directions against eager, torch.compile and one bare product."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import tilewise as tw
from benchmarks import baselines
from benchmarks.gumbel_softmax import step
from benchmarks.harness.measure import Call
from benchmarks.harness.registry import (
    EAGER,
    FORWARD,
    OURS,
    PRODUCTS,
    Benchmark,
    Candidate,
    Case,
    Inputs,
    matrices,
)


def sized(b: int, dtype: str = "float32", **options) -> Case:
    """A case without gradients: an index has none."""
    return Case({"B": b, "D": 256}, dtype, kinds=(FORWARD,), **options)


CASES = (
    sized(512, sweep=True, quick=True),
    sized(2048, sweep=True, quick=True),
    sized(8192, sweep=True),
    sized(8192, "bfloat16"),
)


def inputs(case: Case, device: str) -> Inputs:
    """Unit rows, and the usual temperature of 0.07."""
    generator = torch.Generator(device).manual_seed(0)

    def features():
        x = torch.randn(tuple(case.sizes.values()), device=device, generator=generator)
        return F.normalize(x, dim=1).to(case.torch_dtype)

    scale = torch.tensor(14.3, device=device)
    return {"image": features(), "text": features(), "scale": scale}


def sampler(function: Callable[..., Any], needs: float = 0.0) -> Candidate:
    """A candidate that calls `function(image, text, scale)` and needs so many B x B matrices."""

    def build(inputs: Inputs, kind: str) -> Call:
        return step(function, list(inputs.values()), (), kind)

    return Candidate(build, matrices(needs, "B", "B"))


def products(inputs: Inputs, kind: str):
    """The logits."""
    image, text = inputs["image"], inputs["text"]
    logits = image.new_zeros(len(image), len(text))
    return lambda: torch.mm(image, text.T, out=logits)


def candidates(device: str) -> dict[str, Candidate]:
    """Everything that draws negatives on `device`."""
    eager = baselines.eager_hard_negatives
    return {
        OURS: sampler(tw.hard_negatives),
        PRODUCTS: Candidate(products, matrices(1, "B", "B")),
        EAGER: sampler(eager, 5.5),
        "torch.compile": sampler(baselines.compiled(eager), 5.5),
    }


def flops(case: Case, kind: str) -> int:
    """One product of B x B x D."""
    return 2 * case.sizes["B"] ** 2 * case.sizes["D"]


def moved(case: Case, kind: str) -> int:
    """Both features are read, and two indices of each pair written."""
    b, d = case.sizes.values()
    return 2 * b * d * case.torch_dtype.itemsize + 16 * b


BENCHMARK = Benchmark(
    axis="B",
    cases=CASES,
    small=Case({"B": 512, "D": 256}, kinds=(FORWARD,)),
    inputs=inputs,
    candidates=candidates,
    flops=flops,
    moved=moved,
)
