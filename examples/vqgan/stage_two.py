"""The training run of stage two, and how likely it finds pictures."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.data import Pairs
from examples.common.training import Run, batch_rows, optimize
from examples.vqgan.transformer import Transformer, nothing, read
from examples.vqgan.world import Data, mixed


class Sequences(NamedTuple):
    """Pictures as rows of codes (N, length), with their captions as words (N, WORDS)."""

    codes: Tensor
    words: Tensor


class Sets(NamedTuple):
    """Sequences of single pictures and scenes to learn from, and of held-out pictures."""

    singles: Sequences
    drawn: Sequences
    validation: Sequences
    test: Sequences
    test_scenes: Sequences


def sets(world: Data, to_codes) -> Sets:
    """`to_codes` makes int64 (N, length) of pictures uint8 (N, 3, 64, 64)."""
    drawn = Pairs(world.drawn.draw(), world.drawn.captions)
    every = (world.seen, drawn, world.validation, world.test, world.test_scenes)
    return Sets(*(
        Sequences(to_codes(part.images).flatten(1), read(world.words, part.captions))
        for part in every
    ))  # fmt: skip


class SequenceRun(Run):
    """A transformer learns the codes of pictures, the next from those before it and the caption.

    One caption in ten is left out, so that it also learns what pictures look like without one:
    classifier-free guidance (Ho and Salimans 2022) needs both.
    """

    def __init__(
        self, label: str, path: Path, model: Transformer, found: Sets, args: argparse.Namespace,
        steps: int, batch: tuple[int, int],
    ):  # fmt: skip
        super().__init__(
            label, path, model,
            torch.optim.AdamW(
                [{"params": model.parameters(), "peak": args.rate}], betas=(0.9, 0.95),
                weight_decay=0.05,
            ), steps,
            {"steps": steps, "seed": args.seed, "sum of codes": int(found.singles.codes.sum())},
            ("heldout",),
        )  # fmt: skip
        self.found, self.batch, self.seed = found, batch, args.seed
        self.args = args

    def before(self, step: int) -> None:
        parts = [
            _rows(part, step, size, self.seed)
            for part, size in zip(self.found[:2], self.batch, strict=True)
        ]
        self.codes, words = (torch.cat(both) for both in zip(*parts, strict=True))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        without = torch.rand(len(words), 1, generator=generator) < 0.1
        self.words = torch.where(without, nothing(len(words)), words)

    def step(self, step: int) -> None:
        with mixed(self.args):
            logits = self.model(self.words, self.codes).float()
        loss = F.cross_entropy(logits.flatten(0, 1), self.codes.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimize(self.optimizer, step, self.steps, warmup=50)
        self.history["loss"].append(loss.item())

    def evaluate(self) -> None:
        few = max(4, self.args.looked_at // self.model.length)  # about as many codes
        part = Sequences(*(x[:few] for x in self.found.validation))
        self.history["heldout"].append([self.done, nats(self.model, part)])

    def note(self) -> str:
        text = f"{statistics.mean(self.history['loss'][-20:]):.3f} nats"
        if self.history["heldout"]:
            text += f"   held out {self.history['heldout'][-1][1]:.3f}"
        return text


def _rows(part: Sequences, step: int, size: int, seed: int) -> Sequences:
    rows = batch_rows(step, len(part.codes), size, seed)
    return Sequences(part.codes[rows], part.words[rows])


@torch.no_grad()
def nats(model: Transformer, part: Sequences, captions: bool = True) -> float:
    """Negative log-likelihood a code, with their captions or without any."""
    model.eval()
    total = 0.0
    size = max(1, 8192 // model.length)
    for codes, words in zip(part.codes.split(size), part.words.split(size), strict=True):
        logits = model(words if captions else nothing(len(words)), codes)
        total += F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="sum").item()
    return total / part.codes.numel()
