"""A second world: 16,700 named glyphs of six designs, in colours that their captions name.

The fonts are those of the package qtawesome; each glyph is rendered once at 32x32, as the share of
each pixel that is ink, and cached outside git. Colours, grounds and a line across are painted when
a picture is asked for, by seed:

    parts = split()                           # train, combinations, designs: three Glyphs
    seen = paint(parts.train, 50_000, seed=0)     # 50,000 pictures, no caption twice
    images, texts = seen.draw(slice(0, 256)), seen.captions[:256]  # uint8 (256, 3, 32, 32)

A caption says all that was painted: "a teal bell, crossed out, on white".

    python -m examples.common.glyphs          # sizes, overlaps in words, a sheet of pictures
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from examples.common.data import cached, fraction, words

SIZE = 32  # pixels per side
FONTS = {  # of a design with several versions the newest
    "Material Design": ("materialdesignicons6",),
    "Font Awesome": ("fontawesome6-solid", "fontawesome6-regular", "fontawesome6-brands"),
    "Codicons": ("codicon",),
    "Elusive": ("elusiveicons",),
    "Phosphor": ("phosphor",),
    "Remix": ("remixicon",),
}
UNSEEN = ("Phosphor", "Remix")  # held out as a whole
CREDIT = (
    "Glyphs: Material Design Icons, Remix Icon (Apache 2.0), Font Awesome, Elusive Icons "
    "(SIL OFL 1.1), Phosphor (MIT), Codicons (CC BY 4.0)"
)
COMBINATIONS = 0.25  # share of the names of several words that may be held out: see split()

COLORS = {
    "black": (20, 20, 20), "white": (255, 255, 255), "grey": (140, 140, 140),
    "red": (215, 40, 40), "orange": (245, 135, 30), "yellow": (250, 215, 50),
    "green": (45, 150, 60), "teal": (20, 160, 160), "blue": (40, 80, 210),
    "purple": (125, 55, 165), "pink": (245, 130, 180), "brown": (115, 70, 35),
}  # fmt: skip
NAMES = [*COLORS]
CONTRAST = 150  # least distance of ink and ground, in RGB
CROSSED = 1 / 8  # share of the pictures with a line across


class Glyphs(NamedTuple):
    """Row i of `masks` shows `names[i]`, drawn by the hand of `designs[i]`."""

    masks: torch.Tensor  # uint8 (N, SIZE, SIZE), the share of ink
    names: list[str]  # "bell ring"
    designs: list[str]
    outlined: torch.Tensor  # bool (N,), whether the design calls it an outline
    crossed: torch.Tensor  # bool (N,), whether it has a line across as it is

    def take(self, rows: list[int]) -> Glyphs:
        names, designs = ([texts[i] for i in rows] for texts in (self.names, self.designs))
        return Glyphs(self.masks[rows], names, designs, self.outlined[rows], self.crossed[rows])


# ---- fonts


def font_folder() -> Path:
    """Where the fonts are. qtawesome itself is not imported: it would ask for Qt."""
    spec = importlib.util.find_spec("qtawesome")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the glyphs come with qtawesome: pip install qtawesome")
    return Path(spec.submodule_search_locations[0]) / "fonts"


def charmap(font: str) -> dict[str, int]:
    """The code point of each name; of a glyph's several names the one of fewest words."""
    (path,) = font_folder().glob(f"{font}*charmap*.json")
    names: dict[int, list[str]] = {}
    for name, code in json.loads(path.read_text()).items():
        names.setdefault(int(code, 16), []).append(name)
    return {min(n, key=lambda name: (name.count("-"), name)): code for code, n in names.items()}


class Reading(NamedTuple):
    """What a glyph's name in its font says."""

    name: str
    outlined: bool
    crossed: bool


ENDS: list[list[str]] = [[], ["outline"], ["line"], ["fill"]]


def read(name: str, font: str, known: set[str]) -> Reading:
    """("bell-off-outline", "materialdesignicons6") -> Reading("bell", True, True).

    "off" and "slash" mean a line across where `known`, the font's other names, have it without.
    """
    parts = name.split("-")
    outlined = font == "fontawesome6-regular"
    if font == "phosphor":  # five weights of each, four of them outlines
        outlined = parts[-1] != "fill"
        parts = parts[:-1] if parts[-1] in ("thin", "light", "bold", "fill") else parts
    elif font == "remixicon" and parts[-1] in ("line", "fill"):
        outlined = parts.pop() == "line"
    elif len(parts) > 1 and parts[-1] in ("outline", "filled"):
        outlined = parts.pop() == "outline"
    crossed = len(parts) > 1 and parts[-1] in ("off", "slash")
    crossed = crossed and bool({"-".join(parts[:-1] + end) for end in ENDS} & known)
    return Reading(" ".join(parts[:-1] if crossed else parts), outlined, crossed)


def render(font: str, codes: list[int]) -> torch.Tensor:
    """uint8 (N, SIZE, SIZE): each glyph at one size of type, smaller where it would not fit."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    (path,) = (p for p in font_folder().glob(f"{font}*.ttf"))
    sizes = {points: ImageFont.truetype(str(path), points) for points in range(8, 29)}
    masks = np.zeros((len(codes), SIZE, SIZE), np.uint8)
    for mask, code in zip(masks, codes, strict=True):
        left, top, right, bottom = sizes[28].getbbox(chr(code))
        longest = max(right - left, bottom - top)
        type_ = sizes[max(8, 28 * (SIZE - 2) // longest)] if longest > SIZE - 2 else sizes[28]
        left, top, right, bottom = type_.getbbox(chr(code))
        image = Image.new("L", (SIZE, SIZE))
        corner = ((SIZE - left - right) / 2, (SIZE - top - bottom) / 2)
        ImageDraw.Draw(image).text(corner, chr(code), fill=255, font=type_)
        mask[:] = np.asarray(image)
    return torch.from_numpy(masks)


def _render_all() -> dict:
    """What is cached: no blank glyph, and of a design's equal ones that of the shortest name."""
    rows: list[tuple] = []
    for design, fonts in FONTS.items():
        looks: dict[bytes, tuple] = {}
        for font in fonts:
            codes = charmap(font)
            for name, mask in zip(codes, render(font, [*codes.values()]), strict=True):
                row = (mask, *read(name, font, codes.keys() - {name}), design)
                other = looks.setdefault(mask.numpy().tobytes(), row)
                if len(row[1].split()) < len(other[1].split()):
                    looks[mask.numpy().tobytes()] = row
        rows += [row for row in looks.values() if row[0].any()]
    masks, names, outlined, crossed, designs = map(list, zip(*rows, strict=True))
    flags = {"outlined": torch.tensor(outlined), "crossed": torch.tensor(crossed)}
    return {"masks": torch.stack(masks), "names": names, "designs": designs, **flags}


@cache
def glyphs() -> Glyphs:
    """Every glyph that can be told from the others of its design."""
    import PIL

    stems = sorted(path.stem for path in font_folder().glob("*.ttf"))
    key = f"{fraction(' '.join(stems) + PIL.__version__) * 2**48:.0f}"  # of the fonts' versions
    return Glyphs(**cached(f"glyphs-{key}-{SIZE}.pt", _render_all))


# ---- what is held out


class Split(NamedTuple):
    train: Glyphs
    combinations: Glyphs  # by the same hands: known words, in names never seen
    designs: Glyphs  # by hands never seen


@cache
def split() -> Split:
    """Names of several words are held out where each word occurs in two training names at least.

    What is drawn by an unseen hand may have any name; those in `split().train.names` are the same
    word by another hand.
    """
    everything = glyphs()
    rows = [i for i, design in enumerate(everything.designs) if design not in UNSEEN]
    names = dict.fromkeys(everything.names[i] for i in rows)
    support = Counter(word for name in names for word in set(words(name)))
    heldout = set()
    for name in names:
        parts = set(words(name))
        if len(parts) > 1 and fraction(f"glyph {name}") < COMBINATIONS:
            if all(support[word] > 2 for word in parts):
                heldout.add(name)
                support.subtract(parts)
    return Split(
        everything.take([i for i in rows if everything.names[i] not in heldout]),
        everything.take([i for i in rows if everything.names[i] in heldout]),
        everything.take([i for i, d in enumerate(everything.designs) if d in UNSEEN]),
    )


def half(held: Glyphs, test: bool) -> Glyphs:
    """Half of the names: one for choices (`test=False`), the other to be looked at once."""
    return held.take([i for i, n in enumerate(held.names) if (fraction(f"half {n}") < 0.5) == test])


def drawn_by_several(known: Glyphs) -> Glyphs:
    """The glyphs whose names more than one hand has drawn."""
    pairs = set(zip(known.names, known.designs, strict=True))
    hands = Counter(name for name, _ in pairs)
    return known.take([i for i, name in enumerate(known.names) if hands[name] > 1])


# ---- painting


class Painted(NamedTuple):
    """Pictures described by what is on them, drawn when asked for.

    Row i shows glyph `item[i]` in color `ink[i]` on `ground[i]`.
    """

    glyphs: Glyphs
    item: torch.Tensor  # int64 (N,)
    ink: torch.Tensor  # int64 (N,), of COLORS
    ground: torch.Tensor  # int64 (N,)
    crossed: torch.Tensor  # bool (N,), by the painter, not by the glyph's own hand
    captions: list[str]

    def draw(self, rows: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """uint8 (n, 3, SIZE, SIZE)."""
        mask = self.glyphs.masks[self.item[rows]].float() / 255  # (n, SIZE, SIZE)
        mask = torch.where(self.crossed[rows, None, None], cross(mask), mask)[:, None]
        ink, ground = (palette()[c[rows]][:, :, None, None] for c in (self.ink, self.ground))
        return torch.lerp(ground, ink, mask).round().to(torch.uint8)


def palette() -> torch.Tensor:
    """float (colors, 3)."""
    return torch.tensor([*COLORS.values()], dtype=torch.float)


def cross(mask: torch.Tensor) -> torch.Tensor:
    """With a line from the upper left to the lower right, and a gap on its sides."""
    place = torch.arange(SIZE)
    away = (place[:, None] - place).abs()
    inside = (place > 1) & (place < SIZE - 2)
    line = (away < 2) & inside[:, None] & inside
    return (mask * (away >= 4)).maximum(line.float())


def describe(name: str, ink: str, ground: str, outlined: bool, crossed: bool) -> str:
    """As in "a teal outlined bell, crossed out, on white"."""
    article = "an" if ink == "orange" else "a"
    outline, line = "outlined " * outlined, ", crossed out" * crossed
    return f"{article} {ink} {outline}{name}{line}, on {ground}"


def paint(
    known: Glyphs, count: int, seed: int, batch: int = 0, contrast: int = CONTRAST
) -> Painted:
    """`count` pictures with different captions, each glyph about equally often.

    With a `batch` so many in a row have the same two colors, and captions differ within the batch.
    Of different colors these tell most pairs apart, and a contrast teaches towers little else.
    A `contrast` of 400 leaves black on white and white on black.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = (torch.cdist(palette(), palette()) >= contrast).nonzero()  # inks and their grounds
    names = len(set(known.names))
    if (batch or count) > names * (1 if batch else len(pairs)):
        raise ValueError(f"{names} names have fewer than {batch or count} captions")
    alike = batch or 1
    chosen = torch.randint(len(pairs), (-(-count // alike),), generator=generator)
    colors = pairs[chosen].tolist()
    rows: dict[tuple[int, str], tuple[int, int, int, bool]] = {}  # in the order they were drawn
    while len(rows) < count:
        item = torch.randperm(len(known.names), generator=generator)
        line = (torch.rand(len(item), generator=generator) < CROSSED) & ~known.crossed[item]
        for i, painted in zip(item.tolist(), line.tolist(), strict=True):
            if len(rows) < count:
                group = len(rows) // alike
                ink, ground = colors[group]
                crossed = painted or bool(known.crossed[i])
                outlined = bool(known.outlined[i])
                text = describe(known.names[i], NAMES[ink], NAMES[ground], outlined, crossed)
                rows.setdefault((group if batch else 0, text), (i, ink, ground, painted))
    item, ink, ground, line = torch.tensor([*rows.values()]).unbind(1)
    return Painted(known, item, ink, ground, line.bool(), [text for _, text in rows])


# ---- what there is, in figures and pictures

SHOWN = ["bell", "camera", "heart", "umbrella", "bug", "key", "cloud", "star"]


def table():
    """Sizes of each part and design, and how many names and words of it training knows."""
    from examples.common import report
    from examples.common.data import split as emoji_split

    made = report.table("", ["glyphs", "names", "names seen", "words", "words seen"])
    parts = split()
    seen = set(parts.train.names)
    known = {word for name in seen for word in words(name)}

    def row(label: str, glyphs: Glyphs) -> None:
        own = set(glyphs.names)
        vocabulary = {word for name in own for word in words(name)}
        shares = [f"{len(a & b)}" for a, b in ((own, seen), (vocabulary, known))]
        made.add_row(label, f"{len(glyphs.names):,}", f"{len(own):,}", shares[0],
                     f"{len(vocabulary):,}", shares[1])  # fmt: skip

    for label, part in zip(("train", "unseen combinations", "unseen hands"), parts, strict=True):
        row(f"[bold]{label}[/]", part)
        for design in dict.fromkeys(part.designs):
            row(f"  {design}", part.take([i for i, d in enumerate(part.designs) if d == design]))
        made.add_section()
    emoji, _ = emoji_split()
    vocabulary = {word for text in emoji.captions for word in words(text)}
    made.add_row("OpenMoji, train", f"{len(emoji.captions):,}", f"{len(set(emoji.captions)):,}",
                 str(len(set(emoji.captions) & seen)), f"{len(vocabulary):,}",
                 str(len(vocabulary & known)))  # fmt: skip
    return made


def sheet(path: Path, seed: int = 0) -> None:
    """One word by each hand, and painted glyphs with their captions."""
    import textwrap

    import matplotlib.pyplot as plt

    from examples.common import report

    everything = glyphs()
    plain = (~everything.crossed).nonzero().flatten().tolist()[::-1]
    first = {(everything.names[i], everything.designs[i]): i for i in plain}
    with report.picture(path):
        figure = plt.figure(figsize=(11, 8.4))
        upper, lower = figure.subfigures(2, 1, height_ratios=(5, 4))
        edges = {"left": 0.14, "right": 0.99, "top": 0.93, "bottom": 0.02}
        axes = upper.subplots(len(FONTS), len(SHOWN), gridspec_kw=edges)
        for (row, design), column in itertools.product(enumerate(FONTS), range(len(SHOWN))):
            axes[row, column].axis("off")
            if (SHOWN[column], design) in first:
                mask = everything.masks[first[SHOWN[column], design]]
                report.show(axes[row, column], 255 - mask.expand(3, -1, -1))
            if row == 0:
                axes[0, column].set_title(SHOWN[column], weight="normal", loc="center")
            if column == 0:
                axes[row, 0].text(-0.3, 0.5, design, ha="right", va="center", color=report.INK,
                                  transform=axes[row, 0].transAxes)  # fmt: skip
        painted = paint(split().train, 16, seed)
        edges = {"left": 0.02, "right": 0.98, "top": 0.98, "bottom": 0.15, "hspace": 0.5}
        axes = lower.subplots(2, 8, gridspec_kw=edges)
        for axis, image, text in zip(axes.flat, painted.draw(), painted.captions, strict=True):
            report.show(axis, image)
            axis.set_xlabel("\n".join(textwrap.wrap(text, 18)), fontsize=7.5, color=report.INK)
        figure.text(0.99, 0.005, CREDIT, ha="right", color=report.MUTED, fontsize=7)


def main() -> None:
    from examples.common import report

    out = Path("out/glyphs")
    out.mkdir(parents=True, exist_ok=True)
    console = report.console()
    console.print(table())
    sheet(out / "glyphs.png")
    console.print(f"Pictures: {out / 'glyphs.png'}. {CREDIT}.")


if __name__ == "__main__":
    main()
