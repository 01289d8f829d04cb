"""Samples of categories against torch.multinomial, lucidrains' gumbel_sample and a bare softmax."""

from collections.abc import Callable
from typing import Any

import torch

import tilewise as tw
from benchmarks import baselines
from benchmarks.baselines import SOFTMAX
from benchmarks.gumbel_softmax import flops, sized
from benchmarks.harness.registry import (
    FORWARD,
    OURS,
    Benchmark,
    Candidate,
    Case,
    Inputs,
    matrices,
    of_function,
)

MULTINOMIAL, LUCIDRAINS, SEVERAL = "multinomial", "lucidrains", "8 of them"


def sample(n: int, k: int, dtype: str = "float32", data: str = "", **options) -> Case:
    """A case without gradients: an index has none."""
    return sized(n, k, dtype, data, kinds=(FORWARD,), **options)


CASES = (
    sample(2048, 1024, quick=True),
    sample(262144, 32),
    sample(65536, 1024),
    sample(8192, 8192),
    sample(4096, 50257),
    sample(65536, 1024, "bfloat16"),
    sample(8192, 8192, data=SEVERAL, only=(OURS, SOFTMAX, MULTINOMIAL)),
)


def inputs(case: Case, device: str) -> Inputs:
    """Logits, the same in every run, and how many categories of each row."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(tuple(case.sizes.values()), device=device, generator=generator)
    return {"logits": logits.to(case.torch_dtype), "k": 8 if case.data == SEVERAL else None}


def candidates(device: str) -> dict[str, Candidate]:
    """Everything that samples on `device`, if it is installed, and a softmax."""

    def sampler(function: Callable[..., Any], count: float) -> Candidate:
        return of_function(function, matrices(count, "N", "K"))

    found = {
        OURS: of_function(tw.gumbel_argmax),
        SOFTMAX: sampler(lambda logits, k: torch.softmax(logits, -1), 1),
        MULTINOMIAL: sampler(baselines.multinomial, 2),
        "torch.compile": sampler(baselines.compiled(baselines.multinomial), 2),
    }
    if baselines.installed("vector_quantize_pytorch"):
        found[LUCIDRAINS] = sampler(baselines.lucidrains_gumbel_sample, 5)
    return found


def moved(case: Case, kind: str) -> int:
    """Logits are read, indices written."""
    n, k = case.sizes.values()
    return n * k * case.torch_dtype.itemsize + 8 * n


BENCHMARK = Benchmark(
    axis=None,
    cases=CASES,
    small=Case({"N": 512, "K": 48}, kinds=(FORWARD,)),
    inputs=inputs,
    candidates=candidates,
    flops=flops,
    moved=moved,
    baseline=SOFTMAX,
)
