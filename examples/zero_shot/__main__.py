"""What text supervision buys: classes by their names, beside a classifier and linear probes.

    python -m examples.zero_shot            # four minutes of one core
    python -m examples.zero_shot --quick    # a look at every stage
    python -m examples.zero_shot --resume   # go on from the checkpoints in --out

Learning Transferable Visual Models From Natural Language Supervision, Radford et al. 2021 (arXiv
2103.00020), in small: one image tower, taught by captions with CLIP's and SigLIP's losses, by the
words of captions alone (their baseline), by labels of some of the pictures, or not at all.

1. Each is trained on as many pictures. Captions come with 2,620 pictures and with glyphs by four
   hands; labels with 2,016 of the pictures.
2. Zero-shot: unseen things by the names of their classes, the same as line drawings, words drawn by
   hands never seen, handwritten digits; one prompt for a class, and an ensemble of prompts.
3. Linear probes of each tower, by the number of labels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import Progress
from torch import nn

import tilewise as tw
from examples.common import glyphs, large_batch, report, subgroups
from examples.common.data import Pairs, split_digits
from examples.common.supervision import (
    CONTRASTS,
    Classifier,
    LabelBatches,
    TowerRun,
    label_loss,
    word_loss,
)
from examples.common.towers import (
    PAD,
    UNKNOWN,
    ImageTower,
    TextTower,
    TwoTowers,
    Words,
    embed,
)
from examples.common.training import Batches, arguments, conduct, train
from examples.zero_shot import report as pages
from examples.zero_shot.probes import Labels, curve
from examples.zero_shot.tasks import Task, choices, enlarge, tasks, taught

BATCH = 64, 192  # pictures, painted glyphs
DIM = 128
KINDS = ["CLIP", "SigLIP", "words", "labels"]


# ---- the towers


def tower() -> ImageTower:
    return ImageTower(DIM, size=32, width=32)


def tower_run(kind: str, seed: int, batches: Batches, args, steps: int = 0) -> TowerRun:
    """Of one of KINDS; for its cost, "CLIP, fused" and "CLIP, eager", and so of SigLIP."""
    torch.manual_seed(seed)
    model: nn.Module
    if kind == "words":
        model, loss = Classifier(tower(), len(batches.words), bias=-6.0), word_loss
    elif kind == "labels":
        model, loss = Classifier(tower(), len(subgroups.classes())), label_loss
        known = subgroups.split().train
        rows = known.labels >= 0
        batches = LabelBatches(known.images[rows], known.labels[rows], sum(BATCH), seed)
    else:
        model = TwoTowers(tower(), TextTower(len(batches.words), DIM, 64))
        name, _, made = kind.partition(", ")
        loss = CONTRASTS[name]["eager" if made == "eager" else "fused"]
    path = args.out / f"{kind.replace(', ', '-')}-{seed}.pt"
    settings = {"seed": seed, "batch": list(BATCH)}
    return TowerRun(kind, path, model, loss, batches, steps or args.steps, settings, 4e-3,
                    args.device)  # fmt: skip


def caption_batches(seed: int, args) -> Batches:
    """A quarter pictures, the rest glyphs in black and white."""
    known = subgroups.split().train
    painted = glyphs.paint(taught(), BATCH[1] * args.steps, seed, BATCH[1], contrast=400)
    words = Words([*known.captions, *painted.captions])
    return Batches(Pairs(known.images, known.captions), painted, BATCH, words, seed)


def trained(seed: int, args, bars: Progress) -> tuple[dict[str, TowerRun], Words]:
    """A run of each kind, of one seed."""
    batches = caption_batches(seed, args)
    runs = {kind: tower_run(kind, seed, batches, args) for kind in KINDS}
    train([*runs.values()], bars, args.every, args.resume, f"four towers, seed {seed}")
    return runs, batches.words


# ---- zero-shot


def directions(model: TwoTowers, words: Words, prompts: list[list[str]]) -> torch.Tensor:
    """(classes, DIM): of each class's prompts."""
    return tw.evaluation.zero_shot_classifier([embed(model.text, words(t)) for t in prompts])


def by_words(logits: torch.Tensor, words: Words, prompts: list[list[str]]) -> torch.Tensor:
    """(N, classes): the mean logit of the words of a class's prompts, of logits (N, vocabulary)
    above what they usually are."""
    share = torch.zeros(len(prompts), logits.shape[1])  # of each word in a class's prompts
    for row, texts in zip(share, prompts, strict=True):
        tokens = words(texts).flatten()
        row.index_add_(0, tokens, torch.ones(len(tokens)))
    share[:, [PAD, UNKNOWN]] = 0
    return logits @ (share / share.sum(1, keepdim=True).clamp(min=1)).T


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Of the highest scores; those of a row that knows no difference are chance's."""
    tied = scores == scores.amax(1, keepdim=True)
    right = tied.gather(1, labels[:, None])[:, 0]
    return (right / tied.sum(1)).mean().item()


def zero_shot(runs: dict[str, TowerRun], words: Words, known: list[Task]) -> dict:
    """{method: {task: accuracy}} of one seed's towers."""
    found: dict[str, dict] = {}
    usual = embed(runs["words"].model, subgroups.split().train.images).mean(0)
    for task in known:
        prompts = {"one prompt": task.one, "ensemble": task.ensemble}
        for kind in ("CLIP", "SigLIP"):
            image = embed(runs[kind].model.image, task.images)
            for shown, texts in prompts.items():
                right = tw.evaluation.zero_shot_accuracy(
                    image, directions(runs[kind].model, words, texts), task.labels, k=1
                )
                found.setdefault(f"{kind}, {shown}", {})[task.title] = right[1]
        logits = embed(runs["words"].model, task.images) - usual
        for shown, texts in prompts.items():
            scores = by_words(logits, words, texts)
            found.setdefault(f"words, {shown}", {})[task.title] = accuracy(scores, task.labels)
        if task.classes == subgroups.classes():
            scores = embed(runs["labels"].model, task.images)
            found.setdefault("labels", {})[task.title] = accuracy(scores, task.labels)
    return found


# ---- probes


def few_rows(images: torch.Tensor, labels: torch.Tensor, count: int):
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    return images[rows], labels[rows]


def labelled(args) -> dict[str, tuple[Labels, int, list[int]]]:
    """Pictures with labels, the number of classes, and how many labels of a class are tried."""
    train_part, *held = subgroups.split()
    rows = train_part.labels >= 0
    of_things = [(train_part.images[rows], train_part.labels[rows])]
    of_things += [(part.images, part.labels) for part in held]
    rest, test = split_digits()
    keep = torch.arange(len(rest.labels)) % 4 > 0  # the others are for choices
    chosen = choices(1000)
    of_digits = [
        (enlarge(images), labels)
        for images, labels in ((rest.images[keep], rest.labels[keep]), chosen, test)
    ]
    if args.choose:  # test parts are not looked at
        of_things[2], of_digits[2] = of_things[1], of_digits[1]
    if args.quick:
        of_things, of_digits = ([few_rows(*part, 300) for part in parts]
                                for parts in (of_things, of_digits))  # fmt: skip
    found = {
        "subgroups": (Labels(*of_things), len(subgroups.classes()), [1, 2, 4, 8, 16, 1000]),
        "handwritten digits": (Labels(*of_digits), 10, [1, 2, 4, 8, 16, 64, 300]),
    }
    if args.quick:
        found = {name: (known, k, counts[:2]) for name, (known, k, counts) in found.items()}
    return found


def probe(runs: dict[str, TowerRun], seed: int, args, advance) -> dict:
    """{task: {tower: [(number of labels, accuracy)]}} of one seed."""
    torch.manual_seed(seed)
    towers: dict[str, ImageTower | None] = {kind: run.model.image for kind, run in runs.items()}
    towers |= {"random": tower().to(args.device), "pixels": None}
    found: dict[str, dict] = {}
    for title, (known, classes, counts) in labelled(args).items():
        for kind, one in towers.items():
            found.setdefault(title, {})[kind] = curve(known.seen_by(one), classes, counts, seed)
            advance()
    return found


# ---- all of it


def costs(args, bars: Progress, batches: Batches) -> dict:
    """Of each contrast, ours and the eager one: a few steps in turn; the loss alone."""
    runs = {
        loss: {name: tower_run(f"{loss}, {name}", args.seed, batches, args, 6)
               for name in ("fused", "eager")}
        for loss in CONTRASTS
    }  # fmt: skip
    every = [run for both in runs.values() for run in both.values()]
    train(every, bars, args.every, args.resume, "fused and eager losses")
    return large_batch.beside_eager(runs, sum(BATCH), DIM, args.device)


def run(args: argparse.Namespace, bars: Progress) -> dict:
    known = tasks(test=not args.choose, quick=args.quick)
    found: dict = {"zero-shot": [], "probes": [], "tasks": {}, "batch": sum(BATCH)}
    found["labels"] = int((subgroups.split().train.labels >= 0).sum())
    for task in known:
        found["tasks"][task.title] = {
            "pictures": len(task.labels), "classes": len(task.classes),
            "chance": 1 / len(task.classes), "majority class": task.majority,
            "nearest pixel": task.nearest_pixel(),
        }  # fmt: skip
    for seed in range(args.seed, args.seed + args.seeds):
        runs, words = trained(seed, args, bars)
        found["zero-shot"].append(zero_shot(runs, words, known))
        bar = bars.add_task(f"probes, seed {seed}", total=12, note="")
        found["probes"].append(probe(runs, seed, args, lambda b=bar: bars.update(b, advance=1)))
        if seed == args.seed:
            found["cost"] = costs(args, bars, runs["CLIP"].batches)
            model = runs["SigLIP"].model
            scores = [embed(model.image, task.images) @ directions(model, words, task.ensemble).T
                      for task in known]  # fmt: skip
            pages.sheet(known, scores, args.out / "sheet.png")
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, Path("out/zero_shot"), every=100, on_device=True)
    add = parser.add_argument
    add("--steps", type=int, default=300, help="of each tower (default: %(default)s)")
    add("--choose", action="store_true", help="accuracy of the validation parts, for choices")
    args = parser.parse_args(argv)
    args.seeds = 3
    if args.quick:
        args.steps, args.seeds = 4, 2
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    console, found = conduct("What text supervision buys", args, run)
    pages.tables(console, found)
    pages.picture(found, args.out / "labels.png")
    report.finish(console, args.out, ["labels.png", "sheet.png"], pages.value(found), found)
    return found


if __name__ == "__main__":
    main()
