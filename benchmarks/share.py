"""What share of a training step the loss has: `python -m benchmarks.share`, about a minute.

Two towers of each of three sizes are trained on a few pairs, and SigLIP's loss on whole batches. A
tower's work grows with the batch, the loss's with its square: so the time of a pair is multiplied
by the batch, and a loss larger than `LARGEST` is scaled by the square.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tilewise as tw
from benchmarks import baselines
from benchmarks.harness import report
from benchmarks.harness.measure import Call, Spread, time_interleaved

DIM = 512  # of the features
BATCHES = 256, 1024, 4096, 16384
LARGEST = 4096  # batch whose loss is measured
SECONDS = 20.0


@dataclass(frozen=True)
class Size:
    """A pair of towers: transformers of `layers` x `width` over so many tokens; 0 layers: linear.

    Args:
        pairs: the batch that is measured.
    """

    name: str
    layers: int
    widths: tuple[int, int]  # of the image tower, of the text tower
    tokens: tuple[int, int]
    pairs: int


SIZES = (
    Size("linear, on cached features", 0, (768, 768), (1, 1), 4096),
    Size("4 layers x 256", 4, (256, 256), (64, 16), 64),
    Size("CLIP's ViT-B/32", 12, (768, 512), (50, 77), 8),
)


def tower(width: int, layers: int) -> nn.Module:
    """(B, tokens, width) -> (B, tokens, DIM)."""
    blocks = [
        nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        for _ in range(layers)
    ]
    return nn.Sequential(*blocks, nn.Linear(width, DIM))


def towers_of(size: Size) -> Call:
    """Forward and backward of both towers."""
    towers = [tower(width, size.layers) for width in size.widths]
    inputs = [
        torch.randn(size.pairs, tokens, width)
        for width, tokens in zip(size.widths, size.tokens, strict=True)
    ]

    def call():
        for model, x in zip(towers, inputs, strict=True):
            F.normalize(model(x).mean(1), dim=1).sum().backward()

    return call


def loss_of(function: Callable[..., Tensor], batch: int) -> Call:
    """Forward and backward of a loss of `batch` pairs."""
    image, text = (F.normalize(torch.randn(batch, DIM), dim=1).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (10.0, -10.0))
    return lambda: function(image, text, scale, bias).backward()


def milliseconds() -> dict[str, float]:
    """Of every tower's and every loss's call; one round has all of them, so they compare."""
    calls = {size.name: towers_of(size) for size in SIZES}
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
    for size in SIZES:
        for batch in BATCHES:
            measured = min(batch, LARGEST)
            square = (batch / measured) ** 2
            towers = found[size.name] / size.pairs * batch
            eager, ours = (found[f"{name} {measured}"] * square for name in ("eager", "ours"))
            table.add_row(
                size.name, f"{batch:,}", f"{towers:,.0f} ms", f"{eager:,.0f} ms", f"{ours:,.0f} ms",
                f"{eager / (towers + eager):.1%}", f"{(towers + eager) / (towers + ours):.2f}x",
            )  # fmt: skip
    name, threads = report.machine("cpu")
    console = Console(width=110)
    console.print(table)
    console.print(f"{name}, {threads} threads; losses above {LARGEST:,} pairs are scaled")


if __name__ == "__main__":
    main()
