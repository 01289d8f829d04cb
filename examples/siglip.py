"""SigLIP on real pictures: the fused loss beside the eager one, then a batch of 16384.

    python -m examples.siglip            # everything; about two and a half minutes on two cores
    python -m examples.siglip --quick    # a look at every stage in half a minute
    python -m examples.siglip --resume   # go on from the checkpoints in --out
    torchrun --nproc-per-node=2 -m examples.siglip    # the first run, by two processes

Sigmoid Loss for Language Image Pre-Training, Zhai et al. 2023 (arXiv 2303.15343): a learnable
temperature exp(t') and bias b start at t' = log 10 and b = -10. The last stage locks the image
tower as in LiT, Zhai et al. 2022 (arXiv 2111.07991).
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from rich.progress import Progress

import tilewise as tw
from examples import siglip_report
from examples.common import large_batch, parallel, report
from examples.common.data import SCENE_WORDS, Pairs, pairs, scenes, split
from examples.common.retrieval import chance, nearest_pixel, recall
from examples.common.supervision import LOSSES
from examples.common.towers import ImageTower, TextTower, TwoTowers, Words, score
from examples.common.training import Batches, Run, arguments, optimize, progress, train

NEXT = (
    "Next: `make recipes RECIPES=bias` says what b is, RECIPES=dfn finds better data, "
    "RECIPES=cheaper trains at less cost; `make recipes` runs all of examples/README.md."
)


class SigLipRun(Run):
    """Nothing but the loss function differs between two runs of one seed.

    Args:
        bias: b at first.
        loss: "fused" or "eager".
        place: this process. Each embeds its part of a batch.
    """

    def __init__(self, loss: str, args, batches: Batches, heldout: Pairs, bias: float, steps: int,
                 place: parallel.Place = parallel.ALONE):  # fmt: skip
        torch.manual_seed(args.seed)
        towers = ImageTower(), TextTower(len(batches.words))
        model = TwoTowers(*towers, bias).to(args.device)
        label = f"{loss} loss" + ("" if bias else ", b = 0 at first")
        path = args.out / f"{loss}{'' if bias else '-b0'}.pt"
        settings = {"steps": args.steps, "batch_size": args.batch_size, "seed": args.seed}
        names = ("scale", "bias", "apart", "recall")
        super().__init__(label, path, model, model.optimizer(), steps, settings, names)
        both = LOSSES["SigLIP"]
        self.loss, self.other = both[loss], both["eager" if loss == "fused" else "fused"]
        self.batches, self.heldout, self.schedule = batches, heldout, args.steps
        self.device = args.device
        self.place, self.replica = place, place.replica(model)
        if place.size > 1:
            self.loss = tw.nn.SigLipLoss(rank=place.rank, world_size=place.size)

    def before(self, step: int) -> None:
        parts = (self.place.part(x) for x in self.batches(step))
        self.images, self.tokens = (x.to(self.device) for x in parts)

    def step(self, step: int) -> None:
        self.inputs = self.replica(self.images, self.tokens)
        value = self.loss(*self.inputs)
        value.backward()
        optimize(self.optimizer, step, self.schedule)
        self.history["loss"].append(self.place.mean(value).item())

    def after(self, step: int) -> None:
        """The other loss of the same features."""
        image, text, *scalars = (x.detach() for x in self.inputs)
        if self.place.size > 1:
            image, text = (tw.distributed.gather(x) for x in (image, text))
        other = self.other(image, text, *scalars).item()
        self.history["apart"].append(abs(other / self.history["loss"][-1] - 1))
        self.history["scale"].append(self.model.log_scale.exp().item())
        self.history["bias"].append(self.model.logit_bias.item())

    def evaluate(self) -> None:
        if self.place.rank:
            return
        found = recall(score(self.model, self.heldout, self.batches.words))
        self.history["recall"].append([self.done, *found])

    def save(self) -> None:
        if self.place.rank == 0:
            super().save()

    def note(self) -> str:
        found = self.history["recall"]
        return super().note() + (f"   recall@1 {100 * found[-1][1]:.0f} %" if found else "")


def train_large(model: TwoTowers, words: Words, args, bars: Progress) -> dict:
    """The history of the text tower going on alone, on batches of `args.large_batch` scenes.

    Among so many more pairs a match is that much rarer: the bias starts where the odds put it.
    """
    model = copy.deepcopy(model).eval()
    canvases = scenes(2 * args.large_batch, seed=args.seed + 1)
    task = bars.add_task("embedding scenes", total=len(canvases.captions), note="")
    features = large_batch.embed_scenes(
        model.image, canvases, lambda n: bars.update(task, advance=n)
    )
    tokens = words(canvases.captions)

    model.image.requires_grad_(False)
    model.logit_bias.data -= math.log(args.large_batch / args.batch_size)
    optimizer = model.optimizer(tower_rate=2e-4, scalar_rate=0.02)
    generator = torch.Generator().manual_seed(args.seed)
    history: dict[str, list] = {"loss": [], "seconds": [], "in_loss": []}
    task = bars.add_task(f"batch {args.large_batch}, fused", total=args.large_steps, note="")
    for step in range(args.large_steps):
        began = time.perf_counter()
        if step % 2 == 0:
            halves = torch.randperm(len(tokens), generator=generator).split(args.large_batch)
        rows = halves[step % 2]
        rows = rows[large_batch.by_length(tokens[rows])]
        value, in_loss = large_batch.step_text(
            model.text, tokens[rows], features[rows],
            model.log_scale.exp(), model.logit_bias, LOSSES["SigLIP"]["fused"],
        )  # fmt: skip
        optimize(optimizer, step, args.large_steps, warmup=2)
        history["seconds"].append(time.perf_counter() - began)
        history["in_loss"].append(in_loss)
        history["loss"].append(value)
        bars.update(task, advance=1, note=f"loss {value:.3f}")
    return history


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, Path("out/siglip"), every=25, on_device=True)
    add = parser.add_argument
    add("--steps", type=int, default=300, help="training steps (default: %(default)s)")
    add("--batch-size", type=int, default=256, help="pairs per batch, a quarter of them scenes")
    add("--loss", choices=["fused", "eager", "both"], default="both", help="which loss to train")
    add("--no-bias-prior", action="store_true", help="ablation: whole runs with b = 0 at first")
    add("--large-batch", type=int, default=16384, help="scenes per batch of the last stage")
    add("--large-steps", type=int, default=8, help="its steps; 0 leaves it out")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.batch_size, args.every = 20, 64, 10
        args.large_batch, args.large_steps = min(args.large_batch, 1024), min(args.large_steps, 2)
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    with parallel.processes() as place:
        return run(args, place)


def _opening(args: argparse.Namespace) -> str:
    """What is about to happen."""
    both = " with the fused loss and, in turn with it, with the eager one," * (args.loss == "both")
    large = f", then the text tower goes on with {args.large_batch:,} scenes a step"
    return (
        f"In {args.steps} steps two small towers learn{both} to find each other's match among "
        f"pictures and captions{large * bool(args.large_steps)}."
    )


def run(args: argparse.Namespace, place: parallel.Place) -> dict:
    """Trains, measures and reports; several processes train one run, which the first reports."""
    if place.size > 1:
        args.loss, args.large_steps, args.device = "fused", 0, "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    console = report.console()
    console.quiet = place.rank > 0
    by = f" by {place.size} processes" if place.size > 1 else ""
    console.print(f"[bold]SigLIP[/]{by} on {report.machine(args.device)}")
    console.print(_opening(args))
    seen, heldout = split()
    console.print(
        f"{len(pairs().captions)} pictures, {len(seen.captions)} different ones to train on, "
        f"{len(heldout.captions)} held out: unseen combinations of known words"
    )
    words = Words([*seen.captions, *SCENE_WORDS])
    canvases = args.batch_size // 4
    batches = Batches(
        seen, scenes(canvases * args.steps, args.seed), (args.batch_size - canvases, canvases),
        words, args.seed,
    )  # fmt: skip

    bias = 0.0 if args.no_bias_prior else -10.0
    runs = {
        loss: SigLipRun(loss, args, batches, heldout, bias, args.steps, place)
        for loss in (["fused", "eager"] if args.loss == "both" else [args.loss])
    }
    if args.loss == "both" and bias:
        runs["b = 0"] = SigLipRun("fused", args, batches, heldout, 0.0, args.steps // 3)
    with progress(console) as bars:
        train([*runs.values()], bars, args.every, args.resume)
        kept = next(iter(runs.values())).model
        histories = {name: run.history for name, run in runs.items()}
        if args.large_steps:
            histories["large"] = train_large(kept, words, args, bars)
    if place.rank:
        return histories
    results = {
        "heldout": len(heldout.captions), "batch": args.batch_size,
        "large_batch": args.large_batch, "chance": chance(len(heldout.captions)),
        "nearest pixel": nearest_pixel(seen, heldout), "runs": histories,
    }  # fmt: skip
    dim = kept.image.head.out_features
    with console.status("measuring the losses alone, in processes of their own"):
        sizes = [args.batch_size] + [args.large_batch] * bool(args.large_steps)
        results["alone"] = [large_batch.measure(batch, dim, args.device) for batch in sizes]
    siglip_report.tables(console, results)
    siglip_report.curves(results, args.out / "curves.png")
    siglip_report.sheet(heldout, score(kept, heldout, words), args.out / "retrieval.png")
    pictures, value = ["curves.png", "retrieval.png"], siglip_report.value(results)
    report.finish(console, args.out, pictures, value, results, NEXT)
    return results


if __name__ == "__main__":
    main()
