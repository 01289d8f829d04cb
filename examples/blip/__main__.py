"""BLIP on scenes of OpenMoji pictures: one model that finds, matches, captions and answers.

    python -m examples.blip             # eleven minutes on one core
    python -m examples.blip --quick     # a look at every stage
    python -m examples.blip --resume    # go on from the checkpoints in --out

BLIP: Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and
Generation, Li et al. 2022: one text transformer in three roles, taught by a contrast with a queue
and a momentum teacher (ITC, `tw.nn.ItcLoss`), by matching against wrong pairs that look right (ITM,
`tw.hard_negatives`) and by writing captions (LM).

1. BLIP, and what is left without some of its losses, the queue or the soft targets, on pairs of
   things never seen together: retrieval, before and after matching ranks the best anew; captions.
2. CapFilt: from a pool with wrong and vague captions, a captioner and a filter make a better one.
3. Questions about scenes, answered by the decoder.
4. What a step costs at the published queue of 57,600.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.progress import Progress

from examples.blip import answers, capfilt, cost, judge, pictures
from examples.blip import report as pages
from examples.blip.model import Tokens
from examples.blip.training import KINDS, BlipRun, Kind, Learner, pool
from examples.blip.world import VIEWS, Captioned, captioned, sentences
from examples.common import report
from examples.common.training import arguments, conduct, train


def judged(learner: Learner, kind: Kind, part: Captioned, ways=judge.WAYS) -> dict:
    """What a model can do, on a part that it has not learned from."""
    model, found = learner.student, {}
    if kind.itc:
        found["retrieval"] = judge.retrieval(model, part, match=kind.itm)
    if kind.itm:
        found["matching"] = judge.match_accuracy(model, part, judge.wrong_captions(part))
    if kind.lm:
        found["captions"] = {
            way: judge.caption_scores(
                judge.write_all(model, part.images[:, 0], way), part.captions, model.tokens
            )
            for way in ways
        }
    return found


def ablations(train_part: Captioned, part: Captioned, tokens: Tokens, args, bars: Progress) -> dict:
    """Of each kind and seed the trained model and what it can do."""
    runs = {
        kind: [BlipRun(kind, KINDS[kind], pool(train_part), tokens, args, seed, args.steps)
               for seed in args.seeds]
        for kind in KINDS
    }  # fmt: skip
    for seed in range(len(args.seeds)):  # what is compared takes turns
        train([of[seed] for of in runs.values()], bars, args.every, args.resume)
    return {
        kind: [(run.model, judged(run.model, KINDS[kind], part)) for run in of]
        for kind, of in runs.items()
    }


def run(args, bars: Progress) -> dict:
    tokens = Tokens(sentences())
    train_part, part = (
        captioned(name, views).first(args.scenes)
        for name, views in (("train", VIEWS), (args.part, 1))
    )
    trained = ablations(train_part, part, tokens, args, bars)
    found: dict = {
        "part": args.part, "scenes": len(part.captions), "seen": len(train_part.captions),
        "kinds": {kind: [x for _, x in of] for kind, of in trained.items()},
    }  # fmt: skip
    nearest = judge.nearest_captions(train_part, part.images[:, 0])
    found["nearest"] = judge.caption_scores(nearest, part.captions, tokens)

    found["pools"] = {name: [] for name in capfilt.POOLS}
    found["capfilt"] = []
    for seed, (_, of_oracle) in zip(args.seeds, trained["BLIP"], strict=True):
        cleaned = capfilt.clean_up(train_part, tokens, args, bars, seed)
        for name, learner in cleaned.pop("models").items():
            found["pools"][name].append(judged(learner, Kind(), part, ("greedy",)))
        found["pools"]["oracle"].append(of_oracle)
        found["capfilt"].append(cleaned)
    found["answers"] = [
        answers.compare(learner.student, args, bars, seed)
        for seed, (learner, _) in zip(args.seeds, trained["BLIP"], strict=True)
    ]
    task = bars.add_task("cost of a large queue", total=1, note="")
    found["cost"], found["queue"] = cost.measure(args), args.cost_queue
    bars.update(task, advance=1)
    pictures.sheet(trained["BLIP"][0][0].student, train_part, part, found, args.out / "blip.png")
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, Path("out/blip"), every=100, on_device=True)
    add = parser.add_argument
    add("--steps", type=int, default=400, help="of a model (default: %(default)s)")
    add("--rate", type=float, default=2e-3, help="highest learning rate (default: %(default)s)")
    add("--runs", type=int, default=3, help="seeds of each model, from --seed on")
    add("--part", default="test", choices=["validation", "test"],
        help="what models are judged on; choices were made on validation")  # fmt: skip
    args = parser.parse_args(argv)
    args.sizes = {"width": 64, "layers": 2, "heads": 2}
    args.tuning, args.answer_steps = args.steps // 4, args.steps
    args.asked, args.tested, args.cost_rounds, args.cost_queue = 6000, 600, 5, 57_600
    args.scenes = None
    if args.quick:
        args.steps, args.every, args.runs, args.tuning, args.answer_steps = 4, 2, 1, 2, 2
        args.asked, args.tested, args.cost_rounds, args.cost_queue = 64, 60, 1, 500
        args.scenes = 160
        args.sizes = {"width": 16, "layers": 1, "heads": 2}
    args.seeds = range(args.seed, args.seed + args.runs)
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    console, found = conduct("BLIP", args, run)
    pages.tables(console, found)
    report.finish(console, args.out, ["blip.png"], pages.value(found), found)
    return found


if __name__ == "__main__":
    main()
