"""Samples of categories against torch.multinomial, lucidrains' gumbel_sample and a bare softmax."""

from collections.abc import Callable
from typing import Any

import torch

import tilewise as tw
from benchmarks import baselines
from benchmarks.baselines import SOFTMAX
from benchmarks.gumbel_softmax import SIZES, sized
from benchmarks.harness import bench
from benchmarks.harness.bench import FORWARD, OURS, Case

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


def inputs(case: Case, device: str) -> bench.Inputs:
    """Logits, and how many categories of each row."""
    logits = bench.Normal(case, device)(*case.sizes.values())
    return {"logits": logits, "k": 8 if case.data == SEVERAL else None}


def implementations(device: str) -> dict[str, bench.Implementation]:
    """Everything that samples on `device`, if it is installed, and a softmax."""

    def sampler(function: Callable[..., Any], count: float) -> bench.Implementation:
        return bench.of_function(function, bench.matrices(count, "N", "K"))

    found = {
        OURS: bench.of_function(tw.gumbel_argmax),
        SOFTMAX: sampler(lambda logits, k: torch.softmax(logits, -1), 1),
        MULTINOMIAL: sampler(baselines.multinomial, 2),
        bench.COMPILED: sampler(baselines.compiled(baselines.multinomial), 2),
    }
    if baselines.installed("vector_quantize_pytorch"):
        found[LUCIDRAINS] = sampler(baselines.lucidrains_gumbel_sample, 5)
    return found


def moved(case: Case, kind: str) -> int:
    """Logits are read, indices written."""
    n, k = case.sizes.values()
    return n * k * case.torch_dtype.itemsize + 8 * n


BENCHMARK = bench.Benchmark(
    CASES,
    Case({"N": 512, "K": 48}, kinds=(FORWARD,)),
    inputs,
    implementations,
    moved,
    baseline=SOFTMAX,
    small_calls=bench.small_calls("N K", SIZES, FORWARD),
    rival=MULTINOMIAL,
)
