"""What every training script here needs: runs side by side, with checkpoints and progress.

    class Mine(Run):
        def step(self, step): ...            # one step of training; appends to self.history

    args = arguments(__doc__, Path("out/mine"), every=25).parse_args()
    with progress(console) as bars:
        train([Mine(...), Mine(...)], bars, args.every, args.resume)

Runs take turns, step by step: a slow moment of the machine meets all that are compared.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from examples.common import report
from examples.common.data import Pairs, Scenes, save_atomically
from examples.common.glyphs import Painted
from examples.common.towers import Words

Found = TypeVar("Found")


class Batches:
    """Batch `step` of a seeded run: single pictures, then scenes or painted glyphs where there are
    any, all with different captions.

    A batch depends on the seed and its number alone, so a resumed run goes on with the very same
    batches and no state of a random generator has to be kept.
    """

    def __init__(self, train: Pairs, scenes: Scenes | Painted | None, per_batch: tuple[int, int],
                 words: Words, seed: int):  # fmt: skip
        self.train, self.scenes, self.words, self.seed = train, scenes, words, seed
        self.singles, self.drawn = per_batch
        self.latest: tuple = (None, None)

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 (B, 3, H, W) and tokens int64 (B, L); made once for runs that share it."""
        if self.latest[0] != step:
            self.latest = step, self._make(step)
        return self.latest[1]

    def _make(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, i = divmod(step, len(self.train.captions) // self.singles)
        order = torch.randperm(len(self.train.captions), generator=self._generator("epoch", epoch))
        singles = self.train.take(order[i * self.singles : (i + 1) * self.singles].tolist())
        shifted = shift(singles.images, self._generator("shift", step))
        if self.scenes is None:
            return shifted, self.words(singles.captions)
        rows = slice(step * self.drawn, (step + 1) * self.drawn)
        images = torch.cat([shifted, self.scenes.draw(rows)])
        return images, self.words(singles.captions + self.scenes.captions[rows])

    def _generator(self, stream: str, number: int) -> torch.Generator:
        streams = ("epoch", "shift")
        seed = (self.seed * len(streams) + streams.index(stream)) * 1_000_003 + number
        return torch.Generator().manual_seed(seed)


def batch_rows(step: int, count: int, size: int, seed: int) -> torch.Tensor:
    """Which `size` of `count` rows are batch `step`, by its number and the seed alone; an epoch has
    each row at most once."""
    epoch, i = divmod(step, max(1, count // size))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)[i * size : (i + 1) * size]


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


def optimize(optimizer: torch.optim.Optimizer, step: int, steps: int, warmup: int = 20) -> None:
    """One step of it at the scheduled share of each group's "peak" rate; gradients are cleared."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * warmup_cosine(step, steps, warmup)
    optimizer.step()
    optimizer.zero_grad()


class Run:
    """One training run: what a checkpoint holds, and how to go on from it.

    A step may depend on nothing but its number and what the checkpoint holds. `history` has a list
    for each of `names`; "loss" and "seconds" have an entry for every step.
    """

    followed = False  # whether others go on from its optimizer's state, which is then kept

    def __init__(
        self, label: str, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer,
        steps: int, settings: dict, names: tuple[str, ...] = (),
    ):  # fmt: skip
        self.label, self.path, self.model, self.optimizer = label, path, model, optimizer
        self.steps, self.settings = steps, settings
        self.history: dict[str, list] = {name: [] for name in ("loss", "seconds", *names)}

    def step(self, step: int) -> None:
        """One step of training, which is timed; appends the loss to the history."""
        raise NotImplementedError

    def before(self, step: int) -> None:
        """What comes before a step and is not timed, as making its batch."""

    def after(self, step: int) -> None:
        """What comes after it and is not timed, as comparisons."""

    def evaluate(self) -> None:
        """What comes before a checkpoint."""

    def note(self) -> str:
        """The text beside the progress bar."""
        return f"loss {self.history['loss'][-1]:.3f}"

    @property
    def done(self) -> int:
        """Steps so far."""
        return len(self.history["loss"])

    def advance(self, every: int) -> None:
        """The next step; every so often, and at the end, a checkpoint."""
        step = self.done
        self.model.train()
        self.before(step)
        began = time.perf_counter()
        self.step(step)
        self.history["seconds"].append(time.perf_counter() - began)
        self.after(step)
        if self.done % every == 0 or self.done == self.steps:
            self.evaluate()
            self.save()

    def save(self) -> None:
        """The optimizer's state too, two thirds of it all, as long as there are steps to come."""
        ended = self.done == self.steps and not self.followed
        optimizer = None if ended else self.optimizer.state_dict()
        state = {"model": self.model.state_dict(), "optimizer": optimizer}
        save_atomically({**state, "settings": self.settings, "history": self.history}, self.path)

    def load(self) -> None:
        """Takes up the stored state."""
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if state["settings"] != self.settings:
            raise SystemExit(
                f"{self.path} belongs to a run with {state['settings']}, this one: {self.settings}"
            )
        self.model.load_state_dict(state["model"])
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]


def train(
    runs: list[Run], bars: Progress, every: int, resume: bool = False, label: str = ""
) -> None:
    """All steps of all runs in turn, the first run first in every other step.

    With a `label` they share a bar, otherwise each has its own.
    """
    for run in runs:
        if resume and run.path.exists():
            run.load()
    if label:
        total, done = sum(run.steps for run in runs), sum(run.done for run in runs)
        tasks = dict.fromkeys(runs, bars.add_task(label, total=total, completed=done, note=""))
    else:
        tasks = {
            run: bars.add_task(run.label, total=run.steps, completed=run.done, note="")
            for run in runs
        }
    for step in range(max(run.steps for run in runs)):
        for run in runs if step % 2 == 0 else reversed(runs):
            if run.done == step < run.steps:
                run.advance(every)
                bars.update(tasks[run], advance=1, note=run.note())


def progress(console: Console) -> Progress:
    """Bars with the time so far and a note."""
    return Progress(
        TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("{task.fields[note]}"), console=console,
    )  # fmt: skip


def arguments(
    description: str, out: Path, every: int | None = None, resumes: bool = True,
    on_device: bool = False,
) -> argparse.ArgumentParser:
    """A parser with what every script takes; "--quick" is for the script to act on.

    Args:
        out: the folder that "--out" names otherwise.
        every: steps between checkpoints, or measurements where nothing is resumed; None: neither.
        resumes: whether checkpoints are kept, from which "--resume" goes on.
        on_device: whether it trains where "--device" says. What is drawn from a seed is drawn on
            the CPU all the same, so that a seed means the same everywhere.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    if every is not None:
        what = "checkpoints" if resumes else "measurements"
        add("--every", type=int, default=every, help=f"steps between {what}")
    if resumes:
        add("--resume", action="store_true", help="continue from the checkpoints in --out")
    add("--seed", type=int, default=0, help="of weights, batches and all that is drawn")
    add("--out", type=Path, default=out, help="folder of everything written")
    add("--quick", action="store_true", help="few steps: a look at every stage")
    if on_device:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        add("--device", default=default, help="where models are trained (default: %(default)s)")
    return parser


def conduct(
    title: str, args: argparse.Namespace, run: Callable[[argparse.Namespace, Progress], Found]
) -> tuple[Console, Found]:
    """Runs a script's work, `run(args, bars)`, under a headline and bars; makes the folder of its
    results. Returns where it prints, and what was found."""
    args.out.mkdir(parents=True, exist_ok=True)
    console = report.console()
    console.print(f"[bold]{title}[/] on {report.machine(getattr(args, 'device', 'cpu'))}")
    with progress(console) as bars:
        return console, run(args, bars)
