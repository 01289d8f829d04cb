"""CLIP beside SigLIP: what the size of a batch, and wrong captions, do to each.

    python -m examples.clip            # everything; eight minutes of one core
    python -m examples.clip --quick    # a look at every stage
    python -m examples.clip --resume   # go on from the checkpoints in --out

Learning Transferable Visual Models From Natural Language Supervision, Radford et al. 2021 (arXiv
2103.00020): a pair's caption among the batch's captions, its picture among the batch's pictures.
Sigmoid Loss for Language Image Pre-Training, Zhai et al. 2023 (arXiv 2303.15343): every pair of a
batch a yes/no question.

1. An image tower learns which words a caption has, which neither loss is about. It is locked, as in
   LiT, and embeds every scene once.
2. From there a linear head and a text tower learn by each loss, in batches of 32 to 8192 scenes:
   all runs see as many pairs, so a larger batch makes fewer steps. Same batches for both losses.
3. The same with a fifth of the captions shuffled among their scenes.
4. As many steps for small batches as for one of 512, so that these see fewer pairs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import nn

import tilewise as tw
from examples import clip_report
from examples.clip_report import USUAL
from examples.common import large_batch, report
from examples.common.data import SCENE_WORDS, Pairs, Scenes, halved, scenes, split
from examples.common.retrieval import chance, nearest_pixel, recall
from examples.common.supervision import (
    CONTRASTS,
    Classifier,
    RowBatches,
    TowerRun,
    bag_of_words,
    word_loss,
)
from examples.common.towers import ImageTower, TextTower, TwoTowers, Words
from examples.common.training import Batches, arguments, conduct, train

DIM, WIDTH = 64, 64  # of the features that are compared, and of the text tower
SHUFFLED = 0.2  # share of the captions that are wrong


class Head(nn.Module):
    """Features of the locked tower (B, D) -> unit rows (B, DIM). Only the last layer learns."""

    def __init__(self, features: torch.Tensor):
        super().__init__()
        known = features[:4096].float()
        self.register_buffer("mean", known.mean(0))
        self.register_buffer("scale", 1 / known.std(0).clamp(min=1e-3))
        self.linear = nn.Linear(features.shape[1], DIM)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.linear((features.float() - self.mean) * self.scale), dim=1)


class Embedded(NamedTuple):
    """Scenes as the locked tower sees them, and their captions."""

    features: torch.Tensor  # float16 (N, D)
    tokens: torch.Tensor  # int64 (N, L)
    scenes: Scenes

    def take(self, rows: slice) -> Embedded:
        s = self.scenes
        part = Scenes(s.tiles, s.item[rows], s.place[rows], s.captions[rows])
        return Embedded(self.features[rows], self.tokens[rows], part)


class Data(NamedTuple):
    seen: Embedded
    validation: Embedded  # for choices
    test: Embedded  # looked at once
    words: Words
    tagger: Classifier  # what was locked, with its own answer: the words


# ---- the locked tower


def locked(args, bars: Progress) -> Data:
    """Trains the tower on words, and embeds all scenes."""
    pictures, _ = split()
    seen = scenes(args.scenes, seed=args.seed + 1)
    held = scenes(2 * args.held, seed=args.seed + 2, heldout=True)
    words = Words([*pictures.captions, *SCENE_WORDS])
    torch.manual_seed(args.seed)
    tagger = Classifier(ImageTower(size=64, width=32), len(words), bias=-6.0)
    batches = Batches(pictures, seen, (32, 96), words, args.seed)
    settings = {"seed": args.seed, "scenes": args.scenes}
    run = TowerRun("the words of captions", args.out / "words.pt", tagger, word_loss, batches,
                   args.word_steps, settings, device=args.device)  # fmt: skip
    train([run], bars, args.every, args.resume)

    total = len(seen.captions) + len(held.captions)
    task = bars.add_task("embedding scenes", total=total, note="")
    advance = lambda count: bars.update(task, advance=count)  # noqa: E731

    def embedded(canvases: Scenes) -> Embedded:
        features = large_batch.embed_scenes(tagger.image, canvases, advance, "features")
        return Embedded(features.cpu().half(), words(canvases.captions), canvases)

    both = embedded(held)
    halves = both.take(slice(args.held)), both.take(slice(args.held, None))
    return Data(embedded(seen), *halves, words, tagger)


# ---- the two losses

KINDS = {"right": "", "shuffled": ", shuffled captions", "steps": ", equal steps"}


def shuffled(tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """A fifth of the rows change places among each other, none stays."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(tokens), generator=generator)[: round(SHUFFLED * len(tokens))]
    wrong = tokens.clone()
    wrong[rows] = tokens[rows.roll(1)]
    return wrong


def head_run(loss: str, size: int, seed: int, batches: RowBatches, data: Data, args,
             kind: str = "right") -> TowerRun:  # fmt: skip
    """`kind`: one of KINDS or, for a few steps' cost, "fused" or "eager"."""
    torch.manual_seed(seed)
    model = TwoTowers(Head(data.seen.features), TextTower(len(data.words), DIM, WIDTH))
    settings = {"seed": seed, "size": size, "scenes": args.scenes, "words": args.word_steps}
    path = args.out / f"{loss}-{size}-{seed}-{kind}.pt"
    of = CONTRASTS[loss]["eager" if kind == "eager" else "fused"]
    steps = args.pairs // {"steps": USUAL}.get(kind, size)
    steps = steps if kind in KINDS else args.cost_steps
    return TowerRun(f"{loss}, batch {size}", path, model, of, batches, steps, settings,
                    args.rate * min(1, size / USUAL) ** 0.5, args.device)  # fmt: skip


@torch.no_grad()
def recall_at_1(model: TwoTowers, held: Embedded) -> float:
    """The mean of both directions."""
    model.eval()
    device = model.log_scale.device
    image, text = model.image(held.features.to(device)), model.text(held.tokens.to(device))
    found = tw.evaluation.retrieval_recall(image.cpu(), text.cpu(), k=1)
    return (found.image_to_text[1] + found.text_to_image[1]) / 2


def compare(data: Data, held: Embedded, args, bars: Progress) -> dict:
    """{kind: {loss: {batch: recall@1 of each seed}}}."""
    found: dict = {}
    for kind, shown in KINDS.items():
        for size in args.sizes if kind == "right" else args.small:
            if kind == "steps" and size == USUAL:
                continue  # that is the right one
            runs: dict = {}
            for seed in range(args.seed, args.seed + args.seeds):
                tokens = data.seen.tokens
                tokens = shuffled(tokens, seed) if kind == "shuffled" else tokens
                batches = RowBatches(data.seen.features, tokens, size, seed)
                for loss in CONTRASTS:
                    runs[loss, seed] = head_run(loss, size, seed, batches, data, args, kind)
            train([*runs.values()], bars, args.every, args.resume, f"batch {size}{shown}")
            for (loss, _), run in runs.items():
                by_size = found.setdefault(kind, {}).setdefault(loss, {})
                by_size.setdefault(size, []).append(recall_at_1(run.model, held))
    for loss, by_size in found["right"].items():
        if USUAL in by_size:
            found["steps"][loss][USUAL] = by_size[USUAL]
    return found


# ---- what has to be beaten, and what it costs


@torch.no_grad()
def by_words(data: Data, held: Embedded) -> float:
    """Captions ranked by the locked tower alone: the sum of its logits of their words."""
    logits = data.tagger.logits(held.features.float().to(data.tagger.logits.weight.device)).cpu()
    found = recall(logits @ bag_of_words(held.tokens, logits.shape[1]).T)
    return (found.image_to_text_1 + found.text_to_image_1) / 2


def by_pixels(data: Data, held: Embedded, count: int = 8192) -> float:
    """By the nearest of so many seen scenes, at 16 x 16 pixels."""

    def pairs(part: Embedded) -> Pairs:
        return Pairs(halved(halved(part.scenes.draw())), part.scenes.captions)

    found = nearest_pixel(pairs(data.seen.take(slice(count))), pairs(held))
    return (found.image_to_text_1 + found.text_to_image_1) / 2


def costs(data: Data, args, bars: Progress) -> dict:
    """Of the largest batch, ours and the eager one: a few steps in turn; the loss alone."""
    size = args.sizes[-1]
    batches = RowBatches(data.seen.features, data.seen.tokens, size, args.seed)
    both = {
        loss: {name: head_run(loss, size, args.seed, batches, data, args, name)
               for name in ("fused", "eager")}
        for loss in CONTRASTS
    }  # fmt: skip
    runs = [run for pair in both.values() for run in pair.values()]
    train(runs, bars, args.every, args.resume, f"batch {size}, fused and eager")
    task = bars.add_task("the losses alone", total=len(both), note="in processes of their own")
    return large_batch.beside_eager(
        both, size, DIM, args.device, lambda: bars.update(task, advance=1)
    )


def run(args: argparse.Namespace, bars: Progress) -> dict:
    data = locked(args, bars)
    held = data.validation if args.choose else data.test
    return {
        "recall": compare(data, held, args, bars),
        "beat": {"chance": chance(args.held)[0], "nearest pixel": by_pixels(data, held),
                 "words alone": by_words(data, held)},
        "cost": costs(data, args, bars), "pairs": args.pairs, "held": args.held,
        "sizes": args.sizes, "small": args.small, "seeds": args.seeds, "scenes": args.scenes,
    }  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, Path("out/clip"), every=1024, on_device=True)
    add = parser.add_argument
    add("--pairs", type=int, default=2**17, help="pairs seen by a run (default: %(default)s)")
    add("--rate", type=float, default=1e-2,
        help=f"highest rate of batches from {USUAL}; of smaller ones with the root of their size")
    add("--choose", action="store_true", help="recall of the validation scenes, for choices")
    args = parser.parse_args(argv)
    args.sizes, args.seeds, args.word_steps = [32, 128, 512, 2048, 8192], 3, 300
    args.scenes, args.held, args.cost_steps, args.small = 2**15, 1000, 3, [32, 128, USUAL]
    if args.quick:
        args.sizes, args.seeds, args.word_steps, args.pairs = [32, 256], 2, 8, 1024
        args.scenes, args.held, args.small = 1024, 100, [32]
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    console, found = conduct("CLIP beside SigLIP", args, run)
    clip_report.tables(console, found)
    clip_report.picture(found, args.out / "batch.png")
    report.finish(console, args.out, ["batch.png"], clip_report.value(found), found)
    return found


if __name__ == "__main__":
    main()
