"""Gaussian samples with their divergence against the eager lines, torch.compile and diffusers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tilewise as tw
from benchmarks import baselines
from benchmarks.gumbel_softmax import flops, step
from benchmarks.harness.measure import Call
from benchmarks.harness.registry import (
    EAGER,
    FORWARD,
    OURS,
    TRAINING,
    Benchmark,
    Candidate,
    Case,
    Inputs,
    matrices,
)


def sized(b: int, d: int, dtype: str = "float32", **options) -> Case:
    """A case of B latents of D elements, a multiple of 64."""
    return Case({"B": b, "D": d}, dtype, kinds=(FORWARD, TRAINING), sweep=True, **options)


CASES = (
    sized(2048, 256, quick=True),
    sized(131072, 128),
    sized(256, 16384),
    sized(64, 262144),
    sized(64, 262144, "bfloat16"),
)


def inputs(case: Case, device: str) -> Inputs:
    """Mean and logvar (B, D / 64, 8, 8), also in one tensor, and gradients of the results."""
    b, d = case.sizes.values()
    shape = b, d // 64, 8, 8
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, device=device, generator=generator).to(case.torch_dtype)

    mean, logvar = (normal(*shape).requires_grad_() for _ in range(2))
    return {
        "mean": mean, "logvar": logvar,
        "parameters": torch.cat([mean, logvar], 1).detach().requires_grad_(),
        "grads": (normal(*shape), normal(b)),
    }  # fmt: skip


def of_two(function: Callable[..., Any], needs: Callable[[Case], int]) -> Candidate:
    """A candidate that calls `function(mean, logvar)`, and in training differentiates it."""

    def build(inputs: Inputs, kind: str) -> Call:
        return step(function, [inputs["mean"], inputs["logvar"]], inputs["grads"], kind)

    return Candidate(build, needs)


def of_parameters(function: Callable[..., Any], needs: Callable[[Case], int]) -> Candidate:
    """The same for `function(parameters)`, mean and logvar in one tensor."""

    def build(inputs: Inputs, kind: str) -> Call:
        call = step(function, [inputs["parameters"]], inputs["grads"], kind)

        def separate():
            z, kl, *grads = call()
            return z, kl, *(half for grad in grads for half in grad.chunk(2, 1))

        return separate

    return Candidate(build, needs)


def module(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """tilewise's counterpart of diffusers' class."""
    posterior = tw.nn.DiagonalGaussian(parameters)
    return posterior.sample(), posterior.kl()


def candidates(device: str) -> dict[str, Candidate]:
    """Everything that samples and knows the divergence on `device`, if it is installed."""
    eager = baselines.eager_gaussian_sample
    found = {
        OURS: of_two(tw.gaussian_sample, matrices(3, "B", "D")),
        EAGER: of_two(eager, matrices(7, "B", "D")),
        "torch.compile": of_two(baselines.compiled(eager), matrices(3, "B", "D")),
        "tilewise.nn": of_parameters(module, matrices(5, "B", "D")),
    }
    if baselines.installed("diffusers"):
        theirs = baselines.diffusers_gaussian_sample
        found["diffusers"] = of_parameters(theirs, matrices(8, "B", "D"))
    return found


def moved(case: Case, kind: str) -> int:
    """Both inputs are read and z written; then inputs and a gradient read, and two written."""
    b, d = case.sizes.values()
    return (8 if kind == TRAINING else 3) * b * d * case.torch_dtype.itemsize


BENCHMARK = Benchmark(
    axis=None,
    cases=CASES,
    small=Case({"B": 256, "D": 128}),
    inputs=inputs,
    candidates=candidates,
    flops=flops,
    moved=moved,
    baseline=EAGER,
)
