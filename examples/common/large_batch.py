"""A batch so large that the loss dominates, in the style of LiT: the image tower is locked.

The pictures are embedded once. A step then embeds the captions, computes the loss over all B x B
pairs, and sends the gradient of the text features back through the text tower chunk by chunk, so
that no more than one chunk's activations exist at a time.

    python -m examples.common.large_batch 16384 256 cpu fused eager    # time and memory, as JSON
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import tilewise as tw
from benchmarks.baselines import eager_sigmoid_loss
from benchmarks.harness.measure import Call, peak_here, time_once
from examples.common.data import Scenes
from examples.common.towers import PAD

LOSSES: dict[str, Callable] = {"fused": tw.sigmoid_loss, "eager": eager_sigmoid_loss}
CHUNK = 1024


@torch.no_grad()
def embed_scenes(image_tower, scenes: Scenes, advance=lambda count: None) -> torch.Tensor:
    """(N, dim) features of a locked tower; the drawn canvases are not kept."""
    image_tower.eval()
    features = []
    for start in range(0, len(scenes.captions), CHUNK):
        drawn = scenes.draw(slice(start, start + CHUNK))
        features.append(image_tower(drawn.to(image_tower.head.weight.device)))
        advance(len(features[-1]))
    return torch.cat(features)


def by_length(tokens: torch.Tensor) -> torch.Tensor:
    """The order of rows (N,) from short to long captions, which keeps chunks free of padding."""
    return (tokens != PAD).sum(1).argsort(stable=True)


def trimmed(tokens: torch.Tensor) -> list[torch.Tensor]:
    """Chunks of rows, each as wide as its longest caption."""
    return [part[:, : (part != PAD).sum(1).max()] for part in tokens.split(CHUNK)]


def step_text(text_tower, tokens, image_features, logit_scale, logit_bias, loss_fn):
    """Gradients of one step into the text tower and the two scalars.

    Returns the loss and the seconds spent in it (forward and backward).
    """
    chunks = [part.to(image_features.device) for part in trimmed(tokens)]
    with torch.no_grad():
        text_features = torch.cat([text_tower(part) for part in chunks])
    text_features.requires_grad_()
    began = time.perf_counter()
    loss = loss_fn(image_features, text_features, logit_scale, logit_bias)
    loss.backward()
    value = loss.item()  # waits for a GPU
    seconds = time.perf_counter() - began
    for part, gradient in zip(chunks, text_features.grad.split(CHUNK), strict=True):
        text_tower(part).backward(gradient)
    return value, seconds


# ---- time and memory of the losses


def call(name: str, batch: int, dim: int, device: str) -> Call:
    """A loss with its gradients as in the large-batch steps: text features, scale and bias get
    one, image features do not."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, batch, dim, generator=generator).to(device)
    image, text = F.normalize(drawn, dim=2).unbind()
    scalars = [torch.tensor(v, device=device, requires_grad=True) for v in (20.0, -12.0)]
    text.requires_grad_()
    small = [t[:64].detach().requires_grad_() for t in (image, text)]
    LOSSES[name](*small, *scalars).backward()  # one-time costs are not the batch's
    return lambda: LOSSES[name](image, text, *scalars).backward()


def measure_here(batch: int, dim: int, device: str, names: list[str]) -> dict[str, dict]:
    """Of each loss the extra peak memory, and the seconds of its best call: they take turns, twice
    or for half a second."""
    calls = {name: call(name, batch, dim, device) for name in names}
    costs: dict[str, dict] = {
        name: {"peak_mb": peak_here(one, device) / 1e6, "seconds": math.inf}
        for name, one in calls.items()
    }
    began, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - began < 0.5:
        for name, one in calls.items():
            costs[name]["seconds"] = min(costs[name]["seconds"], time_once(one, device) / 1000)
        rounds += 1
    return costs


def measure(batch: int, dim: int, device: str = "cpu") -> dict[str, dict | None]:
    """measure_here in a fresh process; None for a loss that needs more memory than is free."""
    names = [name for name in LOSSES if name != "eager" or _fits(batch, device)]
    command = [sys.executable, "-m", "examples.common.large_batch"]
    command += [str(batch), str(dim), device, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict.fromkeys(LOSSES) | json.loads(done.stdout)


def _fits(batch: int, device: str) -> bool:
    """Whether six matrices of logits and some air fit into the memory that is free."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0] > 7 * 4 * batch**2
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return True
    available = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemAvail"))
    return int(available.split()[1]) * 1024 > 7 * 4 * batch**2


if __name__ == "__main__":
    print(json.dumps(measure_here(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])))
