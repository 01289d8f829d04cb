"""SigLIP on real pictures: the fused loss beside the eager one, then a batch of 16384.

    python -m examples.siglip            # everything; about two and a half minutes on two cores
    python -m examples.siglip --quick    # a look at every stage in half a minute
    python -m examples.siglip --resume   # go on from the checkpoints in --out

Sigmoid Loss for Language Image Pre-Training, Zhai et al. 2023 (arXiv 2303.15343): a learnable
temperature exp(t') and bias b start at t' = log 10 and b = -10. The last stage locks the image
tower as in LiT, Zhai et al. 2022 (arXiv 2111.07991).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from examples.common import large_batch, report
from examples.common.data import SCENE_WORDS, Pairs, pairs, scenes, split
from examples.common.large_batch import LOSSES
from examples.common.retrieval import chance, nearest_pixel, recall
from examples.common.towers import ImageTower, TextTower, Words
from examples.common.training import (
    Batches,
    load_checkpoint,
    machine,
    save_checkpoint,
    warmup_cosine,
)


class SigLip(nn.Module):
    """Two towers and the two scalars of the loss."""

    def __init__(self, vocabulary: int, bias: float = -10.0):
        super().__init__()
        self.image = ImageTower()
        self.text = TextTower(vocabulary)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))  # t'
        self.logit_bias = nn.Parameter(torch.tensor(bias))  # b

    def forward(self, images: torch.Tensor, tokens: torch.Tensor):
        """What the loss takes: image_features, text_features, logit_scale, logit_bias."""
        scale, bias = self.log_scale.exp(), self.logit_bias.clone()  # of now, not of the next step
        return self.image(images), self.text(tokens), scale, bias

    def optimizer(self, tower_rate: float = 2e-3, scalar_rate: float = 0.05) -> torch.optim.AdamW:
        towers = [*self.image.parameters(), *self.text.parameters()]
        scalars = [self.log_scale, self.logit_bias]
        groups = [
            {"params": towers, "peak": tower_rate, "weight_decay": 0.1},
            {"params": scalars, "peak": scalar_rate, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.95))


@torch.no_grad()
def score(model: SigLip, shown: Pairs, words: Words) -> torch.Tensor:
    """Cosines (pictures, captions) with the towers in evaluation mode."""
    model.eval()
    image = torch.cat([model.image(part) for part in shown.images.split(512)])
    return image @ model.text(words(shown.captions)).T


def optimize(optimizer: torch.optim.Optimizer, step: int, steps: int, warmup: int = 20) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * warmup_cosine(step, steps, warmup)
    optimizer.step()
    optimizer.zero_grad()


def train(
    loss: str, args, batches: Batches, heldout: Pairs, progress: Progress, bias: float, stop: int
) -> tuple[SigLip, dict]:
    """The first `stop` of `args.steps` steps; the model and its history.

    Nothing but the loss function differs between two runs of one seed. A checkpoint is written now
    and then and at the end; `args.resume` continues from it.
    """
    torch.manual_seed(args.seed)
    model = SigLip(len(batches.words), bias)
    optimizer = model.optimizer()
    history = {name: [] for name in ("loss", "scale", "bias", "seconds", "apart", "recall")}
    path = args.out / f"{loss}{'' if bias else '-b0'}.pt"
    settings = {"steps": args.steps, "batch_size": args.batch_size, "seed": args.seed}
    if args.resume and path.exists():
        history = load_checkpoint(path, model, optimizer, settings)

    done = len(history["loss"])
    label = f"{loss} loss" + ("" if bias else ", b = 0 at first")
    task = progress.add_task(label, total=stop, completed=min(done, stop), note="")
    for step in range(done, stop):
        began = time.perf_counter()
        model.train()
        images, tokens = batches(step)
        inputs = model(images, tokens)
        value = LOSSES[loss](*inputs)
        value.backward()
        optimize(optimizer, step, args.steps)
        history["seconds"].append(time.perf_counter() - began)
        history["loss"].append(value.item())
        other = LOSSES["eager" if loss == "fused" else "fused"](*(x.detach() for x in inputs))
        history["apart"].append(abs(other.item() / value.item() - 1))
        history["scale"].append(model.log_scale.exp().item())
        history["bias"].append(model.logit_bias.item())
        if (step + 1) % args.every == 0 or step + 1 == stop:
            found = recall(score(model, heldout, batches.words))
            history["recall"].append([step + 1, *found])
            save_checkpoint(path, model, optimizer, settings, history)
        progress.update(task, advance=1, note=report.note(history))
    return model, history


def train_large(
    model: SigLip, words: Words, heldout: Pairs, args, progress: Progress
) -> tuple[SigLip, dict]:
    """The text tower goes on alone, on batches of `args.large_batch` scenes.

    Among so many more pairs a match is that much rarer: the bias starts where the odds put it.
    """
    model = copy.deepcopy(model).eval()
    before = recall(score(model, heldout, words))
    canvases = scenes(2 * args.large_batch, seed=args.seed + 1)
    task = progress.add_task("embedding scenes", total=len(canvases.captions), note="")
    features = large_batch.embed_scenes(
        model.image, canvases, lambda n: progress.update(task, advance=n)
    )
    tokens = words(canvases.captions)

    model.image.requires_grad_(False)
    model.logit_bias.data -= math.log(args.large_batch / args.batch_size)
    optimizer = model.optimizer(tower_rate=2e-4, scalar_rate=0.02)
    generator = torch.Generator().manual_seed(args.seed)
    history = {"loss": [], "seconds": [], "in_loss": []}
    task = progress.add_task(f"batch {args.large_batch}, fused", total=args.large_steps, note="")
    for step in range(args.large_steps):
        began = time.perf_counter()
        if step % 2 == 0:
            halves = torch.randperm(len(tokens), generator=generator).split(args.large_batch)
        rows = halves[step % 2]
        rows = rows[large_batch.by_length(tokens[rows])]
        value, in_loss = large_batch.step_text(
            model.text, tokens[rows], features[rows],
            model.log_scale.exp(), model.logit_bias, LOSSES["fused"],
        )  # fmt: skip
        optimize(optimizer, step, args.large_steps, warmup=2)
        history["seconds"].append(time.perf_counter() - began)
        history["in_loss"].append(in_loss)
        history["loss"].append(value)
        progress.update(task, advance=1, note=report.note(history))
    return model, {**history, "before": before, "after": recall(score(model, heldout, words))}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable = parser.add_argument
    add("--steps", type=int, default=300, help="training steps (default: %(default)s)")
    add("--batch-size", type=int, default=256, help="pairs per batch, a quarter of them scenes")
    add("--loss", choices=["fused", "eager", "both"], default="both", help="which loss to train")
    add("--no-bias-prior", action="store_true", help="ablation: whole runs with b = 0 at first")
    add("--large-batch", type=int, default=16384, help="scenes per batch of the last stage")
    add("--large-steps", type=int, default=8, help="its steps; 0 leaves it out")
    add("--every", type=int, default=25, help="steps between evaluations and checkpoints")
    add("--resume", action="store_true", help="continue from the checkpoints in --out")
    add("--seed", type=int, default=0, help="of weights, batches and scenes")
    add("--out", type=Path, default=Path("out/siglip"), help="folder of everything written")
    add("--quick", action="store_true", help="few steps and small batches")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.batch_size, args.every = 20, 64, 10
        args.large_batch, args.large_steps = min(args.large_batch, 1024), min(args.large_steps, 2)
    return args


def main(argv: list[str] | None = None) -> dict:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if Console().is_terminal else 110, record=True)
    console.print(f"[bold]SigLIP[/] on {machine()}", highlight=False)
    seen, heldout = split()
    console.print(
        f"{len(pairs().captions)} pictures, {len(seen.captions)} different ones to train on, "
        f"{len(heldout.captions)} held out: unseen combinations of known words", highlight=False
    )  # fmt: skip
    words = Words([*seen.captions, *SCENE_WORDS])
    canvases = args.batch_size // 4
    batches = Batches(
        seen, scenes(canvases * args.steps, args.seed), (args.batch_size - canvases, canvases),
        words, args.seed,
    )  # fmt: skip
    unseen = scenes(1000, seed=args.seed, heldout=True)
    unseen = Pairs(unseen.draw(), unseen.captions)

    bias = 0.0 if args.no_bias_prior else -10.0
    runs: dict[str, dict] = {}
    columns = [
        TextColumn("{task.description:26}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("{task.fields[note]}"),
    ]  # fmt: skip
    with Progress(*columns, console=console) as progress:
        for loss in ["fused", "eager"] if args.loss == "both" else [args.loss]:
            model, runs[loss] = train(loss, args, batches, heldout, progress, bias, args.steps)
            if loss == "fused" or args.loss == "eager":
                kept = model
        if args.loss == "both" and bias:
            _, runs["b = 0"] = train(
                "fused", args, batches, heldout, progress, 0.0, args.steps // 3
            )
        if args.large_steps:
            _, runs["large"] = train_large(kept, words, unseen, args, progress)
    results = {
        "heldout": len(heldout.captions), "large_batch": args.large_batch,
        "chance": chance(len(heldout.captions)), "nearest pixel": nearest_pixel(seen, heldout),
        "runs": runs,
    }  # fmt: skip
    if args.large_steps:
        dim = kept.image.head.out_features
        with console.status("measuring one large batch with each loss, in processes of their own"):
            results["measured"] = {
                name: large_batch.measure(name, args.large_batch, dim) for name in LOSSES
            }
    report.table(console, results)
    report.curves(results, args.out / "curves.png")
    report.sheet(heldout, score(kept, heldout, words), args.out / "retrieval.png")
    (args.out / "history.json").write_text(json.dumps(results))
    console.save_text(str(args.out / "report.txt"), clear=False)
    console.print(f"Pictures: {args.out / 'curves.png'}, {args.out / 'retrieval.png'}")
    return results


if __name__ == "__main__":
    main()
