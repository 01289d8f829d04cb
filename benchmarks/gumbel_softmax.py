"""Relaxed and one-hot samples against torch's function, torch.distributions and a bare softmax."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tilewise as tw
from benchmarks import baselines
from benchmarks.baselines import SOFTMAX
from benchmarks.harness.measure import Call
from benchmarks.harness.registry import (
    FORWARD,
    OURS,
    TRAINING,
    Benchmark,
    Candidate,
    Case,
    Inputs,
    matrices,
)

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


def inputs(case: Case, device: str) -> Inputs:
    """Logits, the categories' dimension, and a gradient of the sample; the same in every run."""
    n, k = case.sizes.values()
    shape = (n // 1024, k, 32, 32) if case.data == INNER else (n, k)
    generator = torch.Generator(device).manual_seed(0)
    logits, grad = (
        torch.randn(shape, device=device, generator=generator).to(case.torch_dtype)
        for _ in range(2)
    )
    return {"logits": logits.requires_grad_(), "dim": 1, "grads": (grad,)}


def sampler(function: Callable[..., Any], needs: Callable[[Case], int]) -> Candidate:
    """A candidate that calls `function(logits, hard, dim)`, and in training differentiates it."""

    def build(inputs: Inputs, kind: str) -> Call:
        hard = kind.startswith(HARD)
        return step(
            lambda logits: function(logits, hard, inputs["dim"]),
            [inputs["logits"]], inputs["grads"], kind.removeprefix(HARD),
        )  # fmt: skip

    return Candidate(build, needs)


def step(
    function: Callable[..., Any], arguments: list[Tensor], grads: tuple[Tensor, ...], kind: str
) -> Call:
    """A call of `function` that, in training, goes backward from the gradients of its results.

    It returns a tuple: the results and, in training, the gradients of the arguments.
    """

    def results() -> tuple[Tensor, ...]:
        result = function(*arguments)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def forward():
        with torch.no_grad():
            return results()

    def training():
        made = results()
        # Rounded to a result's own dtype: that of a sum may be another one.
        given = [grad.to(x.dtype) for grad, x in zip(grads, made, strict=True)]
        return *(x.detach() for x in made), *torch.autograd.grad(made, arguments, given)

    return training if kind == TRAINING else forward


def ours(logits: Tensor, hard: bool, dim: int) -> Tensor:
    """tilewise's function, in the order of the others' arguments."""
    return tw.gumbel_softmax(logits, hard=hard, dim=dim)


def softmax(logits: Tensor, hard: bool, dim: int) -> Tensor:
    """The softmax alone."""
    return torch.softmax(logits, dim)


def candidates(device: str) -> dict[str, Candidate]:
    """Everything that samples on `device`, and a softmax."""
    return {
        OURS: sampler(ours, matrices(2, "N", "K")),
        SOFTMAX: sampler(softmax, matrices(2, "N", "K")),
        TORCH: sampler(baselines.gumbel_softmax, matrices(5, "N", "K")),
        "torch.compile": sampler(
            baselines.compiled(baselines.gumbel_softmax), matrices(3, "N", "K")
        ),
        "torch.distributions": sampler(baselines.relaxed_one_hot, matrices(6, "N", "K")),
    }


def flops(case: Case, kind: str) -> int:
    """There is no matrix product."""
    return 0


def moved(case: Case, kind: str) -> int:
    """Logits are read and the sample written; then both gradients, and what was kept is read."""
    tensors = 5 if kind.endswith(TRAINING) else 2
    return tensors * case.sizes["N"] * case.sizes["K"] * case.torch_dtype.itemsize


BENCHMARK = Benchmark(
    axis=None,
    cases=CASES,
    small=Case({"N": 512, "K": 48}, kinds=(TRAINING, HARD_TRAINING)),
    inputs=inputs,
    candidates=candidates,
    flops=flops,
    moved=moved,
    baseline=SOFTMAX,
)
