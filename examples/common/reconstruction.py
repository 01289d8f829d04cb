"""How good a reconstruction is, how many codes are in use, and what must be beaten."""

from __future__ import annotations

import io
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128


def quality(images: Tensor, rebuilt: Tensor) -> dict:
    """Mean squared error of values in [0, 1], and the mean over the pictures of their PSNR in dB.

    `images` uint8, `rebuilt` uint8 or float with values in [0, 1], both (N, C, H, W).
    """
    error = (unit(images) - unit(rebuilt)).square().flatten(1).mean(1)  # (N,)
    psnr = -10 * error.clamp(min=1e-10).log10()
    return {"mse": error.mean().item(), "psnr": psnr.mean().item()}


def unit(images: Tensor) -> Tensor:
    """Values in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.clamp(0, 1)


@torch.no_grad()
def rebuild(model, images: Tensor) -> Tensor:
    """What the model makes of each picture, in evaluation mode."""
    model.eval()
    parts = on_device_of(model, images)
    return torch.cat([model(part)[0].cpu() for part in parts]).clamp(0, 1)


@torch.no_grad()
def tokenize(model, images: Tensor) -> Tensor:
    """int64 (N, h, w): the code of each cell."""
    model.eval()
    parts = on_device_of(model, images)
    return torch.cat([model.quantizer(model.encode(part))[1].cpu() for part in parts])


def on_device_of(model, images: Tensor) -> Iterator[Tensor]:
    """Chunks of the pictures, each where the model is."""
    device = next(model.parameters()).device
    return (part.to(device) for part in images.split(CHUNK))


def usage(tokens: Tensor, codes: int) -> dict:
    """How often each code occurs, how many do, and exp(entropy): as many equally common codes
    would be as hard to guess."""
    counts = tokens.flatten().bincount(minlength=codes)
    share = counts / counts.sum()
    perplexity = torch.special.entr(share).sum().exp().item()
    return {
        "counts": counts.tolist(), "used": int((counts > 0).sum()), "perplexity": perplexity
    }  # fmt: skip


# ---- baselines


def mean_image(train: Tensor, images: Tensor) -> Tensor:
    """The average training picture, whatever the picture."""
    return (train.float().mean(0) / 255).expand(images.shape)


def thumbnail(images: Tensor, bits: float) -> tuple[Tensor, int]:
    """Each picture from a smaller one of at most `bits` bits, 8 for each value; its side."""
    side = int((bits / (8 * images.shape[1])) ** 0.5)
    small = F.interpolate(images.float(), size=(side, side), mode="area").round()
    shape = images.shape[-2:]
    return F.interpolate(small / 255, size=shape, mode="bicubic", antialias=True), side


def webp(images: Tensor) -> tuple[Tensor, float]:
    """Each picture from the smallest file that WebP makes of it; bits of a file."""
    rebuilt, total = [], 0
    for image in images:
        total += 8 * len(data := _encode(image, format="WEBP", quality=0, method=6))
        rebuilt.append(_decode(data, channels=len(image)))
    return torch.stack(rebuilt), total / len(images)


def png_bits(images: Tensor) -> float:
    """Bits of a lossless file, on average."""
    return sum(8 * len(_encode(x, format="PNG", optimize=True)) for x in images) / len(images)


def _encode(image: Tensor, **options) -> bytes:
    from PIL import Image

    pixels = image.permute(1, 2, 0).squeeze(2).numpy()
    Image.fromarray(pixels).save(file := io.BytesIO(), **options)
    return file.getvalue()


def _decode(data: bytes, channels: int) -> Tensor:
    import numpy as np
    from PIL import Image

    pixels = np.array(Image.open(io.BytesIO(data)).convert("RGB" if channels == 3 else "L"))
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1)
