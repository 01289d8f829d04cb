"""VQGAN, stage one: pictures become 8 x 8 codes, and codes pictures again.

    python -m examples.vqgan_train               # `make vqgan` does both stages
    python -m examples.vqgan_train --quick       # a look at every stage
    python -m examples.vqgan_train --resume      # go on from the checkpoints in --out
    python -m examples.vqgan_train --quantizer residual    # or gumbel; vq otherwise

Taming Transformers for High-Resolution Image Synthesis, Esser et al. 2021: a VQ-VAE whose decoder
also learns from a perceptual loss and from a critic of patches, which begins late. Three variants
go on from the same first steps. Nothing pretrained is used: the perceptual loss compares features
of a network that learned here which words describe a picture; SigLIP, trained here too, judges.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from examples.common import quantizer_cost, report
from examples.common import reconstruction as measure
from examples.common.autoencoders import Autoencoder
from examples.common.data import Pairs, different, scenes
from examples.common.training import Batches, arguments, conduct, train
from examples.vqgan import judge, pictures
from examples.vqgan import report as pages
from examples.vqgan import world as common
from examples.vqgan.models import KINDS, LEARNING
from examples.vqgan.stage_one import VARIANTS, FeaturesRun, StageOneRun
from examples.vqgan.world import Data


def trained(world: Data, args, bars: Progress) -> dict[str, StageOneRun]:
    """The trunk and the variants that go on from it."""
    net = FeaturesRun(world, args)
    train([net], bars, args.every, args.resume)
    net.model.eval().requires_grad_(False)
    args.batches = Batches(
        world.seen, scenes(args.batch_one[1] * args.steps, args.seed), args.batch_one,
        world.words, args.seed,
    )  # fmt: skip
    trunk = StageOneRun("trunk", world, args)
    train([trunk], bars, args.every, args.resume)
    runs = {name: StageOneRun(name, world, args, trunk, net.model) for name in VARIANTS}
    train([*runs.values()], bars, args.every, args.resume)
    return {"trunk": trunk, **runs}


class Judged:
    """Figures of rebuilt pictures beside the held-out ones."""

    def __init__(self, world: Data, model):
        self.pairs = Pairs(
            torch.cat([world.test.images, world.test_scenes.images]),
            world.test.captions + world.test_scenes.captions,
        )
        self.model, self.words, self.singles = model, world.words, len(world.test.captions)
        self.features = judge.features(model, self.pairs.images)

    def __call__(self, rebuilt: Tensor, **more) -> dict:
        images, captions = self.pairs
        n = self.singles
        scores = judge.scores(self.model, rebuilt[:n], captions[:n], self.words)
        return {
            **measure.quality(images, rebuilt), "ssim": judge.ssim(images, rebuilt),
            "frechet": judge.frechet(judge.features(self.model, rebuilt), self.features),
            "first": (judge.ranks(scores) == 1).float().mean().item(), **more,
        }  # fmt: skip


def rows(world: Data, runs: dict[str, StageOneRun], scorer, args) -> tuple[dict, dict]:
    """Figures of each variant and of what they are compared with; what each rebuilt."""
    judged = Judged(world, scorer)
    images = judged.pairs.images
    small, bits = measure.webp(images)
    found = {
        "mean picture": judged(measure.mean_image(world.seen.images, images), bits=0),
        "smallest WebP": judged(small, bits=bits),
        "PNG": judged(images, bits=measure.png_bits(images)),
    }
    rebuilt = {}
    for name in VARIANTS:
        model = runs[name].model.autoencoder
        rebuilt[name] = measure.rebuild(model, images)
        tokens = measure.tokenize(model, images)
        bits = tokens[0].numel() * math.log2(args.codes)
        found[name] = judged(rebuilt[name], bits=bits, **measure.usage(tokens, args.codes))
    return found, rebuilt


def cost(model: Autoencoder, images: Tensor, args) -> dict | None:
    """Of the quantiser's step on a batch of the trained encoder's features; the eager twin is one
    of `VectorQuantizer`."""
    if args.quantizer != "vq":
        return None
    with torch.no_grad():
        features = model.encode(images)
    return quantizer_cost.measure(
        args.out / "cost.pt", features, args.codes, LEARNING, model.quantizer.state_dict(),
        args.measure,
    )  # fmt: skip


def sheet(world: Data, runs: dict, rebuilt: dict, args) -> None:
    singles, drawn = len(world.test.captions), args.shown // 3
    shown = different(world.test.captions, args.shown - drawn)
    shown += range(singles, singles + drawn)
    images = torch.cat([world.test.images, world.test_scenes.images])[shown]
    codes = measure.tokenize(runs["gan"].model.autoencoder, images)
    captions = [(world.test.captions + world.test_scenes.captions)[i] for i in shown]
    named = {"original": images / 255, "codes": pictures.tokens(codes, args.codes, 64)}
    named |= {label: rebuilt[name][shown] for name, label in VARIANTS.items()}
    pictures.rows(
        {name.replace(" and", "\nand"): x for name, x in named.items()},
        args.out / "reconstructions.png", captions,
    )  # fmt: skip


def run(args, bars: Progress) -> dict:
    world = common.data(args)
    scorer = common.judge_run(world, args)
    train([scorer], bars, args.every, args.resume)
    runs = trained(world, args, bars)
    task = bars.add_task("what came of it", total=3, note="held-out pictures")
    found, rebuilt = rows(world, runs, scorer.model, args)
    bars.update(task, advance=1, note="pictures")
    sheet(world, runs, rebuilt, args)
    histories = {name: one.history for name, one in runs.items()}
    pictures.stage_one_curves(histories, args.out / "curves.png")
    gan = runs["gan"].model.eval()
    fields = pictures.fields(
        gan.autoencoder.encoder, gan.critic, world.test.images[:1] / 255, args.out / "fields.png"
    )
    bars.update(task, advance=1, note="what the quantiser takes")
    spent = cost(gan.autoencoder, args.batches(0)[0], args)
    bars.update(task, advance=1, note="")
    return {
        "rows": found, "heldout": len(world.test.captions), "fields": fields, "cost": spent,
        "scenes": len(world.test_scenes.captions), "runs": histories,
        "step_ms": 1e3 * statistics.median(histories["gan"]["seconds"]),
    }  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.add_shared(arguments(__doc__, Path("out/vqgan_train"), every=100))
    add = parser.add_argument
    add("--quantizer", choices=KINDS, default="vq", help="of stage one (default: %(default)s)")
    add("--codes", type=int, default=1024, help="in its codebook, or in each")
    add("--steps", type=int, default=1200, help="of each variant, the shared ones included")
    add("--trunk", type=int, default=800, help="shared steps, before losses differ")
    add("--rate", type=float, default=2e-3, help="highest learning rate (default: %(default)s)")
    add("--critic-rate", type=float, default=2e-3, help="the critic's (default: %(default)s)")
    add("--measure", type=float, default=3.0, help="seconds for timing each quantiser step")
    args = common.shared(parser.parse_args(argv))
    args.stage_one = args.out
    if args.quick:
        args.codes, args.steps, args.trunk, args.measure = 64, 6, 3, 0.05
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    console, found = conduct("VQGAN, stage one", args, run)
    pages.stage_one(console, found)
    names = ["reconstructions.png", "curves.png", "fields.png"]
    report.finish(console, args.out, names, pages.stage_one_value(found), found)
    return found


if __name__ == "__main__":
    main()
