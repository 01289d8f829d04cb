"""CLIP's loss against eager, torch.compile, open_clip and four bare products."""

import torch

import tilewise as tw
from benchmarks import baselines, sigmoid_loss
from benchmarks.harness.registry import (
    EAGER,
    OURS,
    PRODUCTS,
    TRAINING,
    Benchmark,
    Candidate,
    Case,
    Inputs,
    matrices,
    of_function,
)

CASES = (
    *(Case({"B": b, "D": 512}, sweep=True, quick=b == 2048) for b in (512, 2048, 8192)),
    Case({"B": 32768, "D": 512}, sweep=True, kinds=(TRAINING,), only=(OURS,), timed=False),
    Case({"B": 8192, "D": 512}, "bfloat16"),
)


def inputs(case: Case, device: str) -> Inputs:
    """Normalised features, and CLIP's initial scale; all need gradients."""
    features = sigmoid_loss.inputs(case, device)
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    return {"image": features["image"], "text": features["text"], "scale": scale}


def products(inputs: Inputs, kind: str):
    """The logits, and in training once more, when all sums are known, and one for each gradient."""
    image, text = inputs["image"].detach(), inputs["text"].detach()
    logits = image.new_zeros(len(image), len(text))
    all_of_sigmoid = sigmoid_loss.products(inputs, kind)

    def call():
        if kind == TRAINING:
            torch.mm(image, text.T, out=logits)
        all_of_sigmoid()

    return call


def candidates(device: str) -> dict[str, Candidate]:
    """Everything that computes this loss on `device`, if it is installed."""
    found = {
        OURS: of_function(tw.clip_loss),
        PRODUCTS: Candidate(products, matrices(2, "B", "B")),
        EAGER: of_function(baselines.eager_clip_loss, matrices(6, "B", "B")),
        "torch.compile": of_function(
            baselines.compiled(baselines.eager_clip_loss), matrices(4, "B", "B")
        ),
    }
    if baselines.installed("open_clip"):
        found["open_clip"] = of_function(baselines.open_clip_clip_loss, matrices(6, "B", "B"))
    return found


def flops(case: Case, kind: str) -> int:
    """Four products of B x B x D in training, one without gradients."""
    return (4 if kind == TRAINING else 1) * 2 * case.sizes["B"] ** 2 * case.sizes["D"]


BENCHMARK = Benchmark(
    axis="B",
    cases=CASES,
    small=Case({"B": 512, "D": 256}),
    inputs=inputs,
    candidates=candidates,
    flops=flops,
    moved=sigmoid_loss.moved,
)
