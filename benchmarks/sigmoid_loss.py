"""The sigmoid loss against eager, torch.compile, open_clip, siglip_kernel and three products."""

import torch

import tilewise as tw
from benchmarks import baselines
from benchmarks.harness import bench
from benchmarks.harness.bench import Case

CASES = (
    *(Case({"B": b, "D": 512}, sweep=True, quick=b in (512, 2048)) for b in (512, 1024, 2048)),
    *(Case({"B": b, "D": 512}, sweep=True) for b in (4096, 8192)),
    Case({"B": 16384, "D": 512}, sweep=True, kinds=(bench.TRAINING,)),
    Case(
        {"B": 32768, "D": 512}, sweep=True, kinds=(bench.TRAINING,),
        only=(bench.OURS, bench.PRODUCTS),
    ),
    Case({"B": 8192, "D": 512}, "bfloat16"),
    *bench.on_gpu({"B": 16384, "D": 512}),
    *(
        Case({"B": 32768, "D": d}, kinds=(bench.TRAINING,), only=(bench.OURS,), timed=False)
        for d in (256, 768)
    ),
)  # fmt: skip


def features(case: Case, device: str) -> bench.Inputs:
    """Normalised features of pictures and texts, which need gradients."""
    draw = bench.Normal(case, device)
    pair = [draw.unit(case.sizes["B"], case.sizes["D"]).requires_grad_() for _ in range(2)]
    return dict(zip(("image_features", "text_features"), pair, strict=True))


def inputs(case: Case, device: str) -> bench.Inputs:
    """Normalised features, and SigLIP's initial scale and bias; all need gradients."""
    scalars = {"logit_scale": 10.0, "logit_bias": -10.0}
    return features(case, device) | {k: bench.scalar(v, device) for k, v in scalars.items()}


def products(inputs: bench.Inputs, kind: str):
    """What no exact method gets below: the logits and, in training, a product per gradient."""
    image, text = inputs["image_features"].detach(), inputs["text_features"].detach()
    logits = image.new_zeros(len(image), len(text))
    if kind == bench.FORWARD:
        return lambda: torch.mm(image, text.T, out=logits)
    d_image, d_text = torch.zeros_like(image), torch.zeros_like(text)

    def call():
        torch.mm(image, text.T, out=logits)
        torch.mm(logits, text, out=d_image)
        torch.mm(logits.T, image, out=d_text)

    return call


def implementations(device: str) -> dict[str, bench.Implementation]:
    """Everything that computes this loss on `device`, if it is installed."""
    eager, open_clip = baselines.eager_sigmoid_loss, baselines.open_clip_sigmoid_loss
    found = {
        bench.OURS: bench.of_function(tw.sigmoid_loss),
        bench.PRODUCTS: bench.Implementation(products, bench.matrices(1, "B", "B")),
        bench.EAGER: bench.of_function(eager, bench.matrices(6.4, "B", "B")),
        bench.COMPILED: bench.of_function(
            baselines.compiled(eager), bench.matrices(1.3, "B", "B")
        ),
    }
    if baselines.installed("open_clip"):
        found["open_clip"] = bench.of_function(open_clip, bench.matrices(5.2, "B", "B"))
        if baselines.open_clip_has_chunks():
            found["open_clip chunked"] = bench.of_function(open_clip, chunk_size=1024)
    if device == "cuda":
        found |= tuned(eager, 1.3)
    if device == "cuda" and baselines.installed("siglip_kernel"):
        found["siglip_kernel"] = bench.of_function(baselines.siglip_kernel_sigmoid_loss)
    return found


def tuned(eager, matrices: float) -> dict[str, bench.Implementation]:
    """`eager` through torch.compile at its slowest to compile."""
    function = baselines.compiled(eager, "max-autotune-no-cudagraphs")
    return {bench.TUNED: bench.of_function(function, bench.matrices(matrices, "B", "B"))}


def flops(case: Case, kind: str) -> int:
    """Three products of B x B x D in training, one without gradients."""
    return (3 if kind == bench.TRAINING else 1) * 2 * case.sizes["B"] ** 2 * case.sizes["D"]


def moved(case: Case, kind: str) -> int:
    """Both features are read and, in training, both gradients written."""
    tensors = 4 if kind == bench.TRAINING else 2
    return tensors * case.sizes["B"] * case.sizes["D"] * case.torch_dtype.itemsize


def instructions(case: Case, kind: str) -> int:
    """About 36 for each logit, counted in the code generated for a GPU."""
    return 36 * case.sizes["B"] ** 2


SMALL = bench.small_calls(
    "B D", [(8, 32), (64, 128), (256, 256), (1, 32), (16, 64), (32, 64), (128, 256), (512, 512)]
)


def operator(inputs: bench.Inputs) -> bench.Call:
    """The dispatcher's, with all gradients."""
    image, text, scale, bias = (x.detach() for x in inputs.values())
    op, none = torch.ops.tilewise.sigmoid_loss.default, (None, None)
    return lambda: op(image, text, scale, bias, 0, *none, True, True, True, True)


BENCHMARK = bench.Benchmark(
    CASES,
    Case({"B": 512, "D": 256}),  # torch.compile takes equal sizes to be one and the same
    inputs,
    implementations,
    moved,
    flops,
    axis="B",
    instructions=instructions,
    small_calls=SMALL,
    operator=operator,
)
