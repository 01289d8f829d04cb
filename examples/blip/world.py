"""A small world: scenes of a few things, true captions, noisy ones, and questions.

24 OpenMoji pictures whose names are two words, on canvases of 32 x 32. Two things above each other
or side by side make a captioned scene, "green heart above cat face". A pair of things belongs to
one part of the data, in all four arrangements: no model sees a pair of another part together.
"below" and "right of" are for questions alone, so that a scene has one caption.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from examples.common.data import (
    ABOVE,
    BESIDE,
    CORNERS,
    SLIDE,
    TILE,
    Scenes,
    describe,
    fraction,
    halved,
    pairs,
)

THINGS = (
    "cat face", "dog face", "pig face", "frog face", "tiger face", "panda face",
    "blue heart", "green heart", "yellow heart", "purple heart",
    "blue book", "green book", "orange book", "red apple", "green apple",
    "evergreen tree", "palm tree", "christmas tree", "soccer ball", "crystal ball",
    "police car", "racing car", "birthday cake", "tropical fish",
)  # fmt: skip
PARTS = {"test": (0, 1 / 8), "validation": (1 / 8, 1 / 4), "train": (1 / 4, 1)}
VIEWS = 4  # drawings of one training scene: things slide along their halves
SHARES = {"wrong": 0.3, "vague": 0.3}  # of the captions of a noisy pool
COUNTS = ("two", "three", "four")
HOW_MANY = "how many things"
NOTHING = -1
SPOTS = torch.tensor(list(CORNERS.values()))  # (4, 2)
BESIDES = {"above": {2: 0, 3: 1}, "below": {0: 2, 1: 3}, "left of": {1: 0, 3: 2},
           "right of": {0: 1, 2: 3}}  # fmt: skip  # where an answer stands, by where its thing does


class Scene(NamedTuple):
    kind: int  # ABOVE or BESIDE
    things: tuple[int, int]  # upper and lower, or left and right

    @property
    def caption(self) -> str:
        return describe(self.kind, [THINGS[i] for i in self.things], swap=False)


class Captioned(NamedTuple):
    """Row i of `images` is described by `captions[i]`, and by no other caption."""

    images: Tensor  # uint8 (N, views, 3, 32, 32)
    captions: list[str]

    def first(self, count: int | None) -> Captioned:
        return Captioned(self.images[:count], self.captions[:count])


class Questions(NamedTuple):
    """Row i asks `questions[i]` of a picture."""

    images: Tensor  # uint8 (N, 3, 32, 32)
    questions: list[str]
    answers: list[str]


def part_of(a: int, b: int) -> str:
    """The part of the data in which two things occur together."""
    names = ", ".join(sorted((THINGS[a], THINGS[b])))
    share = fraction(names)
    return next(part for part, (low, high) in PARTS.items() if low <= share < high)


def scenes_of(part: str) -> list[Scene]:
    """All arrangements of the pairs of a part."""
    found = [p for p in combinations(range(len(THINGS)), 2) if part_of(*p) == part]
    return [
        Scene(kind, things) for a, b in found for kind in (ABOVE, BESIDE)
        for things in ((a, b), (b, a))
    ]  # fmt: skip


def sentences() -> list[str]:
    """A text of all words that there are."""
    asked = [f"what is {where} the" for where in BESIDES]
    return [*THINGS, *asked, HOW_MANY, *COUNTS]


@cache
def tiles() -> Tensor:
    """uint8 (24, 3, TILE, TILE)."""
    images, captions = pairs()
    rows = [captions.index(name) for name in THINGS]
    return halved(images[rows])


def drawn(item: Tensor, place: Tensor) -> Tensor:
    """uint8 (N, 3, 32, 32), with the things `item` (N, 4) at `place` (N, 4, 2)."""
    return halved(Scenes(tiles(), item, place, []).draw())


def captioned(part: str, views: int = 1) -> Captioned:
    """The scenes of a part, drawn `views` times."""
    scenes = scenes_of(part)
    generator = torch.Generator().manual_seed(list(PARTS).index(part))
    item = torch.full((len(scenes), 4), NOTHING)
    item[:, :2] = torch.tensor([scene.things for scene in scenes])
    above = torch.tensor([scene.kind == ABOVE for scene in scenes])
    images = []
    for _ in range(views):
        slide = torch.randint(0, TILE // SLIDE + 1, (len(scenes), 2), generator=generator) * SLIDE
        place = torch.zeros(len(scenes), 4, 2, dtype=torch.int64)
        place[above, 1, 0], place[~above, 1, 1] = TILE, TILE
        place[above, :2, 1], place[~above, :2, 0] = slide[above], slide[~above]
        images.append(drawn(item, place))
    return Captioned(torch.stack(images, 1), [scene.caption for scene in scenes])


# ---- noise


def vague(caption: str) -> str:
    """Things without what tells them apart: "green heart above cat face" -> "heart above face"."""
    for name in THINGS:
        caption = caption.replace(name, name.split()[1])
    return caption


def noisy(captions: list[str], seed: int) -> tuple[list[str], list[str]]:
    """The captions, a known share of them another scene's or vague; of each what it is."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(captions), generator=generator).tolist()
    wrong, blurred = (round(share * len(captions)) for share in SHARES.values())
    found, kinds = list(captions), ["right"] * len(captions)
    for i in order[:wrong]:
        others = [j for j in range(len(captions)) if j != i]
        chosen = int(torch.randint(len(others), (), generator=generator))
        found[i], kinds[i] = captions[others[chosen]], "wrong"
    for i in order[wrong : wrong + blurred]:
        found[i], kinds[i] = vague(captions[i]), "vague"
    return found, kinds


# ---- questions


def questions(part: str, count: int, seed: int) -> Questions:
    """Two to four things in the corners, as often: how many there are, and what is beside one.

    Of training scenes all pairs are of the training part. Of others what is asked for and what it
    stands beside are a pair of that part.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = torch.tensor([
        [list(PARTS).index(part_of(a, b)) if a != b else NOTHING for b in range(len(THINGS))]
        for a in range(len(THINGS))
    ])  # fmt: skip
    own = list(PARTS).index(part)
    items, asked, answers = [], [], []
    while len(items) < count:
        corners = _corners(2 + len(items) // 2 % 3, generator)
        there = [spot for spot in range(4) if corners[spot] != NOTHING]
        pairs = [parts[corners[s], corners[t]] == own for s, t in combinations(there, 2)]
        if not (all(pairs) if part == "train" else any(pairs)):
            continue
        if len(items) % 2:
            question = HOW_MANY, COUNTS[len(there) - 2]
        else:
            possible = [
                (f"what is {where} the {THINGS[a]}", THINGS[b])
                for where, besides in BESIDES.items() for spot, beside in besides.items()
                if (a := corners[spot]) != NOTHING and (b := corners[beside]) != NOTHING
                and parts[a, b] == own
            ]  # fmt: skip
            if not possible:
                continue
            question = possible[int(torch.randint(len(possible), (), generator=generator))]
        items.append(corners)
        asked.append(question[0])
        answers.append(question[1])
    place = SPOTS.expand(count, 4, 2)
    return Questions(drawn(torch.tensor(items), place), asked, answers)


def _corners(count: int, generator: torch.Generator) -> list[int]:
    """Of each corner which of `count` different things is there, or NOTHING."""
    things = torch.randperm(len(THINGS), generator=generator)[:4]
    things[torch.randperm(4, generator=generator)[count:]] = NOTHING
    return things.tolist()
