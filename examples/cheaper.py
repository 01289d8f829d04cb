"""Cheaper training of two towers: LiT, FLIP and CatLIP beside the plain run, at equal time.

    python -m examples.cheaper             # five minutes of one core
    python -m examples.cheaper --quick     # a look at every stage
    python -m examples.cheaper --resume    # go on from the checkpoints in --out

All train one small ViT and a text tower with SigLIP's loss, for as long as the plain run takes:

- FLIP (Li et al. 2023, arXiv 2212.00794): half or three quarters of the patches are left out.
- LiT (Zhai et al. 2022, arXiv 2111.07991): the image tower has learnt labels, the subgroups of
  Unicode, and is locked but for its last layer. Also unlocked from the same start, and a random one
  locked.
- CatLIP (Mehta et al. 2024, arXiv 2404.15653): first the image tower learns which nouns are in the
  caption, which needs no text tower and no pairs, then both go on. The first part takes half of
  the time.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import nn

from examples import cheaper_report
from examples.common import large_batch, report, subgroups
from examples.common.contrast import SIGLIP, PairRun
from examples.common.data import Pairs, split, split_heldout, words
from examples.common.retrieval import chance, nearest_pixel, recall
from examples.common.supervision import (
    Classifier,
    LabelBatches,
    TowerRun,
    bag_of_words,
    label_loss,
    word_loss,
)
from examples.common.towers import PatchTower, TextTower, TwoTowers, Words, embed, score
from examples.common.training import Batches, Run, arguments, conduct, train

DIM, LEAST = 128, 3  # of the features; captions with a noun that is learnt
METHODS = [
    "plain", "FLIP, 50 %", "FLIP, 75 %", "LiT, locked", "LiT, unlocked", "random tower, locked",
    "CatLIP",
]  # fmt: skip
LOCKED = ("LiT, locked", "random tower, locked")
NO_NOUNS = set("""
    a and at between for in no of on or the to together up with
    above back backhand bearded bent black blond blue bowing brown capital circled clapping climbing
    closed combining construction cooking cross crossed curly dark deaf deeply doing double down
    downwards enclosing exclamation extended figure fisted flexed folded frowning good green
    grinning happy hearing heavy holding horizontal japanese juggling kneeling large left
    left-facing leftwards levitating light lower male female manual medium medium-dark medium-light
    middle motorized negative older open orange outstretched personal pinched pinching pointing
    polished pouting pregnant probing purple racing raised raising red regional reversed right
    right-pointing rightwards rounded sleeping small smiling splayed square squared standing steamy
    tag three turned two unified up-pointing upper upwards vertical waving white writing yellow
    one b c d e f g h i j k l m n o p q r s t u v w x y z
""".split())


# ---- labels


class World(NamedTuple):
    seen: Pairs
    validation: Pairs
    test: Pairs
    words: Words


def nouns(captions: list[str]) -> Words:
    """The nouns of several captions. There is no tagger: all words but a list are nouns."""
    counts = Counter(word for text in captions for word in set(words(text)))
    found = [word for word, count in counts.items() if count >= LEAST and word not in NO_NOUNS]
    return Words(found)


def label_run(kind: str, here: World, args, seed: int, steps: int) -> TowerRun:
    """The image tower learns the pictures' subgroups, or the nouns of their captions."""
    torch.manual_seed(seed)
    if kind == "nouns":
        known = nouns(here.seen.captions)
        model = Classifier(PatchTower(DIM), len(known), bias=-6.0)
        loss, batches = word_loss, Batches(here.seen, None, (args.batch_size, 0), known, seed)
    else:
        labels = subgroups.labels(here.seen.captions)
        rows = (labels >= 0).nonzero().flatten()
        model = Classifier(PatchTower(DIM), len(subgroups.classes()))
        loss = label_loss
        batches = LabelBatches(here.seen.images[rows], labels[rows], args.batch_size, seed)
    settings = {"seed": seed, "batch": args.batch_size}
    return TowerRun(kind, args.out / f"{kind}-{seed}.pt", model, loss, batches, steps, settings,
                    device=args.device)  # fmt: skip


@torch.no_grad()
def right(run: TowerRun, seen: Pairs, test: Pairs) -> dict[str, float]:
    """How often the best label is one of a picture's, and how often the most frequent one is."""
    if run.loss is word_loss:
        known = run.batches.words
        there, often = (bag_of_words(known(pairs.captions), len(known)).bool()
                        for pairs in (test, seen))  # fmt: skip
    else:
        labels, classes = subgroups.labels(test.captions), len(subgroups.classes())
        test = test.take((labels >= 0).nonzero().flatten().tolist())
        usual = subgroups.labels(seen.captions)
        there, often = (F.one_hot(x[x >= 0], classes).bool() for x in (labels, usual))
    best = embed(run.model, test.images).argmax(1)
    hits = there[torch.arange(len(best)), best], there[:, often.sum(0).argmax()]
    return {"right": hits[0].float().mean().item(), "most frequent": hits[1].float().mean().item(),
            "labels": int(often.any(0).sum()), "pictures": len(best)}  # fmt: skip


# ---- the methods


def tower(method: str, start: nn.Module | None = None) -> PatchTower:
    """An image tower as a method wants it, from torch's generator or as another one is. Of a
    locked one the head alone learns."""
    drop = {"FLIP, 50 %": 0.5, "FLIP, 75 %": 0.75}.get(method, 0.0)
    made = PatchTower(DIM, drop=drop)
    if start is not None:
        made.load_state_dict(start.state_dict())
    if method in LOCKED:
        made.requires_grad_(False).head.requires_grad_(True)
    return made


def pair_run(method: str, here: World, args, seed: int, steps: int,
             start: nn.Module | None = None, loss=SIGLIP["fused"]) -> PairRun:  # fmt: skip
    torch.manual_seed(seed)
    model = TwoTowers(tower(method, start), TextTower(len(here.words), DIM))
    batches = Batches(here.seen, None, (args.batch_size, 0), here.words, seed)
    name = re.sub("[^a-z0-9]+", "-", method.lower()).strip("-")
    return PairRun(method, args.out / f"{name}-{seed}.pt", model, batches, here.validation, steps,
                   loss, args.device)  # fmt: skip


# ---- equal time


def seconds_a_step(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """The median over rounds in which all take turns, after one that is not counted."""
    for step in range(rounds + 1):
        for run in runs.values():
            run.model.train()
            run.before(step)
            began = time.perf_counter()
            run.step(step)
            run.history["seconds"] += [time.perf_counter() - began] * (step > 0)
    return {name: statistics.median(run.history["seconds"]) for name, run in runs.items()}


def plan(here: World, args) -> dict[str, dict]:
    """Seconds a step, and the steps that fit into the time of the plain run. They are kept, since
    a resumed run has to go on with as many."""
    path = args.out / "plan.json"
    if args.resume and path.exists():
        known = json.loads(path.read_text())
        if known["steps"]["plain"] != args.steps:
            raise SystemExit(f"{path} is a plan of {known['steps']['plain']} steps")
        return known
    runs: dict[str, Run] = {
        name: pair_run(name, here, args, args.seed, args.rounds + 1) for name in METHODS
    }
    runs["eager"] = pair_run("plain", here, args, args.seed, args.rounds + 1, loss=SIGLIP["eager"])
    for kind in ("subgroups", "nouns"):
        runs[kind] = label_run(kind, here, args, args.seed, args.rounds + 1)
    seconds = seconds_a_step(runs, args.rounds)
    steps = {name: int(args.steps * seconds["plain"] / seconds[name]) for name in METHODS}
    steps["plain"] = args.steps  # dividing by its own time may round down
    steps["CatLIP"] = args.steps // 2
    steps["nouns"] = int(args.steps / 2 * seconds["plain"] / seconds["nouns"])
    steps["subgroups"] = args.label_steps
    twins = {"SigLIP": {"fused": runs["plain"], "eager": runs["eager"]}}
    cost = large_batch.beside_eager(twins, args.batch_size, DIM, args.device)
    found = {"seconds": seconds, "steps": steps, "cost": cost}
    path.write_text(json.dumps(found))
    return found


def train_all(here: World, args, seed: int, planned: dict, bars: Progress) -> dict:
    """Every method from one seed: test recall, and validation recall along the way."""
    steps = planned["steps"]
    kinds = ("subgroups", "nouns")
    labels = {kind: label_run(kind, here, args, seed, steps[kind]) for kind in kinds}
    train([*labels.values()], bars, args.every, args.resume, f"labels, seed {seed}")
    starts = dict.fromkeys(("LiT, locked", "LiT, unlocked"), labels["subgroups"].model.image)
    starts["CatLIP"] = labels["nouns"].model.image
    runs = {
        name: pair_run(name, here, args, seed, steps[name], starts.get(name)) for name in METHODS
    }
    train([*runs.values()], bars, args.every, args.resume, f"towers, seed {seed}")
    return {
        "labels": {kind: right(run, here.seen, here.test) for kind, run in labels.items()},
        "methods": {
            name: {"recall": recall(score(run.model, here.test, here.words)),
                   "curve": run.history["recall"]} for name, run in runs.items()
        },
    }  # fmt: skip


def run(args: argparse.Namespace, bars: Progress) -> dict:
    seen, _ = split()
    here = World(seen, *split_heldout(args.held), Words(seen.captions))
    task = bars.add_task("seconds a step", total=1, note="")
    planned = plan(here, args)
    bars.update(task, advance=1)
    seeds = range(args.seed, args.seed + args.seeds)
    return {
        "plan": planned, "target": args.target, "candidates": len(here.test.captions),
        "seeds": [train_all(here, args, seed, planned, bars) for seed in seeds],
        "nearest pixel": nearest_pixel(seen, here.test),
        "chance": chance(len(here.test.captions)),
    }  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, Path("out/cheaper"), every=25, on_device=True)
    add = parser.add_argument
    add("--steps", type=int, default=200, help="of the plain run (default: %(default)s)")
    add("--seeds", type=int, default=3, help="how many, from --seed on")
    add("--target", type=float, default=0.05, help="validation recall@1 to which time is taken")
    args = parser.parse_args(argv)
    args.batch_size, args.label_steps, args.rounds = 64, args.steps, 8
    args.held = None
    if args.quick:
        args.held = 60
        args.steps, args.every, args.seeds, args.batch_size = 2, 20, 2, 16
        args.label_steps, args.rounds = 2, 3
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    console, found = conduct("Cheaper training", args, run)
    cheaper_report.tables(console, found)
    cheaper_report.curves(found, args.out / "curves.png")
    report.finish(console, args.out, ["curves.png"], cheaper_report.value(found), found)
    return found


if __name__ == "__main__":
    main()
