"""Variational autoencoders on handwritten digits: normal, uniform and discrete latents, and a GAN.

    python -m examples.vae             # three minutes on two cores
    python -m examples.vae --quick     # a look at every stage
    python -m examples.vae --resume    # go on from the checkpoints in --out

Auto-Encoding Variational Bayes, Kingma and Welling 2014: an encoder and a decoder of two hidden
layers of 200, and 16 numbers between them, on 4,000 binary digits of MNIST.

1. Sampling by `tw.gaussian_sample` beside PyTorch's own operations, from one seed.
2. A normal prior and a uniform one; of two numbers, so that the latents can be seen.
3. Categorical latents, with the gradients of `tw.estimators`; codes of `tw.nn.GumbelQuantizer`.
4. A GAN, the other map from latents to pixels; both judged from samples alone.
5. The other half of a digit, its label, and how unusual it is, from the latents.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import Progress

from examples.common import report
from examples.common.training import arguments, conduct, train
from examples.vae import judge, pictures, uses
from examples.vae import report as pages
from examples.vae.training import CATEGORICAL, Data, GanRun, VaeRun, digits

TWINS = ["normal", "normal, eager", "normal, eager, other noise"]
JUDGED = ["normal", "uniform", CATEGORICAL[0], "codes"]


def trained(data: Data, args, bars: Progress) -> dict:
    """Every run by its name; those that are compared take turns."""
    third = args.steps // 3
    groups = [
        [VaeRun(kind, data, args, args.steps) for kind in TWINS],
        [VaeRun("uniform", data, args, args.steps)],
        [VaeRun("normal, without fours", digits(without=4), args, third)],
        [VaeRun(kind, data, args, third) for kind in ("normal, of two", "uniform, of two")],
        [VaeRun(kind, data, args, third) for kind in [*CATEGORICAL, "codes"]],
        [GanRun(data, args, args.steps)],
    ]
    for runs in groups:
        train(runs, bars, args.every, args.resume)
    found = {run.label: run for runs in groups for run in runs}
    for run in found.values():
        run.model.eval()
    return found


@torch.no_grad()
def bounds(runs: dict, data: Data, args) -> dict[str, dict]:
    """Nats of held-out digits, of every VAE of digits of all kinds."""
    found = {}
    for name, run in runs.items():
        if isinstance(run, VaeRun) and name != "normal, without fours":
            torch.manual_seed(0)
            model, x = run.model, data.binary
            found[name] = {
                "elbo": float(model.bound(x, 8).mean()),
                "kl": float(model.latents.divergence(model.encoder(x)).mean()),
                "curve": run.history["bound"], "steps": run.steps,
                "ms": sorted(run.history["seconds"])[run.steps // 2] * 1e3,
            }  # fmt: skip
            if name in JUDGED:
                weighted = model.importance_bound(x, args.importance)
                found[name]["importance"] = float(weighted.mean())
    return found


def run(args, bars: Progress) -> dict:
    data = digits()
    runs = trained(data, args, bars)
    task = bars.add_task("what came of them", total=5, note="bounds")
    found: dict = {"bounds": bounds(runs, data, args), "importance": args.importance}
    bars.update(task, advance=1, note="samples")
    torch.manual_seed(args.seed)
    count = len(data.heldout)
    made = {name: runs[name].model.sample(count) for name in (*JUDGED, "GAN")}
    made["Gaussian of pixels"] = judge.pixel_gaussian(data.seen, count)
    made["training digits"] = data.seen[torch.randperm(len(data.seen))[:count]]
    found["samples"] = judge.judge(made, data.seen, data.heldout, args.judge_steps)
    bars.update(task, advance=1, note="half a digit")
    normal = runs["normal"].model
    found["half"] = uses.half_a_digit(normal, data, args)
    bars.update(task, advance=1, note="labels")
    found["labels"] = args.labels
    found["probe"] = uses.probes(normal, data, args.labels)
    bars.update(task, advance=1, note="unusual digits")
    blind = runs["normal, without fours"].model
    found["anomalies"] = uses.anomalies(blind, digits(without=4), args.anomaly_samples)
    found["ranking"] = uses.ranking(normal, data, args.anomaly_samples)
    bars.update(task, advance=1, note="")
    pictures.sheets(runs, made, data, args.out / "samples.png")
    pictures.latents(runs, data, args.out / "latents.png")
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, Path("out/vae"), every=120)
    add = parser.add_argument
    add("--steps", type=int, default=2400, help="of the longest runs; a third of the others")
    add("--rate", type=float, default=2e-3, help="highest learning rate (default: %(default)s)")
    add("--importance", type=int, default=100, help="samples of the importance-weighted bound")
    args = parser.parse_args(argv)
    args.judge_steps, args.infer_steps, args.halves, args.anomaly_samples = 60, 200, 100, 10
    args.labels = [50, 100, 200, 500, 1000, 4000]
    if args.quick:
        args.steps, args.every, args.importance = 24, 4, 2
        args.judge_steps, args.infer_steps, args.halves, args.anomaly_samples = 20, 5, 50, 2
        args.labels = [50, 200]
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    console, found = conduct("VAE", args, run)
    pages.tables(console, found)
    pictures.curves(found["bounds"], args.out / "curves.png")
    pictures.uses(found, args.out / "uses.png")
    names = [f"{name}.png" for name in ("curves", "samples", "latents", "uses")]
    report.finish(console, args.out, names, pages.value(found), found)
    return found


if __name__ == "__main__":
    main()
