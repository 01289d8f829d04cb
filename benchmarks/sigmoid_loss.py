"""The sigmoid loss against eager, torch.compile, open_clip, siglip_kernel and three products."""

import functools

import torch
import torch.nn.functional as F

import tilewise as tw
from benchmarks import baselines
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
    *(Case({"B": b, "D": 512}, sweep=True, quick=b in (512, 2048)) for b in (512, 1024, 2048)),
    *(Case({"B": b, "D": 512}, sweep=True) for b in (4096, 8192)),
    Case({"B": 16384, "D": 512}, sweep=True, kinds=(TRAINING,)),
    Case({"B": 32768, "D": 512}, sweep=True, kinds=(TRAINING,), only=(OURS, PRODUCTS)),
    Case({"B": 8192, "D": 512}, "bfloat16"),
    Case({"B": 32768, "D": 256}, kinds=(TRAINING,), only=(OURS,), timed=False),
    Case({"B": 32768, "D": 768}, kinds=(TRAINING,), only=(OURS,), timed=False),
)


def inputs(case: Case, device: str) -> Inputs:
    """Normalised features, and SigLIP's initial scale and bias; all need gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def features():
        shape = case.sizes["B"], case.sizes["D"]
        x = torch.randn(shape, device=device, generator=generator)
        return F.normalize(x, dim=1).to(case.torch_dtype).requires_grad_()

    def scalar(value: float):
        return torch.tensor(value, device=device, requires_grad=True)

    return {"image": features(), "text": features(), "scale": scalar(10.0), "bias": scalar(-10.0)}


def products(inputs: Inputs, kind: str):
    """What no exact method gets below: the logits and, in training, a product per gradient."""
    image, text = inputs["image"].detach(), inputs["text"].detach()
    logits = image.new_zeros(len(image), len(text))
    d_image, d_text = torch.zeros_like(image), torch.zeros_like(text)

    def call():
        torch.mm(image, text.T, out=logits)
        if kind == TRAINING:
            torch.mm(logits, text, out=d_image)
            torch.mm(logits.T, image, out=d_text)

    return call


def candidates(device: str) -> dict[str, Candidate]:
    """Everything that computes this loss on `device`, if it is installed."""
    found = {
        OURS: of_function(tw.sigmoid_loss),
        PRODUCTS: Candidate(products, matrices(1, "B", "B")),
        EAGER: of_function(baselines.eager_sigmoid_loss, matrices(6.4, "B", "B")),
        "torch.compile": of_function(
            baselines.compiled(baselines.eager_sigmoid_loss), matrices(1.3, "B", "B")
        ),
    }
    if baselines.installed("open_clip"):
        found["open_clip"] = of_function(baselines.open_clip_sigmoid_loss, matrices(5.2, "B", "B"))
        if baselines.open_clip_has_chunks():
            chunked = functools.partial(baselines.open_clip_sigmoid_loss, chunk_size=1024)
            found["open_clip chunked"] = of_function(chunked)
    if device == "cuda" and baselines.installed("siglip_kernel"):
        found["siglip_kernel"] = of_function(baselines.siglip_kernel_sigmoid_loss)
    return found


def flops(case: Case, kind: str) -> int:
    """Three products of B x B x D in training, one without gradients."""
    return (3 if kind == TRAINING else 1) * 2 * case.sizes["B"] ** 2 * case.sizes["D"]


def moved(case: Case, kind: str) -> int:
    """Both features are read and, in training, both gradients written."""
    tensors = 4 if kind == TRAINING else 2
    return tensors * case.sizes["B"] * case.sizes["D"] * case.torch_dtype.itemsize


def instructions(case: Case, kind: str) -> int:
    """About 36 for each logit, counted in the code generated for a GPU."""
    return 36 * case.sizes["B"] ** 2


BENCHMARK = Benchmark(
    axis="B",
    cases=CASES,
    small=Case({"B": 512, "D": 256}),  # torch.compile takes equal sizes to be one and the same
    inputs=inputs,
    candidates=candidates,
    flops=flops,
    moved=moved,
    instructions=instructions,
)
