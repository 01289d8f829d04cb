"""VQGAN, stage two: a transformer learns which codes follow each other, and draws new pictures.

    python -m examples.vqgan_sample              # after `python -m examples.vqgan_train`
    python -m examples.vqgan_sample --quick      # a look at every stage, after --quick of that
    python -m examples.vqgan_sample --resume     # go on from the checkpoints in --out

A causal transformer reads a caption and then writes 64 codes, one after the other, which stage
one's decoder turns into a picture. Beside it the same transformer writes 1,024 pixels instead, for
about as many seconds of training: why to compress first.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

import tilewise as tw
from benchmarks.harness.measure import time_interleaved
from examples.common import report
from examples.common.reconstruction import tokenize
from examples.common.towers import TwoTowers
from examples.common.training import arguments, conduct, train
from examples.vqgan import judge, pictures, sampling, sheets, stage_one, stage_two
from examples.vqgan import report as pages
from examples.vqgan import world as common
from examples.vqgan.pixels import Palette
from examples.vqgan.sampling import Painter, Rule
from examples.vqgan.stage_two import SequenceRun, Sets, nats
from examples.vqgan.transformer import WORDS, Transformer, read
from examples.vqgan.world import Data


def chosen(painter: Painter, world: Data, scorer: TwoTowers, args) -> tuple[Rule, dict]:
    """How to draw: what brings most captions of validation pictures to the first place."""
    captions, grid = world.validation.captions, {}
    for guidance in args.guidances:
        for top_k in args.tops:
            codes = painter.codes(captions, Rule(guidance, 1.0, top_k), args.seed + 7)
            made = painter.pictures(codes)
            grid[guidance, top_k] = first_among(scorer, made, captions, world, 1)
    best = max(grid, key=grid.__getitem__)
    return Rule(best[0], 1.0, best[1]), grid


def first_among(scorer: TwoTowers, made: Tensor, captions: list[str], world: Data, k: int) -> float:
    found = judge.ranks(judge.scores(scorer, made, captions, world.words))
    return (found <= k).float().mean().item()


def judged(painter: Painter, world: Data, found: Sets, scorer: TwoTowers, rule: Rule, args) -> dict:
    """Rows of the table of samples, and the samples for the test captions."""
    captions, among = world.test.captions, len(world.test.captions)
    scenes = world.test_scenes.captions[:among]
    made = painter.pictures(painter.codes(captions, rule, args.seed))
    free = painter.pictures(painter.codes(captions, rule._replace(guidance=0.0), args.seed))
    drawn = painter.pictures(painter.codes(scenes, rule, args.seed + 1))
    rebuilt = painter.pictures(found.test.codes)
    seen = painter.pictures(found.singles.codes)
    limit = torch.quantile(judge.nearest(rebuilt, seen)[0], 0.05)
    real = judge.features(scorer, world.test.images)

    def ranked(images: Tensor, texts: list[str]) -> dict:
        shares = {
            name: first_among(scorer, images, texts, world, k)
            for name, k in (("first", 1), ("five", 5))
        }
        return {"of": len(images), "among": len(texts), **shares}

    def row(images: Tensor) -> dict:
        near = judge.nearest(images, seen)[0]
        return {
            **ranked(images, captions),
            "frechet": judge.frechet(judge.features(scorer, images), real),
            "near": near.median().item(), "copies": (near < limit).float().mean().item(),
        }  # fmt: skip

    known = world.validation
    table = {
        "validation pictures": {
            **ranked(known.images, known.captions),
            "frechet": judge.frechet(judge.features(scorer, known.images), real),
        },
        "held-out pictures": ranked(world.test.images, captions),
        "held-out pictures, rebuilt": row(rebuilt), "samples": row(made),
        "samples without caption": row(free),
        "held-out scenes": ranked(world.test_scenes.images[:among], scenes),
        "held-out scenes, rebuilt": ranked(
            painter.pictures(found.test_scenes.codes[:among]), scenes
        ),
        "samples of scenes": ranked(drawn, scenes),
        "chance": {"of": among, "among": among, "first": 1 / among, "five": 5 / among},
    }  # fmt: skip
    made_scenes = {"real": world.test_scenes.images[:among] / 255, "sample": drawn}
    return {"table": table, "made": made, "seen": seen, "free": free, "scenes": made_scenes}


def by_pixels(model: Transformer, palette: Palette, world: Data, scorer, rule: Rule, args) -> dict:
    """Samples of the transformer over pixels for some test captions, which then come first."""
    shown = torch.linspace(0, len(world.test.captions) - 1, args.pixel_samples).long().tolist()
    others = [i for i in range(len(world.test.captions)) if i not in shown]
    captions = [world.test.captions[i] for i in shown + others]
    words = read(world.words, captions[: len(shown)])
    made = palette.pictures(sampling.split(model, words, rule, args.seed))
    scores = judge.scores(scorer, made, captions, world.words)
    return {"made": made, "shown": shown, "first": (judge.ranks(scores) == 1).float().mean().item()}


def sampling_cost(model: Transformer, rows: int, rule: Rule, args) -> tuple[dict, float]:
    """Milliseconds of one draw, ours and the eager one, and of the step that it belongs to: in the
    middle of a picture, of `rows` pictures with and without their captions."""
    model.eval()
    generator = torch.Generator().manual_seed(args.seed)
    words = torch.randint(1, 9, (2 * rows, WORDS), generator=generator)
    codes = torch.zeros(2 * rows, dtype=torch.int64)
    with torch.no_grad():
        past, logits = model.begin(words)
        for _ in range(model.length // 2):
            logits = model.next(past, codes)
        middle = past[0].length
        logits = sampling.guided(logits, rule)

        def step() -> None:
            for layer in past:
                layer.length = middle
            sampling.draw(sampling.guided(model.next(past, codes), rule), rule, 0)

        masked = sampling.masked(logits, rule.top_k) / rule.temperature
        times = time_interleaved({
            "tilewise": lambda: tw.gumbel_argmax(masked, seed=0),
            "eager": lambda: torch.multinomial(torch.softmax(masked, 1), 1),
            "step": step,
        }, seconds=args.measure)  # fmt: skip
    medians = {name: {"ms": statistics.median(x)} for name, x in times.items()}
    return medians, medians.pop("step")["ms"]


def run(args, bars: Progress) -> dict:
    world = common.data(args)
    scorer_run = common.judge_run(world, args)
    train([scorer_run], bars, args.every, resume=True)
    scorer = scorer_run.model
    first, settings = stage_one.load(args.stage_one)
    found = stage_two.sets(world, lambda images: tokenize(first, images))
    palette = Palette(world.seen.images, args.colours, args.seed)
    grid = tokenize(first, world.test.images[:1]).shape[1:]

    size = {"width": args.width, "layers": args.layers}
    torch.manual_seed(args.seed)
    length = found.singles.codes.shape[1]
    by_codes = Transformer(len(world.words), settings["codes"], length, **size)
    codes_run = SequenceRun("stage two, codes", args.out / "codes.pt", by_codes, found, args,
                            args.steps, args.batch_two)  # fmt: skip
    train([codes_run], bars, args.every, args.resume)
    torch.manual_seed(args.seed)
    pixel_model = Transformer(len(world.words), args.colours, palette.side**2, **size)
    pixels_run = SequenceRun(
        "the same over pixels", args.out / "pixels.pt", pixel_model,
        stage_two.sets(world, palette.codes), args, args.pixel_steps, (3, 1),
    )  # fmt: skip
    train([pixels_run], bars, args.every, args.resume)

    task = bars.add_task("what came of it", total=5, note="likelihoods")
    painter = Painter(first, by_codes, world.words, tuple(grid))
    likely = likelihoods(by_codes, found)
    bars.update(task, advance=1, note="how to draw")
    rule, tried = chosen(painter, world, scorer, args)
    bars.update(task, advance=1, note="samples")
    came = judged(painter, world, found, scorer, rule, args)
    bars.update(task, advance=1, note="samples by pixels")
    pixel = by_pixels(pixel_model, palette, world, scorer, rule, args)
    bars.update(task, advance=1, note="pictures")
    sheets.show(painter, world, found, came, pixel, rule, args)
    spent, step_ms = sampling_cost(by_codes, len(world.test.captions), rule, args)
    among = 1 / len(world.validation.captions)
    pictures.stage_two_curves(codes_run.history, pixels_run.history, tried, among,
                              args.out / "curves.png")  # fmt: skip
    bars.update(task, advance=1, note="")
    mine = judge.ranks(judge.scores(scorer, came["made"], world.test.captions, world.words))
    budget = {
        "codes": _budget(codes_run, mine[pixel["shown"]]),
        "pixels": {**_budget(pixels_run, None), "first": pixel["first"]},
    }
    for x in budget.values():
        x["of"] = len(pixel["shown"])
    return {
        "nats": likely, "length": by_codes.length, "grid": tried, "rule": rule._asdict(),
        "guidances": args.guidances, "tops": args.tops, "samples": came["table"],
        "budget": budget, "cost": spent, "step_ms": step_ms,
        "rows_sampled": len(world.test.captions),
        "runs": {"codes": codes_run.history, "pixels": pixels_run.history},
    }  # fmt: skip


def _budget(one: SequenceRun, found: Tensor | None) -> dict:
    return {
        "seconds": sum(one.history["seconds"]), "pictures": one.steps * sum(one.batch),
        "places": one.model.length,
        "first": 0.0 if found is None else (found == 1).float().mean().item(),
    }  # fmt: skip


def likelihoods(model: Transformer, found: Sets) -> dict[str, float]:
    """Nats a code of several parts, beside a model that knows nothing but how common codes are."""
    counts = torch.cat([found.singles.codes.flatten(), found.drawn.codes.flatten()])
    common = counts.bincount(minlength=model.codes).float() + 0.5
    common = (common / common.sum()).log()
    return {
        "held-out pictures, by how common codes are": -common[found.test.codes].mean().item(),
        "held-out pictures": nats(model, found.test),
        "held-out pictures, without captions": nats(model, found.test, captions=False),
        "held-out scenes": nats(model, found.test_scenes),
        "held-out scenes, without captions": nats(model, found.test_scenes, captions=False),
        "training pictures": nats(model, found.singles),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.add_shared(arguments(__doc__, Path("out/vqgan_sample"), every=50))
    add = parser.add_argument
    add("--stage-one", type=Path, help="its folder (default: vqgan_train, beside --out)")
    add("--steps", type=int, default=650, help="of the transformer over codes")
    add("--pixel-steps", type=int, default=450, help="of the one over pixels")
    add("--rate", type=float, default=1e-3, help="highest learning rate (default: %(default)s)")
    add("--measure", type=float, default=2.0, help="seconds for timing a step of sampling")
    args = common.shared(parser.parse_args(argv))
    args.stage_one = args.stage_one or args.out.parent / "vqgan_train"
    args.width, args.layers, args.colours = 192, 4, 256
    args.guidances, args.tops = [1.0, 2.0, 4.0], [32, 256]
    args.pixel_samples, args.wide, args.looked_at = 64, 3, 4096
    if args.quick:
        args.steps, args.pixel_steps, args.width, args.layers = 6, 2, 32, 1
        args.guidances, args.tops, args.pixel_samples = [1.0, 2.0], [16], 3
        args.wide, args.measure, args.looked_at = 2, 0.05, 256
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    console, found = conduct("VQGAN, stage two", args, run)
    pages.stage_two(console, found)
    names = ["samples", "free", "scenes", "invented", "completions", "pixels", "costs", "wide",
             "curves"]  # fmt: skip
    kept = {**found, "grid": [[*rule, share] for rule, share in found["grid"].items()]}
    report.finish(
        console, args.out, [f"{name}.png" for name in names], pages.stage_two_value(found), kept
    )
    return found


if __name__ == "__main__":
    main()
