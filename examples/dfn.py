"""Better data: a filter network ranks pairs of which a known share has a wrong caption.

    python -m examples.dfn             # five minutes of one core
    python -m examples.dfn --quick     # a look at every stage
    python -m examples.dfn --resume    # go on from the checkpoints in --out

Data Filtering Networks, Fang et al. 2023 (arXiv 2309.17425): a model that was trained on little
clean data scores a large pool, and another one is trained on the pairs with the best scores. Here
the filter is a small SigLIP of 600 pairs, and in half of the pool's 2,700 pairs the caption is
another picture's, so that the filter's precision and recall are known. Last, recall over the amount
of data, the share of wrong captions, and how many different things are seen.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from examples import dfn_report
from examples.common import large_batch, report
from examples.common.contrast import SIGLIP, PairRun
from examples.common.data import Pairs, split, split_heldout
from examples.common.matching import ranked_right
from examples.common.retrieval import chance, nearest_pixel, recall, tf_idf
from examples.common.towers import ImageTower, TextTower, TwoTowers, Words, embed, score
from examples.common.training import Batches, arguments, conduct, train

DIM = 128  # of the features
FILTERS = ["SigLIP", "nearest picture"]
SHARES = [0.25, 0.5]  # of the pool, that a filter keeps


class Pool(NamedTuple):
    """Pairs, and of each whether its caption is its own."""

    pairs: Pairs
    right: Tensor  # bool (N,)


def with_wrong_captions(pairs: Pairs, share: float, generator: torch.Generator) -> Pool:
    """In a share of the pairs each picture has the caption of another one of them."""
    rows = torch.randperm(len(pairs.captions), generator=generator)
    rows = rows[: round(share * len(rows))].tolist()
    captions = list(pairs.captions)
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        captions[row] = pairs.captions[other]
    right = torch.ones(len(captions), dtype=torch.bool)
    right[rows] = False
    return Pool(Pairs(pairs.images, captions), right)


class World(NamedTuple):
    """What the runs of one seed share."""

    clean: Pairs
    pool: Pool
    validation: Pairs
    test: Pairs
    words: Words


def world(args: argparse.Namespace, seed: int) -> World:
    """Which pairs are known to be clean, and which of the others are wrong, depends on the seed."""
    seen, _ = split()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(seen.captions), generator=generator).tolist()
    clean, rest = rows[: args.clean], rows[args.clean : args.clean + args.pool]
    pool = with_wrong_captions(seen.take(rest), args.noise, generator)
    return World(seen.take(clean), pool, *split_heldout(args.held), Words(seen.captions))


def siglip_run(
    name: str, pairs: Pairs, here: World, args, seed: int, loss=SIGLIP["fused"]
) -> PairRun:
    torch.manual_seed(seed)
    model = TwoTowers(ImageTower(DIM, width=32), TextTower(len(here.words), DIM))
    batches = Batches(pairs, None, (min(args.batch_size, len(pairs.captions)), 0), here.words, seed)
    path = args.out / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{seed}.pt"
    run = PairRun(name, path, model, batches, here.validation, args.steps, loss, args.device)
    run.settings |= {"noise": args.noise, "clean": args.clean}  # which captions the pairs have
    return run


# ---- filters


@torch.no_grad()
def own_cosines(model: TwoTowers, pairs: Pairs, words: Words) -> Tensor:
    """(N,): of each picture and its caption."""
    image, text = embed(model.image, pairs.images), embed(model.text, words(pairs.captions))
    return (image * text).sum(1)


def nearest_clean(here: World) -> Tensor:
    """(N,): how near, by TF-IDF, the caption is to that of the clean picture nearest by pixels."""
    clean, pool = here.clean, here.pool.pairs
    known = tf_idf(clean.captions, clean.captions)
    text = tf_idf(pool.captions, clean.captions)
    away = torch.cdist(pool.images.float().flatten(1), clean.images.float().flatten(1))
    return (text * known[away.argmin(1)]).sum(1)


def keep(scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The rows with the best scores; of equal ones any."""
    order = torch.randperm(len(scores), generator=generator)
    return order[scores[order].argsort(descending=True, stable=True)][:count]


def judge_filter(scores: Tensor, right: Tensor, generator: torch.Generator) -> dict:
    """Precision and recall by the share that is kept, and the pairs of pairs ranked right."""
    kept = {share: keep(scores, round(share * len(scores)), generator) for share in SHARES}
    curve = right[keep(scores, len(scores), generator)].float().cumsum(0)
    steps = torch.linspace(1, len(scores), 60).long()
    return {
        "ranked": ranked_right(scores, right),
        "precision": [right[rows].float().mean().item() for rows in kept.values()],
        "recall": [(right[rows].sum() / right.sum()).item() for rows in kept.values()],
        "curve": [[(curve[n - 1] / right.sum()).item(), (curve[n - 1] / n).item()] for n in steps],
    }


def training_sets(here: World, scores: Tensor, generator: torch.Generator) -> dict[str, Pairs]:
    """Of equal size but for the whole pool."""
    pool, right = here.pool
    count = int(right.sum())
    anything = torch.randperm(len(right), generator=generator)[:count]
    rows = {"filtered": keep(scores, count, generator), "random": anything,
            "oracle-clean": right.nonzero().flatten()}  # fmt: skip
    sets = {name: pool.take(chosen.tolist()) for name, chosen in rows.items()}
    return sets | {"whole pool": pool}


def filter_and_train(args, seed: int, bars: Progress) -> dict:
    here = world(args, seed)
    generator = torch.Generator().manual_seed(seed)
    filters = {"fused": siglip_run("filter", here.clean, here, args, seed)}
    if seed == args.seed:
        loss = SIGLIP["eager"]
        filters["eager"] = siglip_run("filter, eager", here.clean, here, args, seed, loss)
    train([*filters.values()], bars, args.every, args.resume, f"filter, seed {seed}")
    model = filters["fused"].model
    scores = dict(zip(FILTERS, (own_cosines(model, here.pool.pairs, here.words),
                                nearest_clean(here)), strict=True))  # fmt: skip
    threshold = -model.logit_bias.item() / model.log_scale.exp().item()
    called = scores[FILTERS[0]] > threshold  # what the filter itself calls a match
    right = here.pool.right
    runs = {
        name: siglip_run(name, pairs, here, args, seed)
        for name, pairs in training_sets(here, scores[FILTERS[0]], generator).items()
    } | {"clean pairs": filters["fused"]}
    train([*runs.values()], bars, args.every, args.resume, f"training sets, seed {seed}")
    if seed == args.seed:
        dfn_report.sheet(here.pool.pairs, right, scores[FILTERS[0]], args.out / "pool.png")
    return {
        "filters": {k: judge_filter(v, right, generator) for k, v in scores.items()},
        "calls": {"kept": called.float().mean().item(),
                  "precision": (called & right).sum().item() / max(int(called.sum()), 1),
                  "recall": (called & right).sum().item() / int(right.sum())},
        "sets": {name: {"pairs": len(run.batches.train.captions),
                        "recall": recall(score(run.model, here.test, here.words)),
                        "validation": run.history["recall"]} for name, run in runs.items()},
        "nearest pixel": nearest_pixel(here.clean, here.test),
        "cost": large_batch.beside_eager({"SigLIP": filters}, args.batch_size, DIM, args.device)
        if seed == args.seed else None,
    }  # fmt: skip


# ---- amount, noise, diversity


def things(pairs: Pairs) -> list[list[int]]:
    """Rows of each thing that is there in six colours of skin, or none, in the order of first."""
    families: dict[str, list[int]] = {}
    for row, text in enumerate(pairs.captions):
        families.setdefault(re.sub(r" with [a-z-]+ skin", "", text), []).append(row)
    return [rows[:6] for rows in families.values() if len(rows) >= 6]


def choose(families: list[list[int]], count: int, each: int, generator) -> list[int]:
    """`count` rows, `each` of as few things as that takes; fewer of the last one."""
    order = torch.randperm(len(families), generator=generator).tolist()
    rows = []
    for i in order:
        members = torch.randperm(len(families[i]), generator=generator)[:each]
        rows += [families[i][k] for k in members.tolist()]
    if len(rows) < count:
        raise ValueError(f"{len(families)} things have fewer than {count} pictures, {each} of each")
    return rows[:count]


def grid(args, bars: Progress) -> list[dict]:
    """Test recall for each amount, noise, diversity and seed."""
    seen, _ = split()
    families = things(seen)
    task = bars.add_task("amount, noise, diversity", note="",
                         total=args.seeds * len(args.amounts) * len(args.noises) * 2)  # fmt: skip
    found = []
    for seed in range(args.seed, args.seed + args.seeds):
        here = world(args, seed)
        for amount in args.amounts:
            fewest = -(-amount // len(families))  # of each thing, if all things are seen
            for diversity, each in (("few things", 6), ("many things", fewest)):
                generator = torch.Generator().manual_seed(seed)
                rows = choose(families, amount, each, generator)
                for noise in args.noises:
                    pool = with_wrong_captions(seen.take(rows), noise, generator)
                    name = f"{amount} {diversity} {100 * noise:.0f}"
                    run = siglip_run(name, pool.pairs, here, args, seed)
                    if args.resume and run.path.exists():
                        run.load()
                    while run.done < run.steps:
                        run.advance(args.every)
                    ones = recall(score(run.model, here.test, here.words))
                    found.append({
                        "amount": amount, "noise": noise, "diversity": diversity, "seed": seed,
                        "things": -(-amount // each), "recall": ones,
                    })  # fmt: skip
                    bars.update(task, advance=1, note=f"recall@1 {100 * ones[0]:.0f} %")
    return found


def run(args: argparse.Namespace, bars: Progress) -> dict:
    seeds = range(args.seed, args.seed + args.seeds)
    _, test = split_heldout(args.held)
    return {
        "seeds": [filter_and_train(args, seed, bars) for seed in seeds],
        "grid": grid(args, bars), "candidates": len(test.captions),
        "chance": chance(len(test.captions)),
    }  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, Path("out/dfn"), every=50, on_device=True)
    add = parser.add_argument
    add("--steps", type=int, default=200, help="of each run (default: %(default)s)")
    add("--seeds", type=int, default=3, help="how many, from --seed on")
    add("--noise", type=float, default=0.5, help="share of the pool with a wrong caption")
    args = parser.parse_args(argv)
    args.batch_size, args.clean, args.pool = 64, 600, 2700
    args.amounts, args.noises = [200, 400, 800], [0.0, 0.5]
    args.held = None
    if args.quick:
        args.held = 60
        args.steps, args.every, args.seeds, args.batch_size = 2, 1, 2, 16
        args.clean, args.pool, args.amounts, args.noises = 60, 100, [60], [0.0, 0.5]
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    console, found = conduct("Better data", args, run)
    dfn_report.tables(console, found, args)
    dfn_report.pictures(found, args)
    names = ["filter.png", "grid.png", "pool.png"]
    report.finish(console, args.out, names, dfn_report.value(found), found)
    return found


if __name__ == "__main__":
    main()
