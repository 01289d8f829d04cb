"""A step on a batch in micro-batches: grad_cache, the whole batch at once, and what others do.

M rows are a micro-batch. What the whole batch takes where B is M is what one micro-batch takes.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewise as tw
from benchmarks import baselines
from benchmarks.harness import bench
from benchmarks.harness.bench import TRAINING, Case

WHOLE, OPEN_CLIP, PACKAGE = "whole batch", "open_clip's accum_freq", "GradCache's approach"
WIDTH, TOKENS, LAYERS, SCALE = 128, 8, 2, 14.3


def case(rows: int, micro_batch: int, **options) -> Case:
    sizes = {"B": rows, "M": micro_batch, "D": WIDTH}
    return Case(sizes, kinds=(TRAINING,), sweep=True, **options)


CASES = (
    case(256, 256, only=(bench.OURS, WHOLE)),
    case(2048, 256, quick=True),
    case(8192, 256, only=(bench.OURS, WHOLE, PACKAGE)),
)


class Tower(nn.Module):
    """A small transformer: (B, TOKENS, WIDTH) -> unit rows (B, WIDTH)."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True)
        self.body = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.body(tokens).mean(1), dim=1)


def inputs(case: Case, device: str) -> bench.Inputs:
    """Tokens of pictures and texts."""
    draw = bench.Normal(case, device)
    rows = case.sizes["B"]
    return {
        "image": draw(rows, TOKENS, WIDTH), "text": draw(rows, TOKENS, WIDTH),
        "micro_batch": case.sizes["M"],
    }  # fmt: skip


Step = Callable[[list[nn.Module], Callable, list[Tensor], int], Tensor]


def ours(towers, loss, batch, micro_batch) -> Tensor:
    """tilewise's."""
    return tw.nn.grad_cache(towers, loss, *batch, micro_batch=micro_batch)


def whole(towers, loss, batch, micro_batch) -> Tensor:
    """Everything at once."""
    value = loss(*(tower(x) for tower, x in zip(towers, batch, strict=True)))
    value.backward()
    return value.detach()


def accum_freq(towers, loss, batch, micro_batch) -> Tensor:
    """As open_clip trains: the loss of the whole batch once for every micro-batch.

    Its own features with a graph, those of the others without; their gradients are added.
    """
    parts = [x.split(micro_batch) for x in batch]
    with torch.no_grad():
        features = [[t(x) for x in part] for t, part in zip(towers, parts, strict=True)]
    for j in range(len(parts[0])):
        columns = [
            torch.cat([*kept[:j], tower(part[j]), *kept[j + 1 :]])
            for tower, part, kept in zip(towers, parts, features, strict=True)
        ]
        value = loss(*columns)
        value.backward()
    return value.detach()


def two_passes(towers, loss, batch, micro_batch) -> Tensor:
    """As the GradCache package does: the product of features and their kept gradients, backward."""
    parts = [x.split(micro_batch) for x in batch]
    with torch.no_grad():
        features = [
            torch.cat([tower(x) for x in part]) for tower, part in zip(towers, parts, strict=True)
        ]
    leaves = [x.requires_grad_() for x in features]
    value = loss(*leaves)
    value.backward()
    for tower, part, leaf in zip(towers, parts, leaves, strict=True):
        for x, grad in zip(part, leaf.grad.split(micro_batch), strict=True):
            (tower(x) * grad).sum().backward()
    return value.detach()


def implementation(step: Step, loss: Callable, matrices: float = 0.0) -> bench.Implementation:
    """Of a step with a loss, which keeps so many matrices of logits; results are the gradients."""

    def build(inputs: bench.Inputs, kind: str) -> bench.Call:
        image, text, micro_batch = inputs.values()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            towers = [Tower().to(image.device, image.dtype) for _ in range(2)]
        parameters = [p for tower in towers for p in tower.parameters()]

        def call():
            for p in parameters:
                p.grad = None
            value = step(towers, functools.partial(loss, logit_scale=SCALE), [image, text],
                         micro_batch)
            return value, *(p.grad for p in parameters)

        return call

    def needs(case: Case) -> int:
        rows = case.sizes["B"] if step is whole else case.sizes["M"]
        activations = 2 * LAYERS * rows * TOKENS * WIDTH * 4 * 24
        return activations + bench.matrices(matrices, "B", "B")(case)

    return bench.Implementation(build, needs)


def implementations(device: str) -> dict[str, bench.Implementation]:
    """With our loss, and what others do with the eager one."""
    eager = baselines.eager_clip_loss
    return {
        bench.OURS: implementation(ours, tw.clip_loss),
        WHOLE: implementation(whole, tw.clip_loss),
        OPEN_CLIP: implementation(accum_freq, eager, 6),
        PACKAGE: implementation(two_passes, eager, 6),
    }


def moved(case: Case, kind: str) -> int:
    """The tokens are read."""
    return 2 * case.sizes["B"] * TOKENS * WIDTH * case.torch_dtype.itemsize


BENCHMARK = bench.Benchmark(
    CASES, Case({"B": 24, "M": 8, "D": WIDTH}, kinds=(TRAINING,)), inputs, implementations, moved,
    axis="B", baseline=WHOLE,
)
