"""Relaxed and one-hot samples against torch's function, torch.distributions and a bare softmax."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tilewise as tw
from benchmarks import baselines
from benchmarks.baselines import SOFTMAX
from benchmarks.harness import bench
from benchmarks.harness.bench import FORWARD, TRAINING, Case

HARD = "hard "
HARD_FORWARD, HARD_TRAINING = HARD + FORWARD, HARD + TRAINING
KINDS = FORWARD, TRAINING, HARD_FORWARD, HARD_TRAINING
TORCH, INNER = "F.gumbel_softmax", "dim 1"


def sized(n: int, k: int, dtype: str = "float32", data: str = "", **options) -> Case:
    """A case of N rows and K categories, here and in the benchmark of `gumbel_argmax`."""
    return Case({"N": n, "K": k}, dtype, data, **{"kinds": KINDS, "sweep": True, **options})


CASES = (
    sized(2048, 1024, quick=True),
    sized(262144, 32),
    sized(65536, 1024),
    sized(8192, 8192),
    sized(4096, 50257),
    sized(65536, 1024, "bfloat16"),
    sized(32768, 1024, data=INNER),
)


def inputs(case: Case, device: str) -> bench.Inputs:
    """Logits, the categories' dimension, and a gradient of the sample."""
    draw = bench.Normal(case, device)
    n, k = case.sizes.values()
    shape = (n // 1024, k, 32, 32) if case.data == INNER else (n, k)
    return {"logits": draw(*shape).requires_grad_(), "dim": 1, bench.GRADS: (draw(*shape),)}


def sampler(function: Callable[..., Any], count: float) -> bench.Implementation:
    """Calls `function(logits, hard, dim)`, which needs so many N x K matrices."""

    def build(inputs: bench.Inputs, kind: str) -> bench.Call:
        return bench.of_function(function, hard=kind.startswith(HARD)).build(inputs, kind)

    return bench.Implementation(build, bench.matrices(count, "N", "K"))


def softmax(logits: Tensor, hard: bool, dim: int) -> Tensor:
    """The softmax alone."""
    return torch.softmax(logits, dim)


def implementations(device: str) -> dict[str, bench.Implementation]:
    """Everything that samples on `device`, and a softmax."""
    return {
        bench.OURS: sampler(tw.gumbel_softmax, 2),
        SOFTMAX: sampler(softmax, 2),
        TORCH: sampler(baselines.gumbel_softmax, 5),
        bench.COMPILED: sampler(baselines.compiled(baselines.gumbel_softmax), 3),
        "torch.distributions": sampler(baselines.relaxed_one_hot, 6),
    }


def moved(case: Case, kind: str) -> int:
    """Logits are read and the sample written; then both gradients, and what was kept is read."""
    tensors = 5 if kind.endswith(TRAINING) else 2
    return tensors * case.sizes["N"] * case.sizes["K"] * case.torch_dtype.itemsize


def operator(inputs: bench.Inputs) -> bench.Call:
    """The dispatcher's two, forward and backward."""
    logits, (grad,) = inputs["logits"].detach(), inputs[bench.GRADS]
    ops, tau, seed = torch.ops.tilewise, torch.ones(()), torch.zeros((), dtype=torch.int64)
    forward, backward = ops.gumbel_softmax.default, ops.gumbel_softmax_backward.default

    def call():
        y = forward(logits, tau, seed, 0, 1, False)
        return backward(grad, y, tau, seed, 0, 1, False, False)

    return call


SIZES = [(1, 10), (32, 10), (128, 320), (8, 10), (1, 1024), (32, 100), (256, 256)]

BENCHMARK = bench.Benchmark(
    CASES,
    Case({"N": 512, "K": 48}, kinds=(TRAINING, HARD_TRAINING)),
    inputs,
    implementations,
    moved,
    baseline=SOFTMAX,
    small_calls=bench.small_calls("N K", SIZES),
    rival=TORCH,
    operator=operator,
)
