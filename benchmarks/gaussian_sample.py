"""Gaussian samples with their divergence against the eager lines, torch.compile and diffusers."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tilewise as tw
from benchmarks import baselines
from benchmarks.harness import bench
from benchmarks.harness.bench import FORWARD, TRAINING, Case


def sized(b: int, d: int, dtype: str = "float32", **options) -> Case:
    """A case of B latents of D elements."""
    return Case({"B": b, "D": d}, dtype, kinds=(FORWARD, TRAINING), sweep=True, **options)


CASES = (
    sized(2048, 256, quick=True),
    sized(131072, 128),
    sized(256, 16384),
    sized(64, 262144),
    sized(64, 262144, "bfloat16"),
)


def inputs(case: Case, device: str) -> bench.Inputs:
    """Mean and logvar (B, D / 64, 8, 8), or (B, D), and gradients of the results."""
    draw = bench.Normal(case, device)
    b, d = case.sizes.values()
    shape = (b, d) if d % 64 else (b, d // 64, 8, 8)
    mean, logvar = (draw(*shape).requires_grad_() for _ in range(2))
    return {"mean": mean, "logvar": logvar, bench.GRADS: (draw(*shape), draw(b))}


def of_parameters(
    function: Callable[..., Any], needs: Callable[[Case], int]
) -> bench.Implementation:
    """Calls `function(parameters)`, with mean and logvar in one tensor."""

    def build(inputs: bench.Inputs, kind: str) -> bench.Call:
        parameters = torch.cat([inputs["mean"], inputs["logvar"]], 1).detach().requires_grad_()
        call = bench.call_of(
            lambda: function(parameters), [parameters], kind, inputs[bench.GRADS]
        )

        def separate():
            z, kl, *grads = call()
            return z, kl, *(half for grad in grads for half in grad.chunk(2, 1))

        return separate

    return bench.Implementation(build, needs)


def module(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """tilewise's counterpart of diffusers' class."""
    posterior = tw.nn.DiagonalGaussian(parameters)
    return posterior.sample(), posterior.kl()


def implementations(device: str) -> dict[str, bench.Implementation]:
    """Everything that samples and knows the divergence on `device`, if it is installed."""
    eager, three = baselines.eager_gaussian_sample, bench.matrices(3, "B", "D")
    found = {
        bench.OURS: bench.of_function(tw.gaussian_sample, three),
        bench.EAGER: bench.of_function(eager, bench.matrices(7, "B", "D")),
        bench.COMPILED: bench.of_function(baselines.compiled(eager), three),
        "tilewise.nn": of_parameters(module, bench.matrices(5, "B", "D")),
    }
    if baselines.installed("diffusers"):
        theirs = baselines.diffusers_gaussian_sample
        found["diffusers"] = of_parameters(theirs, bench.matrices(8, "B", "D"))
    return found


def moved(case: Case, kind: str) -> int:
    """Both inputs are read and z written; then inputs and a gradient read, and two written."""
    b, d = case.sizes.values()
    return (8 if kind == TRAINING else 3) * b * d * case.torch_dtype.itemsize


def operator(inputs: bench.Inputs) -> bench.Call:
    """The dispatcher's two, forward and backward."""
    mean, logvar = inputs["mean"].detach(), inputs["logvar"].detach()
    ops, grads, seed = torch.ops.tilewise, inputs[bench.GRADS], torch.zeros((), dtype=torch.int64)
    forward, backward = ops.gaussian_sample.default, ops.gaussian_sample_backward.default
    rest = mean, logvar, seed, 0, -math.inf, math.inf

    def call():
        return *forward(*rest), *backward(*grads, *rest)

    return call


BENCHMARK = bench.Benchmark(
    CASES,
    Case({"B": 256, "D": 128}),
    inputs,
    implementations,
    moved,
    small_calls=bench.small_calls("B D", [(8, 16), (64, 128), (256, 256), (1, 16), (16, 64)]),
    operator=operator,
)
