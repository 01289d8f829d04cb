"""What the contracts of the Triton backend have to know of each op. A new op adds one entry."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from tests.backends import contrast_adapters
from tests.backends.contrast_adapters import CONTRASTS

SEED = torch.tensor(-5)


@dataclass(frozen=True)
class Adapter:
    """`problem(dtype)` makes the op's float tensors by name, `run` gives its kernels' results."""

    op: str
    problem: Callable[[torch.dtype], dict[str, Tensor]]
    run: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
    refused: tuple[str, ...]  # tensors that may not be float64
    small: Mapping[str, int] = field(default_factory=dict)  # globals of the module: many chunks
    columns_apart: int = 1  # the largest stride in a row that needs no copy

    @property
    def kernels(self) -> ModuleType:
        return importlib.import_module(f"tilewise.kernels.{self.op}")


def of_contrast(name: str) -> Adapter:
    contrast = CONTRASTS[name]
    problem = contrast.make(20, 20, 16)

    def tensors(dtype):
        return {k: x for k, x in contrast.tensors(problem, dtype).items() if x is not None}

    def run(tensors):
        missing = dict.fromkeys(contrast.tensors(problem, torch.float32))
        return contrast.run(problem, missing | tensors)

    return Adapter(name, tensors, run, contrast_adapters.names_of(contrast)[:1], contrast.small)


def random_tensors(*names: str, shape: tuple[int, ...]):
    def problem(dtype):
        generator = torch.Generator().manual_seed(0)
        return {name: torch.randn(shape, generator=generator).to(dtype) for name in names}

    return problem


def run_nearest_code(tensors):
    from tilewise.kernels import nearest_code as kernels

    x, codebook = tensors["x"], tensors["codebook"]
    mask, results = torch.arange(x.shape[1]).expand(len(x), -1) % 3 > 0, []
    for small in (0, 2**30):  # filtered, exhaustive
        with mock.patch.dict(kernels.SMALL, interpreter=small):
            results += kernels.nearest_code(x, codebook, "cosine", 2, mask, None)
    return tuple(results)


def run_code_sums(tensors):
    from tilewise.kernels import code_sums as kernels

    x = tensors["x"]
    index = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) * 7 % 11 % 6 - 1
    return kernels.code_sums(x, index, 5)


def run_gumbel_softmax(tensors):
    from tilewise.kernels import gumbel_softmax as kernels

    logits, rest = tensors["logits"], (torch.tensor(0.7), SEED, 2**33, 1)
    soft, hard = (kernels.gumbel_softmax(logits, *rest, hard) for hard in (False, True))
    return soft, hard, *(
        x for saved, hard in ((soft, False), (logits, True))
        for x in kernels.gumbel_softmax_backward(tensors["grad"], saved, *rest, hard, True)
    )


def run_gumbel_argmax(tensors):
    from tilewise.kernels import gumbel_argmax as kernels

    return tuple(
        x for k in (1, 3) for x in kernels.gumbel_argmax(tensors["logits"], SEED, 9, 1, k, True)
    )


def run_gaussian_sample(tensors):
    from tilewise.kernels import gaussian_sample as kernels

    mean, logvar = tensors["mean"], tensors["logvar"]
    rest = SEED, -7, -30.0, 20.0
    z, kl = kernels.gaussian_sample(mean, logvar, *rest)
    return z, kl, *kernels.gaussian_sample_backward(
        tensors["d_z"], torch.ones(len(mean)), mean, logvar, *rest
    )


ADAPTERS = [
    *map(of_contrast, CONTRASTS),
    Adapter(
        "nearest_code", random_tensors("x", "codebook", shape=(2, 7, 12)), run_nearest_code,
        ("x", "codebook"),
    ),
    Adapter("code_sums", random_tensors("x", shape=(2, 7, 12)), run_code_sums, ("x",)),
    Adapter(
        "gumbel_softmax", random_tensors("logits", "grad", shape=(6, 12)), run_gumbel_softmax,
        ("logits",), columns_apart=3,
    ),
    Adapter(
        "gumbel_argmax", random_tensors("logits", shape=(6, 12)), run_gumbel_argmax, ("logits",),
        columns_apart=3,
    ),
    Adapter(
        "gaussian_sample", random_tensors("mean", "logvar", "d_z", shape=(6, 12)),
        run_gaussian_sample, ("mean",), columns_apart=3,
    ),
]
