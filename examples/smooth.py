"""Training on the metric: smooth accuracy and F1 beside cross-entropy, on rare and wrong labels.

    python -m examples.smooth             # five seeds; a minute on two cores
    python -m examples.smooth --quick     # two seeds, few steps

Handwritten digits, where each class is a quarter rarer than the one before and a fifth of the
training labels is wrong. One network learns them by cross-entropy, by `tw.smooth.accuracy`, by
`tw.smooth.f1`, and by the score function on the hard F1 of drawn labels, which needs no slope.
Labels of the test digits are right.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

import tilewise as tw
from examples import smooth_report
from examples.common import report
from examples.common.data import digits
from examples.common.training import arguments, conduct
from tilewise import estimators

RARER, WRONG, CLASSES = 0.75, 0.2, 10
SAMPLES = 16  # of all labels, for the score function
METRICS = ("accuracy", "f1")


class Problem(NamedTuple):
    """Pixels (N, 49) and labels; of a part of the training digits, to stop by, none is seen."""

    train: tuple[Tensor, Tensor]
    stopping: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def to(self, device: str) -> Problem:
        return Problem(*((pixels.to(device), labels.to(device)) for pixels, labels in self))


def problem(seed: int) -> Problem:
    """Which class is rare, which digits are seen and which labels are wrong depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = digits()
    pixels = F.avg_pool2d(images.float() / 255, 4).flatten(1)
    names = torch.randperm(CLASSES, generator=generator)  # the first is the most frequent
    seen, heldout = [], []
    for i, name in enumerate(names):
        rows = (labels == name).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        count = round(len(rows) / 2 * RARER**i)
        seen.append(rows[:count])
        heldout.append(rows[-count:])
    train, test = torch.cat(seen), torch.cat(heldout)
    train = train[torch.randperm(len(train), generator=generator)]
    other = torch.randint(1, CLASSES, (len(train),), generator=generator)
    wrong = torch.rand(len(train), generator=generator) < WRONG
    given = torch.where(wrong, (labels[train] + other) % CLASSES, labels[train])
    cut = len(train) // 5
    return Problem(
        (pixels[train[cut:]], given[cut:]), (pixels[train[:cut]], given[:cut]),
        (pixels[test], labels[test]),
    )  # fmt: skip


# ---- four losses


def score_function(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - F1 of labels that are drawn from the softmax, one row whose variables are all labels."""

    def loss(drawn: Tensor) -> Tensor:  # (S, 1, N, K) -> (S, 1)
        return 1 - tw.smooth.f1(drawn, labels.expand(drawn.shape[:-1]), tau=0)

    rows = estimators.Categorical(logits[None])
    return estimators.score_function(loss, rows, SAMPLES, baseline="leave_one_out").mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "soft accuracy": lambda logits, labels: 1 - tw.smooth.accuracy(logits, labels),
    "soft F1": lambda logits, labels: 1 - tw.smooth.f1(logits, labels),
    "score function, F1": score_function,
}


def train(loss: str, data: Problem, args, seed: int) -> list[dict]:
    """What was measured along the way."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(49, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    model.to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), args.rate)
    history = []
    for step in range(args.steps + 1):
        if step % args.every == 0:
            history.append({"step": step, **measure(model, data)})
        optimizer.zero_grad()
        LOSSES[loss](model(data.train[0]), data.train[1]).backward()
        optimizer.step()
    return history


@torch.no_grad()
def measure(model: nn.Module, data: Problem) -> dict:
    """Hard metrics of the test digits and of those to stop by; cross-entropy of the seen ones."""
    found = {"cross-entropy": F.cross_entropy(model(data.train[0]), data.train[1]).item()}
    for part in ("train", "stopping", "test"):
        pixels, labels = getattr(data, part)
        logits = model(pixels)
        found[f"{part} accuracy"] = tw.smooth.accuracy(logits, labels, tau=0).item()
        found[f"{part} f1"] = tw.smooth.f1(logits, labels, tau=0).item()
    return found


def stopped(history: list[dict], metric: str) -> float:
    """The test metric where the one of the digits to stop by, wrong labels and all, is best."""
    return max(history, key=lambda found: found[f"stopping {metric}"])[f"test {metric}"]


def run(args, bars: Progress) -> dict[str, list[list[dict]]]:
    """The history of every seed, for each loss."""
    found: dict[str, list] = {loss: [] for loss in LOSSES}
    tasks = {loss: bars.add_task(loss, total=args.seeds, note="") for loss in LOSSES}
    for seed in range(args.seed, args.seed + args.seeds):
        data = problem(seed).to(args.device)
        for loss, histories in found.items():
            histories.append(train(loss, data, args, seed))
            note = f"test accuracy {100 * histories[-1][-1]['test accuracy']:.1f} %"
            bars.update(tasks[loss], advance=1, note=note)
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, Path("out/smooth"), every=20, resumes=False, on_device=True)
    add = parser.add_argument
    add("--steps", type=int, default=400, help="of all training digits")
    add("--rate", type=float, default=1e-2, help="of Adam (default: %(default)s)")
    add("--seeds", type=int, default=5, help="how many, from --seed on")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.seeds = 60, 2
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    console, found = conduct("Smooth metrics", args, run)
    results = {
        metric: {
            "last": {k: [h[-1][f"test {metric}"] for h in v] for k, v in found.items()},
            "stopped": {k: [stopped(h, metric) for h in v] for k, v in found.items()},
        }
        for metric in METRICS
    }
    console.print(smooth_report.table(results, sum(len(x) for x in problem(args.seed).train[1:])))
    smooth_report.curves(found, args.out / "curves.png")
    smooth_report.rates(args.out / "rates.png")
    value = smooth_report.value(found, results)
    report.finish(console, args.out, ["curves.png", "rates.png"], value, found)
    return results


if __name__ == "__main__":
    main()
