"""What every training script here needs: seeded batches, a schedule, checkpoints, the machine."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

import torch
import torch.nn.functional as F

from examples.common.data import Pairs, Scenes, save_atomically
from examples.common.towers import Words


class Batches:
    """Batch `step` of a seeded run: single pictures, then scenes, all with different captions.

    A batch depends on the seed and its number alone, so a resumed run goes on with the very same
    batches and no state of a random generator has to be kept.
    """

    def __init__(self, train: Pairs, scenes: Scenes, per_batch: tuple[int, int], words: Words,
                 seed: int):  # fmt: skip
        self.train, self.scenes, self.words, self.seed = train, scenes, words, seed
        self.singles, self.drawn = per_batch

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 (B, 3, 64, 64) and tokens int64 (B, L)."""
        epoch, i = divmod(step, len(self.train.captions) // self.singles)
        order = torch.randperm(len(self.train.captions), generator=self._generator("epoch", epoch))
        singles = self.train.take(order[i * self.singles : (i + 1) * self.singles].tolist())
        rows = slice(step * self.drawn, (step + 1) * self.drawn)
        shifted = shift(singles.images, self._generator("shift", step))
        images = torch.cat([shifted, self.scenes.draw(rows)])
        return images, self.words(singles.captions + self.scenes.captions[rows])

    def _generator(self, stream: str, number: int) -> torch.Generator:
        streams = ("epoch", "shift")
        seed = (self.seed * len(streams) + streams.index(stream)) * 1_000_003 + number
        return torch.Generator().manual_seed(seed)


def shift(images: torch.Tensor, generator: torch.Generator, most: int = 1) -> torch.Tensor:
    """Each picture moved by up to `most` pixels, white coming in. No flips: "left" would lie."""
    count, _, height, width = images.shape
    padded = F.pad(images, (most, most, most, most), value=255)
    dy, dx = torch.randint(0, 2 * most + 1, (2, count, 1), generator=generator)
    rows = (dy + torch.arange(height))[:, :, None]  # (N, H, 1)
    columns = (dx + torch.arange(width))[:, None, :]  # (N, 1, W)
    picture = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[picture, rows, columns].permute(0, 3, 1, 2)


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """The factor on a learning rate: up in a line, down in a half cosine."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def save_checkpoint(path: Path, model, optimizer, settings: dict, history: dict) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_atomically({**state, "settings": settings, "history": history}, path)


def load_checkpoint(path: Path, model, optimizer, settings: dict) -> dict:
    """The history so far; model and optimizer take up the stored state."""
    state = torch.load(path, weights_only=True)
    if state["settings"] != settings:
        raise SystemExit(f"{path} belongs to a run with {state['settings']}, this one: {settings}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["history"]


def machine() -> str:
    """Processor, threads and torch version: what every measured number depends on."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            models = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
        name = models[0] if models else name
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({capability}), {torch.get_num_threads()} threads, torch {torch.__version__}"
