"""What share of a training step the loss has: `python -m benchmarks.share`, about a minute.

Two towers of each of three sizes are trained on a few pairs, and SigLIP's loss on whole batches. A
tower's work grows with the batch, the loss's with its square: so the time of a pair is multiplied
by the batch, and a loss larger than `LARGEST` is scaled by the square.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tilewise as tw
from benchmarks import baselines
from benchmarks.harness import report
from benchmarks.harness.measure import Call, Spread, time_interleaved
from examples.common.towers import ImageTower, TextTower

DIM = 512  # of the features
BATCHES = 256, 1024, 4096, 16384
LARGEST = 4096  # batch whose loss is measured
SECONDS = 20.0


def linear(pairs: int) -> Call:
    """A linear layer on each side, of features that are there already."""
    return training([(nn.Linear(768, DIM), torch.randn(pairs, 768)) for _ in range(2)])


def small(pairs: int) -> Call:
    """The towers of `make demo`: convolutions over 64 x 64 pictures, a mix of nine words."""
    images = torch.randint(256, (pairs, 3, 64, 64), dtype=torch.uint8)
    words = torch.randint(1, 1000, (pairs, 9))
    return training([(ImageTower(DIM), images), (TextTower(1000, DIM), words)])


def transformers(pairs: int) -> Call:
    """The transformers of CLIP's ViT-B/32: 12 layers, of 768 over 50 tokens, of 512 over 77."""
    return training([
        (nn.Sequential(transformer(width), Mean(), nn.Linear(width, DIM)),
         torch.randn(pairs, tokens, width))
        for width, tokens in ((768, 50), (512, 77))
    ])  # fmt: skip


def transformer(width: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        width, width // 64, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)


class Mean(nn.Module):
    """(B, tokens, width) -> (B, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def training(towers: list[tuple[nn.Module, Tensor]]) -> Call:
    """Forward and backward of towers, each with its input."""
    def call():
        for tower, x in towers:
            F.normalize(tower(x), dim=1).sum().backward()

    return call


# How each pair of towers is made, and of how many pairs its time is taken.
TOWERS: dict[str, tuple[Callable[[int], Call], int]] = {
    "linear, on cached features": (linear, 4096),
    "small convolutions": (small, 256),
    "ViT-B/32": (transformers, 8),
}


def loss_of(function: Callable[..., Tensor], batch: int) -> Call:
    """Forward and backward of a loss of `batch` pairs."""
    image, text = (F.normalize(torch.randn(batch, DIM), dim=1).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (10.0, -10.0))
    return lambda: function(image, text, scale, bias).backward()


def milliseconds() -> dict[str, float]:
    """Of every tower's and every loss's call; one round has all of them, so they compare."""
    calls = {name: build(pairs) for name, (build, pairs) in TOWERS.items()}
    for batch in (batch for batch in BATCHES if batch <= LARGEST):
        calls[f"eager {batch}"] = loss_of(baselines.eager_sigmoid_loss, batch)
        calls[f"ours {batch}"] = loss_of(tw.sigmoid_loss, batch)
    return {
        name: Spread.of(times).median
        for name, times in time_interleaved(calls, seconds=SECONDS).items()
    }


def main() -> None:
    """Measures everything and prints the table."""
    found = milliseconds()
    table = Table("towers", "batch", "towers", "eager loss", "ours", "share of eager", "step")
    for name, (_, pairs) in TOWERS.items():
        for batch in BATCHES:
            measured = min(batch, LARGEST)
            square = (batch / measured) ** 2
            towers = found[name] / pairs * batch
            eager, ours = (found[f"{who} {measured}"] * square for who in ("eager", "ours"))
            table.add_row(
                name, f"{batch:,}", f"{towers:,.0f} ms", f"{eager:,.0f} ms", f"{ours:,.0f} ms",
                f"{eager / (towers + eager):.1%}", f"{(towers + eager) / (towers + ours):.2f}x",
            )  # fmt: skip
    machine, threads = report.machine("cpu")
    console = Console(width=110)
    console.print(table)
    console.print(f"{machine}, threads: {threads}; losses above {LARGEST:,} pairs are scaled")


if __name__ == "__main__":
    main()
