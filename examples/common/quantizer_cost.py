"""Time and memory of one training step of a quantiser, ours beside the eager one."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

import tilewise as tw
from benchmarks.harness.measure import Call, peak_bytes_each, time_interleaved
from examples.common.autoencoders import EagerVectorQuantizer

NAMES = ("tilewise", "eager")


def quantizer(
    name: str, dim: int, codes: int, kmeans_init: bool = False, **options
) -> nn.Module:  # fmt: skip
    """A quantiser of feature maps; gradients go straight through unless the options say more."""
    if name == "eager":
        return EagerVectorQuantizer(dim, codes, **options)
    options = {"rotation_trick": False, "kmeans_init": kmeans_init, **options}
    return tw.nn.VectorQuantizer(dim, codes, accept_image_fmap=True, **options)


def prepare(name: str, path: str, device: str = "cpu") -> Call:
    """One training step, forward and backward, from the features and codes in a file."""
    saved = torch.load(path, map_location=device, weights_only=True)
    features, state = saved["features"].requires_grad_(), saved["state"]
    ours = quantizer("tilewise", features.shape[1], saved["codes"], **saved["options"]).to(device)
    if state:
        ours.load_state_dict(state)
    module = ours
    if name == "eager":
        module = quantizer("eager", features.shape[1], saved["codes"], **saved["options"])
        module.to(device).copy_state(ours)
    gradient = torch.randn_like(features)

    def step(features=features, gradient=gradient):
        quantized, _, loss = module(features)
        torch.autograd.backward([quantized, loss], [gradient, None])
        features.grad = None

    step(features[:1].detach().requires_grad_(), gradient[:1])  # one-time costs are not the batch's
    return step


def measure(
    path: Path, features: Tensor, codes: int, options: dict, state: dict | None = None,
    seconds: float = 3.0, device: str = "cpu",
) -> dict:  # fmt: skip
    """Of each quantiser the median milliseconds in this process, and the extra peak memory in MB
    in a fresh one. `features` (B, dim, h, w); `state` is that of a trained `VectorQuantizer`."""
    torch.save({"features": features, "codes": codes, "options": options, "state": state}, path)
    try:
        torch.manual_seed(0)
        calls = {name: prepare(name, str(path), device) for name in NAMES}
        times = time_interleaved(calls, device, seconds)
        del calls
        where = {"path": str(path.resolve()), "device": device}
        peaks = peak_bytes_each(prepare, [{"name": name, **where} for name in NAMES])
    finally:
        path.unlink()
    rows = features.numel() // features.shape[1]
    costs = {
        name: {"ms": statistics.median(times[name]), "peak_mb": peak / 1e6}
        for name, peak in zip(NAMES, peaks, strict=True)
    }
    return {"rows": rows, "codes": codes, "dim": features.shape[1], **costs}
