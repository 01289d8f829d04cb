"""CLIP's loss against eager, torch.compile, open_clip and the four products that it takes."""

import torch

import tilewise as tw
from benchmarks import baselines, sigmoid_loss
from benchmarks.harness import bench
from benchmarks.harness.bench import Case

CASES = (
    *(Case({"B": b, "D": 512}, sweep=True, quick=b == 2048) for b in (512, 2048, 8192)),
    Case(
        {"B": 32768, "D": 512}, sweep=True, kinds=(bench.TRAINING,), only=(bench.OURS,),
        timed=False,
    ),
    Case({"B": 8192, "D": 512}, "bfloat16"),
    *bench.on_gpu({"B": 16384, "D": 512}),
)  # fmt: skip


def inputs(case: Case, device: str) -> bench.Inputs:
    """Normalised features, and CLIP's initial scale; all need gradients."""
    return sigmoid_loss.features(case, device) | {"logit_scale": bench.scalar(14.3, device)}


def products(inputs: bench.Inputs, kind: str):
    """The logits, and in training once more, when all sums are known, and one for each gradient."""
    image, text = inputs["image_features"].detach(), inputs["text_features"].detach()
    logits = image.new_zeros(len(image), len(text))
    all_of_sigmoid = sigmoid_loss.products(inputs, kind)

    def call():
        if kind == bench.TRAINING:
            torch.mm(image, text.T, out=logits)
        all_of_sigmoid()

    return call


def implementations(device: str) -> dict[str, bench.Implementation]:
    """Everything that computes this loss on `device`, if it is installed."""
    eager, six = baselines.eager_clip_loss, bench.matrices(6, "B", "B")
    found = {
        bench.OURS: bench.of_function(tw.clip_loss),
        bench.PRODUCTS: bench.Implementation(products, bench.matrices(2, "B", "B")),
        bench.EAGER: bench.of_function(eager, six),
        bench.COMPILED: bench.of_function(baselines.compiled(eager), bench.matrices(4, "B", "B")),
    }
    if baselines.installed("open_clip"):
        found["open_clip"] = bench.of_function(baselines.open_clip_clip_loss, six)
    if device == "cuda":
        found |= sigmoid_loss.tuned(eager, 4)
    if device == "cuda" and baselines.installed("memeff"):
        loss = baselines.memeff_clip_loss
        found["memeff"] = bench.of_function(loss, numbers=["logit_scale"])
    if device == "cuda" and baselines.installed("inf_cl"):
        found["inf_cl"] = bench.of_function(baselines.inf_cl_clip_loss)
    return found


def flops(case: Case, kind: str) -> int:
    """Four products of B x B x D in training, one without gradients."""
    return (4 if kind == bench.TRAINING else 1) * 2 * case.sizes["B"] ** 2 * case.sizes["D"]


def operator(inputs: bench.Inputs) -> bench.Call:
    """The dispatcher's, with all gradients."""
    image, text, scale = (x.detach() for x in inputs.values())
    op = torch.ops.tilewise.clip_loss.default
    return lambda: op(image, text, scale, 0, None, None, 0.0, True, True, True)


BENCHMARK = bench.Benchmark(
    CASES,
    Case({"B": 512, "D": 256}),
    inputs,
    implementations,
    sigmoid_loss.moved,
    flops,
    axis="B",
    small_calls=sigmoid_loss.SMALL,
    operator=operator,
)
