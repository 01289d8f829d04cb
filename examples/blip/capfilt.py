"""CapFilt: a model that has learned from a noisy pool writes captions for it, and filters it.

    noisy       the pool as it came; a known share of its captions is wrong or vague
    filtered    without the captions that the filter says don't match
    captioned   the captioner's text in place of each
    both        captions of both kinds that the filter lets pass
    oracle      the true captions

Captioner and filter are the noisy pool's model, each finetuned on a small clean set by itself. The
clean pairs belong to every pool, and each pool is repeated up to the same number of pairs: as
published. A new model is then trained on each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from examples.blip import judge
from examples.blip.model import Blip, Tokens
from examples.blip.training import BlipRun, Kind, Learner, Pool
from examples.blip.world import Captioned, noisy
from examples.common.training import train

POOLS = ("noisy", "filtered", "captioned", "both", "oracle")
CLEAN = 96  # pairs with true captions


class Web(NamedTuple):
    """Rows of training scenes: those with true captions, and those of the pool with theirs."""

    clean: Tensor
    rows: Tensor
    captions: list[str]  # of the pool, as they came
    kinds: list[str]  # "right", "wrong" or "vague"


def web(data: Captioned, seed: int) -> Web:
    order = torch.randperm(len(data.captions), generator=torch.Generator().manual_seed(seed))
    clean, rows = order[:CLEAN].sort().values, order[CLEAN:].sort().values
    return Web(clean, rows, *noisy([data.captions[i] for i in rows], seed))


def repeated(
    data: Captioned, clean: Tensor, rows: Tensor, captions: list[str], count: int, seed: int
) -> Pool:
    """The clean pairs, and those of the pool in a random order, again and again until there are
    `count`. Where nothing is left of the pool, the clean ones stand for it."""
    of_clean = [data.captions[i] for i in clean]
    if len(rows) == 0:
        rows, captions = clean, of_clean
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    turn = [order[i % len(rows)] for i in range(count - len(clean))]
    return Pool(
        data.images, torch.cat([clean, rows[turn]]), of_clean + [captions[i] for i in turn]
    )


@torch.no_grad()
def passes(model: Blip, data: Captioned, rows: Tensor, captions: list[str]) -> list[bool]:
    """Whether the filter says that each caption matches its picture."""
    sight = judge.Sight(model, data.images[rows, 0])
    own = torch.arange(len(rows), device=sight.features.device)
    return (judge.match_scores(model, sight, captions, own, own) > 0).tolist()


def filter_quality(kept: list[bool], kinds: list[str]) -> dict[str, float]:
    """Of what is dropped the share that is wrong, or not right; of what is wrong the share that is
    dropped; the shares of right and vague captions that are kept."""
    pairs = list(zip(kept, kinds, strict=True))
    dropped = [kind for keep, kind in pairs if not keep]

    def share(kind: str) -> float:
        return sum(keep for keep, k in pairs if k == kind) / max(kinds.count(kind), 1)

    return {
        "precision": dropped.count("wrong") / max(len(dropped), 1),
        "not right": 1 - dropped.count("right") / max(len(dropped), 1),
        "recall": 1 - share("wrong"), "right kept": share("right"), "vague kept": share("vague"),
    }  # fmt: skip


def clean_up(data: Captioned, tokens: Tokens, args, bars: Progress, seed: int) -> dict:
    """Models of the pools by name, and how good captions and filter were."""
    of = web(data, seed)
    count = len(data.captions)

    def run(name: str, rows: Tensor, captions: list[str]) -> BlipRun:
        pairs = repeated(data, of.clean, rows, captions, count, seed)
        return BlipRun(name, Kind(), pairs, tokens, args, seed, args.steps)

    base = run("noisy", of.rows, of.captions)
    train([base], bars, args.every, args.resume)
    small = Pool(data.images, of.clean, [data.captions[i] for i in of.clean])
    tuned = [
        BlipRun(name, kind, small, tokens, args, seed, args.tuning, begin=base.model)
        for name, kind in (("captioner", Kind(itc=False, itm=False)), ("filter", Kind(lm=False)))
    ]
    train(tuned, bars, args.every, args.resume)

    writer, judged = (run.model.student for run in tuned)
    pools, found = pools_of(data, of, writer, judged, tokens, seed)
    runs = {name: run(name, *pairs) for name, pairs in pools.items()}
    train(list(runs.values()), bars, args.every, args.resume)
    models: dict[str, Learner] = {"noisy": base.model}
    return found | {"models": models | {name: run.model for name, run in runs.items()}}


def pools_of(data: Captioned, of: Web, captioner: Blip, judged: Blip, tokens: Tokens, seed: int):
    """Rows and captions of the pools that are made, and what became of the pool's captions."""
    images, rows = data.images[of.rows, 0], of.rows
    written = judge.write_all(captioner, images, "nucleus", seed)
    keep, keep_written = (passes(judged, data, rows, x) for x in (of.captions, written))
    pools = {
        "filtered": chosen(rows, of.captions, keep), "captioned": (rows, written),
        "both": chosen(torch.cat([rows, rows]), of.captions + written, keep + keep_written),
    }  # fmt: skip
    true = [data.captions[i] for i in rows]
    kept = [i for i, keep in enumerate(keep_written) if keep]
    found = {
        "filter": filter_quality(keep, of.kinds),
        "written": judge.caption_scores(written, true, tokens),
        "kept": len(kept) / len(written),
        "kept exact": sum(written[i] == true[i] for i in kept) / max(len(kept), 1),
        "true": {
            name: true_share(data, *pairs)
            for name, pairs in (pools | {"noisy": (rows, of.captions)}).items()
        },
        "rows": {name: len(captions) for name, (_, captions) in pools.items()},
        "examples": [
            {"row": int(rows[i]), "web": of.captions[i], "kind": of.kinds[i], "web kept": keep[i],
             "written": written[i], "written kept": keep_written[i]}
            for i in range(0, len(rows), max(len(rows) // 24, 1))
        ],
    }  # fmt: skip
    return pools, found


def true_share(data: Captioned, rows: Tensor, captions: list[str]) -> float:
    pairs = zip(rows.tolist(), captions, strict=True)
    return sum(text == data.captions[i] for i, text in pairs) / max(len(captions), 1)


def chosen(rows: Tensor, captions: list[str], keep: list[bool]) -> tuple[Tensor, list[str]]:
    return rows[torch.tensor(keep)], [x for x, good in zip(captions, keep, strict=True) if good]
