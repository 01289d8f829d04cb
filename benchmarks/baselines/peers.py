"""Functions of other packages, imported when they are called."""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from tilewise.receptive_field.__main__ import import_torchvision

PEERS = ("open_clip", "diffusers", "vector_quantize_pytorch", "faiss", "sklearn")
GPU_PEERS = ("siglip_kernel", "memeff", "inf_cl", "cut_cross_entropy", "flash_kmeans")


@functools.cache
def compiled(function: Callable, mode: str = "default") -> Callable:
    """`function` through torch.compile: compiled once for all sizes, or tuned for each."""
    # Dtypes, layouts and options are each compiled for. By default the ninth would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=mode == "default", mode=mode)


def installed(package: str) -> bool:
    """Whether `package` could be imported."""
    return importlib.util.find_spec(package) is not None


def open_clip_sigmoid_loss(*, chunk_size: int = 0, **features_scale_bias: Tensor) -> Tensor:
    """open_clip's SigLipLoss; a `chunk_size` only where `open_clip_has_chunks`."""
    options = {"chunk_size": chunk_size} if chunk_size else {}
    return open_clip_loss().SigLipLoss(**options)(**features_scale_bias)


def open_clip_clip_loss(**features_scale: Tensor) -> Tensor:
    """open_clip's ClipLoss."""
    return open_clip_loss().ClipLoss()(**features_scale)


def open_clip_has_chunks() -> bool:
    """Whether the installed open_clip can compute its sigmoid loss chunk by chunk."""
    return "chunk_size" in inspect.signature(open_clip_loss().SigLipLoss).parameters


def lucidrains_quantizer(codebook: Tensor, **settings) -> torch.nn.Module:
    """lucidrains' VectorQuantize with the codes of `codebook` (K, D)."""
    package = importlib.import_module("vector_quantize_pytorch")
    codes, dim = codebook.shape
    quantizer = package.VectorQuantize(dim=dim, codebook_size=codes, **settings)
    quantizer.codebook = codebook
    return quantizer.to(codebook.device)


def lucidrains_gumbel_sample(logits: Tensor, k: int | None) -> Tensor:
    """The sampling of lucidrains' quantisers, which also makes a one-hot matrix."""
    package = importlib.import_module("vector_quantize_pytorch.vector_quantize_pytorch")
    return package.gumbel_sample(logits, stochastic=True, topk=k)[0]


def diffusers_gaussian_sample(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """A sample and its divergence by diffusers' class, whose input holds mean and logvar."""
    import_torchvision()
    vae = importlib.import_module("diffusers.models.autoencoders.vae")
    posterior = vae.DiagonalGaussianDistribution(parameters)
    return posterior.sample(), posterior.kl()


def open_clip_loss() -> ModuleType:
    """open_clip.loss, also where torchvision was built for another torch."""
    import_torchvision()
    return importlib.import_module("open_clip.loss")


@functools.cache
def open_clip_losses() -> ModuleType:
    """open_clip's loss.py alone: the package takes seconds to import."""
    found = importlib.util.find_spec("open_clip")
    assert found and found.origin, "open_clip is not installed"
    path = Path(found.origin).parent / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_losses", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
