"""Every sheet of pictures of stage two."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from examples.common.data import different
from examples.vqgan import judge, pictures, sampling
from examples.vqgan.models import decode
from examples.vqgan.sampling import Painter, Rule
from examples.vqgan.stage_two import Sets
from examples.vqgan.transformer import read
from examples.vqgan.world import Data

INVENTED = [  # known words in combinations that nobody drew
    "cat face with dark skin, red hair", "woman with medium skin, rose",
    "man with light skin, guitar", "dog face, rocket", "waving white flag, red heart",
    "banana above tomato", "fish left of cactus", "red apple right of blue heart",
]  # fmt: skip


def show(
    painter: Painter, world: Data, found: Sets, came: dict, pixel: dict, rule: Rule, args
) -> None:
    """Samples, scenes, invented captions, halves completed, pixels, costs, wide pictures."""
    out, test = args.out, world.test
    shown = different(test.captions, args.shown)
    made, seen = came["made"], came["seen"]
    near = judge.nearest(made[shown], seen)[1]
    captions = [test.captions[i] for i in shown]
    pictures.rows(
        {"sample": made[shown], "nearest\ntraining picture": seen[near],
         "held-out picture": test.images[shown]}, out / "samples.png", captions,
    )  # fmt: skip
    few = slice(0, args.shown)
    pictures.rows({"sample": came["free"][few], "another": came["free"][args.shown :][few]},
                  out / "free.png", title="Without a caption")  # fmt: skip
    scenes = {name: x[few] for name, x in came["scenes"].items()}
    pictures.rows(scenes, out / "scenes.png", world.test_scenes.captions[few])
    tries = {
        f"sample {n + 1}": painter.pictures(painter.codes(INVENTED, rule, args.seed + 10 + n))
        for n in range(3)
    }
    pictures.rows(tries, out / "invented.png", INVENTED)
    half = painter.second.length // 2
    known, words = found.test.codes[shown], found.test.words[shown]
    whole = painter.pictures(known)
    named = {"original": test.images[shown] / 255, "rebuilt from\nits codes": whole}
    for n in range(3):
        codes = sampling.sample(painter.second, words, rule, args.seed + n, given=known[:, :half])
        named[f"lower half\ndrawn, {n + 1}"] = painter.pictures(codes)
    pictures.rows(named, out / "completions.png", captions)
    some = [i for i in pixel["shown"][:: max(1, len(pixel["shown"]) // args.shown)]][few]
    rows = [pixel["shown"].index(i) for i in some]
    pictures.rows(
        {"by pixels": pixel["made"][rows], "by codes": made[some],
         "held-out picture": test.images[some]},
        out / "pixels.png", [test.captions[i] for i in some],
    )  # fmt: skip
    _costs(painter, world, found, shown[:8], out / "costs.png")
    wide(painter, rule, args)


def _costs(painter: Painter, world: Data, found: Sets, shown: list[int], path: Path) -> None:
    codes, words = found.test.codes[shown], found.test.words[shown]
    with torch.no_grad():
        logits = painter.second(words, codes)
    each = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").view(-1, *painter.grid)
    each = each if each.dim() == 3 else each.sum(-1)
    captions = [world.test.captions[i] for i in shown]
    pictures.costs(painter.pictures(codes), each, captions, path)


def wide(painter: Painter, rule: Rule, args) -> None:
    """Pictures of three times the width, by a window that slides over codes."""
    captions = ["waving white flag", "fish left of cactus", ""]
    side, width = painter.grid[0], args.wide * painter.grid[0]
    codes = sampling.slide(
        painter.second, read(painter.words, captions), side, width, side, rule, args.seed
    )
    codes = codes if len(painter.grid) == 3 else codes.squeeze(3)
    made = decode(painter.first, codes)
    labels = [text or "no caption" for text in captions]
    named = {f"{side} × {width}\ncodes": made}
    pictures.rows(named, args.out / "wide.png", labels, wrap=40, inch=3.2)
