"""A batch so large that the loss dominates, in the style of LiT: the image tower is locked.

The pictures are embedded once. A step then embeds the captions, computes the loss over all B x B
pairs, and sends the gradient of the text features back through the text tower chunk by chunk, so
that no more than one chunk's activations exist at a time.

    python -m examples.common.large_batch SigLIP 16384 256 cpu locked fused eager  # JSON
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.table import Table

from benchmarks.harness.measure import Call, peak_here, time_once
from examples.common import report
from examples.common.data import Scenes
from examples.common.supervision import LOSSES, apply
from examples.common.towers import PAD, embed
from examples.common.training import Run

CHUNK = 1024


def embed_scenes(
    image_tower, scenes: Scenes, advance=lambda count: None, method: str = "forward"
) -> torch.Tensor:
    """(N, dim) features of a locked tower, by one of its methods; no drawn canvas is kept."""
    features = []
    for start in range(0, len(scenes.captions), CHUNK):
        drawn = scenes.draw(slice(start, start + CHUNK))
        features.append(embed(image_tower, drawn, method))
        advance(len(features[-1]))
    return torch.cat(features).to(image_tower.head.weight.device)


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


def call(name: str, kind: str, batch: int, dim: int, device: str, towers: str) -> Call:
    """A loss with its gradients. Where the image tower is "locked" as in the large-batch steps,
    text features, scale and bias get one, image features do not; otherwise "both" do."""
    loss = LOSSES[kind][name]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, batch, dim, generator=generator).to(device)
    image, text = F.normalize(drawn, dim=2).unbind()
    scalars = [torch.tensor(v, device=device, requires_grad=True) for v in (20.0, -12.0)]
    text.requires_grad_()
    image.requires_grad_(towers == "both")
    small = [t[:64].detach().requires_grad_() for t in (image, text)]
    apply(loss, *small, *scalars).backward()  # one-time costs are not the batch's
    return lambda: apply(loss, image, text, *scalars).backward()


def measure_here(
    kind: str, batch: int, dim: int, device: str, towers: str, names: list[str]
) -> dict[str, dict]:
    """Of each loss the extra peak memory, and the seconds of its best call: they take turns, twice
    or for half a second."""
    calls = {name: call(name, kind, batch, dim, device, towers) for name in names}
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


def measure(
    batch: int, dim: int, device: str = "cpu", kind: str = "SigLIP", towers: str = "locked"
) -> dict[str, dict | None]:
    """measure_here in a fresh process; None for a loss that needs more memory than is free."""
    names = [name for name in LOSSES[kind] if name != "eager" or _fits(batch, device)]
    command = [sys.executable, "-m", "examples.common.large_batch", kind]
    command += [str(batch), str(dim), device, towers, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict.fromkeys(LOSSES[kind]) | json.loads(done.stdout)


def beside_eager(
    runs: dict[str, dict[str, Run]], batch: int, dim: int, device: str, advance=lambda: None
) -> dict:
    """Of {kind: {"fused": a run, "eager": a run}} the median step, and what the losses alone cost:
    {"steps": {kind: {name: seconds}}, "alone": {kind: {name: seconds and peak_mb}}}."""
    steps = {
        kind: {name: statistics.median(run.history["seconds"]) for name, run in both.items()}
        for kind, both in runs.items()
    }
    alone = {}
    for kind in runs:
        alone[kind] = measure(batch, dim, device, kind, "both")
        advance()
    return {"steps": steps, "alone": alone}


def cost_table(title: str, cost: dict) -> Table:
    """Of what beside_eager found."""
    made = report.table(title, ["a step", "of it the loss", "the loss's memory"])
    for kind, both in cost["alone"].items():
        for name, one in both.items():
            alone = ["", "too much"] if one is None else [
                report.duration(one["seconds"]), report.memory(one["peak_mb"])]  # fmt: skip
            made.add_row(f"{kind}, {name}", report.duration(cost["steps"][kind][name]), *alone)
    return made


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
    kind_, batch_, dim_, *rest = sys.argv[1:]
    print(json.dumps(measure_here(kind_, int(batch_), int(dim_), *rest[:2], rest[2:])))
