"""Training runs: which losses, with the queue and the soft targets or without, on which pairs."""

from __future__ import annotations

import copy
import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewise as tw
from examples.blip.model import Blip, Tokens, rows_of
from examples.blip.world import Captioned, Questions
from examples.common.towers import PAD
from examples.common.training import Run, batch_rows, optimize

BATCH, QUEUE = 32, 512
MOMENTUM = 0.98  # of the teacher. Published: 0.995, in runs a thousand times as long
ALPHA = 0.4  # the teacher's part of the targets, after a ramp
SMOOTHING = 0.1
SLOW = 0.3  # of the learning rate, for what goes on from a trained model


class Pool(NamedTuple):
    """Pairs to learn from: caption i is said of picture `picture[i]`."""

    images: Tensor  # uint8 (N, views, 3, 32, 32)
    picture: Tensor  # int64 (P,)
    captions: list[str]


def pool(data: Captioned) -> Pool:
    return Pool(data.images, torch.arange(len(data.captions)), data.captions)


class Kind(NamedTuple):
    """What a model is trained with."""

    itc: bool = True
    itm: bool = True
    lm: bool = True
    queue: bool = True
    soft: bool = True


KINDS = {
    "BLIP": Kind(),
    "BLIP, no queue": Kind(queue=False),
    "BLIP, no soft targets": Kind(soft=False),
    "ITC + ITM": Kind(lm=False),
    "ITC + ITM, no queue": Kind(lm=False, queue=False),
    "ITC + ITM, no soft targets": Kind(lm=False, soft=False),
    "ITC": Kind(itm=False, lm=False),
    "ITC, no queue": Kind(itm=False, lm=False, queue=False),
    "ITC, no soft targets": Kind(itm=False, lm=False, soft=False),
    "LM": Kind(itc=False, itm=False),
}


class Learner(nn.Module):
    """The student, its teacher, and the contrast's queues and temperature."""

    def __init__(self, tokens: Tokens, queue: int, **sizes):
        super().__init__()
        self.student = Blip(tokens, **sizes)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        dim = self.student.text_head.out_features
        self.itc = tw.nn.ItcLoss(dim, queue_size=queue, alpha=ALPHA)

    def learned(self) -> list[nn.Parameter]:
        return [*self.student.parameters(), self.itc.temperature]


def losses(learner: Learner, kind: Kind, images: Tensor, tokens: Tensor, ids: Tensor,
           alpha: float, seed: int) -> dict[str, Tensor]:  # fmt: skip
    """Of a batch, where rows with equal ids show the same picture. The batch is then enqueued.

    Matching needs the contrast, whose features choose its wrong pairs.
    """
    student = learner.student
    picture = student.picture(images)
    seen = student.text.look(picture) if kind.itm or kind.lm else []
    found = {}
    if kind.itc:
        features = student.picture_features(picture), student.text_features(tokens)
        with torch.no_grad():
            tw.nn.momentum_update(learner.teacher, student, MOMENTUM)
            teacher = learner.teacher
            targets = (
                teacher.picture_features(teacher.picture(images)), teacher.text_features(tokens)
            )  # fmt: skip
        found["itc"] = learner.itc(*features, *targets, ids=ids, alpha=alpha)
    if kind.itm:
        wrong = tw.hard_negatives(
            *features, learner.itc.logit_scale, positives=(ids, ids), seed=seed
        )
        found["itm"] = match_loss(student, seen, tokens, *wrong)
    if kind.lm:
        logits = student.next_words(tokens, seen)
        found["lm"] = F.cross_entropy(
            logits.flatten(0, 1), student.tokens.ended(tokens).flatten(),
            ignore_index=PAD, label_smoothing=SMOOTHING,
        )  # fmt: skip
    return found


def match_loss(model: Blip, seen, tokens: Tensor, wrong_text: Tensor, wrong_image: Tensor):
    """Each pair, each picture with a wrong text, each text with a wrong picture."""
    own = torch.arange(len(tokens), device=tokens.device)
    pictures, texts = torch.cat([own, own, wrong_image]), torch.cat([own, wrong_text, own])
    logits = model.matches(tokens[texts], rows_of(seen, pictures))
    return F.cross_entropy(logits, (torch.arange(len(texts), device=own.device) < len(own)).long())


class BlipRun(Run):
    """Training on a pool; `begin` has the weights that it goes on from, more slowly."""

    def __init__(self, label: str, kind: Kind, data: Pool, tokens: Tokens, args, seed: int,
                 steps: int, begin: Learner | None = None):  # fmt: skip
        torch.manual_seed(seed)
        learner = Learner(tokens, QUEUE if kind.queue else 0, **args.sizes)
        if begin is not None:
            learner.load_state_dict(begin.state_dict())
        learner.to(args.device)
        super().__init__(
            f"{label}, seed {seed}", args.out / f"{file_name(label)}-{seed}.pt", learner,
            adam(learner.learned(), args.rate * (1 if begin is None else SLOW)), steps,
            {"steps": steps, "seed": seed}, ("itc", "itm", "lm"),
        )  # fmt: skip
        self.kind, self.data, self.seed, self.device = kind, data, seed, args.device
        self.tokens = tokens(data.captions)

    def before(self, step: int) -> None:
        rows = batch_rows(step, len(self.tokens), BATCH, self.seed)
        ids = self.data.picture[rows]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        view = torch.randint(self.data.images.shape[1], (BATCH,), generator=generator)
        batch = self.data.images[ids, view], self.tokens[rows], ids
        self.batch = [part.to(self.device) for part in batch]

    def step(self, step: int) -> None:
        alpha = ALPHA * min(1.0, step / (0.3 * self.steps)) if self.kind.soft else 0.0
        parts = losses(self.model, self.kind, *self.batch, alpha, seed=self.seed * 10_007 + step)
        loss = sum(parts.values())
        loss.backward()
        optimize(self.optimizer, step, self.steps)
        self.history["loss"].append(loss.item())
        for name, part in parts.items():
            self.history[name].append(part.item())

    def note(self) -> str:
        latest = ((name, self.history[name][-20:]) for name in ("itc", "itm", "lm"))
        return "  ".join(f"{name} {statistics.mean(x):.2f}" for name, x in latest if x)


class AnswerRun(Run):
    """Questions and answers, from a trained model. `blind`: every picture is white."""

    def __init__(self, label: str, begin: Blip, data: Questions, args, seed: int, steps: int,
                 blind: bool):  # fmt: skip
        torch.manual_seed(seed)
        model = copy.deepcopy(begin).to(args.device)
        super().__init__(
            f"{label}, seed {seed}", args.out / f"{file_name(label)}-{seed}.pt", model,
            adam(list(model.parameters()), args.rate), steps, {"steps": steps, "seed": seed},
        )  # fmt: skip
        self.data, self.seed, self.blind = data, seed, blind
        both = [f"{q} {a}" for q, a in zip(data.questions, data.answers, strict=True)]
        self.tokens = model.tokens(both)
        self.asked = (model.tokens(data.questions) != PAD).sum(1)  # (N,) words of the question

    def before(self, step: int) -> None:
        rows = batch_rows(step, len(self.tokens), BATCH, self.seed)
        images = blanked(self.data.images[rows], self.blind)
        self.batch = images, self.tokens[rows], self.asked[rows]

    def step(self, step: int) -> None:
        device = next(self.model.parameters()).device
        images, tokens, asked = (part.to(device) for part in self.batch)
        model = self.model
        logits = model.next_words(tokens, model.text.look(model.picture(images)))
        wanted = model.tokens.ended(tokens)
        question = torch.arange(wanted.shape[1], device=device) < asked[:, None]
        loss = F.cross_entropy(
            logits.flatten(0, 1), wanted.masked_fill(question, PAD).flatten(), ignore_index=PAD
        )
        loss.backward()
        optimize(self.optimizer, step, self.steps)
        self.history["loss"].append(loss.item())


def blanked(images: Tensor, blind: bool) -> Tensor:
    return torch.full_like(images, 255) if blind else images


def adam(parameters: list, rate: float) -> torch.optim.Optimizer:
    """Its rate is set by `optimize`."""
    fused = not parameters[0].is_meta
    group = {"params": parameters, "peak": rate}
    return torch.optim.AdamW([group], weight_decay=0.01, fused=fused)


def file_name(label: str) -> str:
    return label.lower().replace(" + ", "-").replace(", ", "-").replace(" ", "-")
