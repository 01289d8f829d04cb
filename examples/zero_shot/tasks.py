"""What is classified without a label: pictures, line drawings, glyphs by unseen hands, digits.

A task has a validation part, for choices, and a test part, which is looked at once.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from examples.common import glyphs, subgroups
from examples.common.data import Digits, split_digits
from examples.common.glyphs import Glyphs, describe
from examples.common.subgroups import Labelled

MEMBERS = 30  # at most so many captions of a class among its prompts
WORDS = "zero one two three four five six seven eight nine".split()


class Task(NamedTuple):
    """Which of the classes is in each picture.

    A class has one plain prompt, and an ensemble of prompts. `known` are pictures of training with
    their classes, as far as names tell: what the nearest pixel is looked for among. `plain` are
    the pictures as these see them.
    """

    title: str
    images: torch.Tensor  # uint8 (N, 3, 32, 32)
    labels: torch.Tensor  # int64 (N,)
    classes: list[str]
    one: list[list[str]]
    ensemble: list[list[str]]
    plain: torch.Tensor  # (N, ...)
    known: torch.Tensor  # (M, ...)
    known_labels: torch.Tensor  # int64 (M,)

    @property
    def majority(self) -> float:
        """What always the most frequent class gets."""
        return self.labels.bincount().max().item() / len(self.labels)

    def nearest_pixel(self) -> float:
        """What the class of the nearest known picture gets."""
        queries, known = (x.float().flatten(1) for x in (self.plain, self.known))
        nearest = torch.cdist(queries, known).argmin(1)
        return (self.known_labels[nearest] == self.labels).float().mean().item()


def tasks(test: bool, quick: bool = False) -> list[Task]:
    """All four; quick ones have 40 pictures."""
    made = [*pictures(test), hands(test), mnist(test)]
    return [first(task, 40) for task in made] if quick else made


def first(task: Task, count: int) -> Task:
    rows = torch.randperm(len(task.labels), generator=torch.Generator().manual_seed(0))[:count]
    return task._replace(
        images=task.images[rows], labels=task.labels[rows], plain=task.plain[rows]
    )


# ---- subgroups of Unicode's list


def pictures(test: bool) -> list[Task]:
    """Things that were not seen, in colors and in lines."""
    train, *held = subgroups.split()
    names = subgroups.classes()
    members: list[dict[str, str]] = [{} for _ in names]  # of each class a caption of each thing
    for text, label, stem in zip(train.captions, train.labels.tolist(), train.stems, strict=True):
        if label >= 0:
            members[label].setdefault(subgroups.plain(stem), text)
    ensemble = [[*texts.values()][:MEMBERS] for texts in members]
    labelled = train.labels >= 0
    known, known_labels = train.images[labelled], train.labels[labelled]

    def task(title: str, part: Labelled) -> Task:
        one = [[name] for name in names]
        return Task(title, part.images, part.labels, names, one, ensemble, part.images, known,
                    known_labels)  # fmt: skip

    part = held[test]
    return [task("subgroups", part), task("line drawings", subgroups.line_drawings(part))]


# ---- the same word by another hand


@cache
def taught() -> Glyphs:
    """What training sees: names that several hands have drawn, and numerals."""
    train = glyphs.split().train
    known = set(glyphs.drawn_by_several(train).names)
    known |= {name for name in train.names if name.startswith("numeric ")}
    return train.take([i for i, name in enumerate(train.names) if name in known])


def hands(test: bool) -> Task:
    """Names that training knows, drawn by Phosphor and Remix, in black on white."""
    train = taught()
    seen = set(train.names)
    part = glyphs.half(glyphs.split().designs, test)
    part = part.take([i for i, name in enumerate(part.names)
                      if name in seen and not part.crossed[i]])  # fmt: skip
    names = sorted(set(part.names))
    index = {name: i for i, name in enumerate(names)}
    rows = [i for i, name in enumerate(train.names) if name in index]
    ensemble = [
        [describe(name, *colors, outlined, False)
         for colors in (("black", "white"), ("white", "black")) for outlined in (False, True)]
        for name in names
    ]  # fmt: skip
    return Task(
        "unseen hands", 255 - part.masks[:, None].expand(-1, 3, -1, -1),
        torch.tensor([index[name] for name in part.names]), names, [[name] for name in names],
        ensemble, part.masks, train.masks[rows],
        torch.tensor([index[train.names[i]] for i in rows]),
    )  # fmt: skip


# ---- digits


def mnist(test: bool, count: int = 1000) -> Task:
    """Handwritten digits; training has seen printed ones, on keys, in boxes and in circles."""
    train = taught()
    held = split_digits()[1] if test else choices(count)
    images = enlarge(held.images)
    of = {f"numeric {i}": i for i in range(10)} | {str(i): i for i in range(10)}
    rows = [i for i, name in enumerate(train.names) if name in of]
    ensemble = [
        [f"numeric {i}", f"a white {i}, on black", f"a white numeric {i}, on black",
         f"digit {word}", f"digit {word}, combining enclosing keycap"]
        for i, word in enumerate(WORDS)
    ]  # fmt: skip
    return Task(
        "handwritten digits", images, held.labels, [str(i) for i in range(10)],
        [[f"numeric {i}"] for i in range(10)], ensemble, images[:, 0], train.masks[rows],
        torch.tensor([of[train.names[i]] for i in rows]),
    )  # fmt: skip


def choices(count: int) -> Digits:
    """Every fourth of the digits that are not for testing."""
    train, _ = split_digits()
    return Digits(train.images[::4][:count], train.labels[::4][:count])


def enlarge(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 1, 28, 28) -> (N, 3, 32, 32)."""
    return F.pad(images, (2, 2, 2, 2)).expand(-1, 3, -1, -1)
