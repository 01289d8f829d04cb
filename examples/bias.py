"""The bias as a learnt threshold: of a unit on digits, and of SigLIP's pairs.

    python -m examples.bias            # five minutes of one core
    python -m examples.bias --quick    # a look at every stage
    python -m examples.bias --resume   # go on from the checkpoints in --out

A unit fires where sum x w > T. With b = -T that is sum x w + b > 0: the bias is the threshold, and
is learnt with the weights. First ten units tell digits apart, with a T that is picked by hand over
a sweep, or learnt. Then SigLIP (Zhai et al. 2023, arXiv 2303.15343), where a picture and a caption
match if t s + b > 0, that is s > -b / t: batches of three sizes, and three biases at first.
"""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from examples import bias_report
from examples.common import large_batch, report
from examples.common.contrast import SIGLIP, PairRun
from examples.common.data import Pairs, digits, split, split_heldout
from examples.common.matching import best_threshold, calibration, called, fit, log_odds, of_scores
from examples.common.retrieval import recall
from examples.common.towers import ImageTower, TextTower, TwoTowers, Words, score
from examples.common.training import Batches, arguments, conduct, train

DIM = 128  # of the features
# What b is at first: SigLIP's, none, and the log odds of a match among B candidates.
STARTS = {"-10": lambda batch: -10.0, "0": lambda batch: 0.0, "log odds": log_odds}
REFIT = [2**k for k in range(1, 17)]  # candidates for which t and b are fitted to one model's pairs
SWEEP = torch.arange(-9.0, 9.1, 1.5)  # the thresholds that are tried by hand


# ---- a unit: fires where sum x w > T


class Digits(NamedTuple):
    """Pixels (N, 49) in [0, 1], and for each of ten units whether it should fire (N, 10)."""

    pixels: Tensor
    fires: Tensor


def split_digits(seed: int) -> tuple[Digits, Digits, Digits]:
    """2,000 digits to learn from, 1,500 to choose a threshold by, 1,500 to test."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    pixels = F.avg_pool2d(images.float() / 255, 4).flatten(1)
    fires = F.one_hot(labels, 10).float()
    return tuple(Digits(pixels[rows], fires[rows]) for rows in order.split([2000, 1500, 1500]))


def learn_units(data: Digits, thresholds: Tensor | None, steps: int) -> tuple[Tensor, Tensor]:
    """Weights (K, 10, 49) and thresholds (K, 10) by logistic regression, from w = 0.

    Args:
        thresholds: (K,), the T of all ten units, fixed, in each of K trainings; None: one training,
            with a T for each unit that is learnt, from 0.
    """
    count = 1 if thresholds is None else len(thresholds)
    weights = torch.zeros(count, 10, data.pixels.shape[1], requires_grad=True)
    bias = torch.zeros(1, 10) if thresholds is None else -thresholds[:, None].expand(-1, 10)
    learnt = [weights, bias.requires_grad_()] if thresholds is None else [weights]
    optimizer = torch.optim.Adam(learnt, lr=0.1)
    for _ in range(steps):
        sums = torch.einsum("nd,kud->knu", data.pixels, weights) + bias[:, None]  # (K, N, 10)
        wrong = F.binary_cross_entropy_with_logits(
            sums, data.fires.expand(sums.shape), reduction="none"
        )
        optimizer.zero_grad()
        wrong.mean((1, 2)).sum().backward()  # each training by itself
        optimizer.step()
    return weights.detach(), -bias.detach()


def unit_f1(fired: Tensor, wanted: Tensor) -> Tensor:
    """F1 (…, 10) of each unit, from bool (…, N, 10) and (N, 10)."""
    right = (fired & wanted.bool()).sum(-2)
    return 2 * right / (fired.sum(-2) + wanted.sum(0)).clamp(min=1)


def units(seed: int, steps: int) -> dict:
    """F1 of new digits, mean of ten units, by how T was found; and the curves over the sweep."""
    seen, validation, test = split_digits(seed)

    def f1(weights: Tensor, threshold: Tensor, data: Digits) -> Tensor:  # (K, 10)
        sums = torch.einsum("nd,kud->knu", data.pixels, weights)
        return unit_f1(sums > threshold[:, None], data.fires)

    fixed, learnt = learn_units(seen, SWEEP, steps), learn_units(seen, None, steps)
    by_choice, by_test = (f1(*fixed, data) for data in (validation, test))  # (K, 10) each
    one, each = by_choice.mean(1).argmax(), by_choice.argmax(0)
    zero = int((SWEEP == 0).nonzero())
    plain = fixed[0][zero : zero + 1]  # trained with T = 0; then T is moved
    moved = torch.linspace(-9, 9, 361)
    later = torch.cat([f1(plain, m.expand(1, 10), validation) for m in moved]).argmax(0)
    return {
        "T = 0": by_test[zero].mean().item(),
        "T = 0, then moved for each unit": f1(plain, moved[later][None], test).mean().item(),
        "one T, the best of the sweep": by_test[one].mean().item(),
        "a T for each unit, the best of the sweep": by_test[each, torch.arange(10)].mean().item(),
        "b = -T learnt": f1(*learnt, test).mean().item(),
        "sweep": by_test.mean(1).tolist(), "learnt": learnt[1][0].tolist(),
        "sums": _one_unit(seen, test, *learnt),
    }  # fmt: skip


def _one_unit(seen: Digits, test: Digits, weights: Tensor, threshold: Tensor) -> dict:
    """What unit 8 sums up over new digits, for a picture."""
    sums = test.pixels @ weights[0, 8]
    wanted = test.fires[:, 8].bool()
    return {"yes": sums[wanted].tolist(), "no": sums[~wanted].tolist(),
            "T": threshold[0, 8].item(), "digit": 8}  # fmt: skip


# ---- pairs: match where s > -b / t


def judge(run: PairRun, validation: Pairs, test: Pairs, sizes: list[int]) -> dict:
    """Of one trained model: thresholds, calibration, and other shares of matches than its own."""
    words, batch = run.batches.words, run.batches.singles
    chosen, new = (score(run.model, part, words) for part in (validation, test))
    scale, bias = run.model.log_scale.exp().item(), run.model.logit_bias.item()
    own = of_scores(new, batch)
    hand = best_threshold(of_scores(chosen, batch))
    found = {
        "scale": scale, "bias": bias, "hand": hand, "recall": recall(new),
        "learnt calls": called(own, -bias / scale), "hand calls": called(own, hand),
        "calibration": calibration(own, scale, bias), "first loss": run.history["loss"][0],
        "last loss": statistics.mean(run.history["loss"][-10:]),
        "other odds": {},
        "curves": {name: run.history[name] for name in ("bias", "recall")},
    }  # fmt: skip
    for size in sizes:
        there = of_scores(new, size)
        moved = bias + log_odds(size) - log_odds(batch)
        found["other odds"][str(size)] = {
            name: {"calls": called(there, -b / scale), **calibration(there, scale, b)}
            for name, b in (("as learnt", bias), ("moved", moved))
        }
    return found


def train_pairs(args, bars: Progress) -> dict:
    """Everything that was found of the runs, by batch, start and seed."""
    seen, _ = split()
    validation, test = split_heldout(args.held)
    words = Words(seen.captions)
    found: dict = {"candidates": len(test.captions), "runs": {}}
    for seed in range(args.seed, args.seed + args.seeds):
        for batch in args.batches:
            batches = Batches(seen, None, (batch, 0), words, seed)
            losses = dict.fromkeys(STARTS, SIGLIP["fused"])
            if batch == args.twin and seed == args.seed:
                losses["-10, eager"] = SIGLIP["eager"]
            runs = {}
            for start, loss in losses.items():
                torch.manual_seed(seed)
                bias = STARTS[start.removesuffix(", eager")](batch)
                towers = ImageTower(DIM, width=32), TextTower(len(words), DIM)
                model, label = TwoTowers(*towers, bias), f"{batch}, b₀ = {start}"
                path = args.out / f"{batch}-{re.sub('[^a-z0-9]+', '-', f'b {start}')}-{seed}.pt"
                runs[start] = PairRun(label, path, model, batches, validation, args.steps, loss,
                                      args.device)  # fmt: skip
            train([*runs.values()], bars, args.every, args.resume, f"batch {batch}, seed {seed}")
            for start, run in runs.items():
                result = judge(run, validation, test, args.batches)
                found["runs"].setdefault(f"{batch}/{start}", []).append(result)
            if batch == args.twin and seed == args.seed:
                twins = {"fused": runs["-10"], "eager": runs["-10, eager"]}
                found["cost"] = large_batch.beside_eager({"SigLIP": twins}, batch, DIM, args.device)
                scores = score(runs["-10"].model, validation, words)
                found["refit"] = [[n, *fit(of_scores(scores, n))] for n in REFIT]
    return found


def run(args, bars: Progress) -> dict:
    seeds = range(args.seed, args.seed + args.seeds)
    task = bars.add_task("ten units", total=len(seeds), note="")
    found: dict = {"units": []}
    for seed in seeds:
        found["units"].append(units(seed, args.unit_steps))
        bars.update(task, advance=1)
    return found | train_pairs(args, bars)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, Path("out/bias"), every=50, on_device=True)
    add = parser.add_argument
    add("--steps", type=int, default=300, help="of each SigLIP run (default: %(default)s)")
    add("--seeds", type=int, default=3, help="how many, from --seed on")
    args = parser.parse_args(argv)
    args.batches, args.twin, args.unit_steps = [16, 64, 256], 64, 300
    args.held = None
    if args.quick:
        args.held = 60
        args.steps, args.every, args.seeds, args.unit_steps = 4, 2, 2, 20
        args.batches, args.twin = [8, 16], 16
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    console, found = conduct("The bias as a threshold", args, run)
    bias_report.tables(console, found, args)
    names = bias_report.pictures(found, args)
    report.finish(console, args.out, names, bias_report.value(found, args), found)
    return found


if __name__ == "__main__":
    main()
