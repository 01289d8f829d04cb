"""What a step costs at BLIP's queue of 57,600: its parts, its memory, with tilewise and without.

    python -m examples.blip.cost cpu 57600 5    # as JSON
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from argparse import Namespace

import torch
from torch import Tensor

import tilewise as tw
from benchmarks.baselines import eager_hard_negatives, eager_itc_loss
from benchmarks.harness.measure import peak_here
from examples.blip.model import Tokens
from examples.blip.training import ALPHA, MOMENTUM, Learner, match_loss
from examples.blip.world import THINGS, sentences
from examples.common.towers import PAD

BATCH, DIM = 64, 256


def eager_contrast(itc: tw.nn.ItcLoss, features, targets, ids: Tensor) -> Tensor:
    """The module's loss and queues in PyTorch's own operations."""
    candidates = torch.cat([ids, itc.id_queue])
    image, text = (
        eager_itc_loss(
            features[i], targets[1 - i], 1 / itc.temperature, positives=(ids, candidates),
            queue=(itc.text_queue, itc.image_queue)[i], teacher_query=targets[i], alpha=ALPHA,
        )
        for i in range(2)
    )  # fmt: skip
    place = (itc.queue_pointer + torch.arange(len(ids), device=ids.device)) % itc.queue_size
    queues = (itc.image_queue, targets[0]), (itc.text_queue, targets[1]), (itc.id_queue, ids)
    for queue, rows in queues:
        queue[place] = rows
    itc.queue_pointer.copy_((itc.queue_pointer + len(ids)) % itc.queue_size)
    return (image + text) / 2


class Step:
    """A step of all three losses, and how long each of its parts took."""

    def __init__(self, ours: bool, device: str, queue: int):
        torch.manual_seed(0)
        self.ours, self.device = ours, device
        self.learner = Learner(Tokens(sentences()), queue, dim=DIM).to(device)
        self.optimizer = torch.optim.AdamW(self.learner.learned(), 1e-3, fused=True)
        names = [f"{THINGS[i % 24]} above {THINGS[(i * 7 + 1) % 24]}" for i in range(BATCH)]
        self.tokens = self.learner.student.tokens(names).to(device)
        self.images = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8).to(device)
        self.ids = torch.arange(BATCH, device=device)
        self.seconds: dict[str, list[float]] = {}
        self.values: list[float] = []

    def lap(self, name: str) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.setdefault(name, []).append(now - self.began)
        self.began = now

    def __call__(self) -> None:
        self.began = time.perf_counter()
        student, teacher, itc = self.learner.student, self.learner.teacher, self.learner.itc
        self.optimizer.zero_grad()
        picture = student.picture(self.images)
        seen = student.text.look(picture)
        features = student.picture_features(picture), student.text_features(self.tokens)
        self.lap("towers")
        with torch.no_grad():
            tw.nn.momentum_update(teacher, student, MOMENTUM)
            targets = (
                teacher.picture_features(teacher.picture(self.images)),
                teacher.text_features(self.tokens),
            )
        self.lap("teacher")
        # The contrast's own backward pass is part of it: its gradient stops at the features.
        own = [x.detach().requires_grad_() for x in features]
        if self.ours:
            contrast = itc(*own, *targets, ids=self.ids)
        else:
            contrast = eager_contrast(itc, own, targets, self.ids)
        contrast.backward()
        self.lap("contrast")
        negatives = tw.hard_negatives if self.ours else eager_hard_negatives
        with torch.no_grad():
            wrong = negatives(*features, itc.logit_scale, positives=(self.ids, self.ids))
        self.lap("hard negatives")
        match = match_loss(student, seen, self.tokens, *wrong)
        self.lap("matching")
        logits = student.next_words(self.tokens, seen)
        wanted = student.tokens.ended(self.tokens)
        language = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD
        )
        self.lap("writing")
        torch.autograd.backward([match + language, *features], [None, *(x.grad for x in own)])
        self.lap("backward pass")
        self.optimizer.step()
        self.lap("optimiser")
        self.values.append(contrast.item())


def measure_here(device: str, queue: int, rounds: int) -> dict[str, dict]:
    """Of ours and of the eager step: median seconds of each part, and the extra peak memory."""
    steps = {"tilewise": Step(True, device, queue), "eager": Step(False, device, queue)}
    for step in steps.values():
        step()  # what an optimiser keeps is not the step's
    peaks = {name: peak_here(step, device) / 1e6 for name, step in steps.items()}
    for step in steps.values():
        step.seconds.clear()
    for _ in range(rounds):
        for step in steps.values():
            step()
    return {
        name: {
            "peak_mb": peaks[name], "contrast": step.values[0],
            "seconds": {part: statistics.median(x) for part, x in step.seconds.items()},
        }
        for name, step in steps.items()
    }  # fmt: skip


def measure(args: Namespace) -> dict[str, dict]:
    """measure_here in a fresh process, but for a quick look."""
    numbers = args.device, args.cost_queue, args.cost_rounds
    if args.quick:
        return measure_here(*numbers)
    command = [sys.executable, "-m", "examples.blip.cost", *map(str, numbers)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], *map(int, sys.argv[2:]))))
