"""A training step of a vector quantiser, forward, backward and EMA, against lucidrains' module."""

import torch

import tilewise as tw
from benchmarks import baselines, nearest_code
from benchmarks.harness import bench
from benchmarks.harness.bench import TRAINING, Case
from benchmarks.nearest_code import SMALL, flops, sized

LUCIDRAINS = "lucidrains"

CASES = (
    sized(2048, 512, 64, kinds=(TRAINING,), quick=True),
    sized(16384, 1024, 256, kinds=(TRAINING,)),
    sized(16384, 8192, 64, kinds=(TRAINING,)),
)


def inputs(case: Case, device: str) -> bench.Inputs:
    """A batch (1, N, D) that needs gradients, the codes (K, D), and gradients of the results."""
    n, k, d = case.sizes.values()
    draw = bench.Normal(case, device)
    grads = draw(1, n, d), torch.ones((), device=device)
    return {
        "x": draw(1, n, d).requires_grad_(), "codebook": draw(k, d).float(), bench.GRADS: grads
    }  # fmt: skip


def ours(inputs: bench.Inputs, kind: str) -> bench.Call:
    """tilewise's module."""
    codebook = inputs["codebook"]
    codes, dim = codebook.shape
    quantizer = tw.nn.VectorQuantizer(dim, codes).to(codebook.device)
    with torch.no_grad():
        quantizer.codebook.copy_(codebook)
    return step(quantizer, inputs, kind)


def lucidrains(inputs: bench.Inputs, kind: str) -> bench.Call:
    """lucidrains' module, as it is by default."""
    return step(baselines.lucidrains_quantizer(inputs["codebook"]), inputs, kind)


def step(quantizer: torch.nn.Module, inputs: bench.Inputs, kind: str) -> bench.Call:
    """A call that goes forward, learns, and goes backward."""
    quantizer._codebook.embed_avg.copy_(inputs["codebook"])
    x = inputs["x"]

    def call():
        quantized, index, loss = quantizer(x)
        return quantized, index, loss.sum()  # lucidrains' has one dimension

    return bench.call_of(call, [x], kind, inputs[bench.GRADS])


def products(inputs: bench.Inputs, kind: str) -> bench.Call:
    """The product that a search by matrix multiplication begins with."""
    x = inputs["x"].detach()[0]
    return nearest_code.products({"x": x, "codebook": inputs["codebook"].to(x.dtype)}, kind)


def implementations(device: str) -> dict[str, bench.Implementation]:
    """The modules that there are."""
    found = {
        bench.OURS: bench.Implementation(ours),
        bench.PRODUCTS: bench.Implementation(products, bench.matrices(1, "N", "K")),
    }
    if baselines.installed("vector_quantize_pytorch"):
        found[LUCIDRAINS] = bench.Implementation(lucidrains, bench.matrices(6, "N", "K"))
    return found


def moved(case: Case, kind: str) -> int:
    """Rows and their gradient are read, the quantised rows and theirs written, codes both."""
    n, k, d = case.sizes.values()
    return (4 * n + 2 * k) * d * case.torch_dtype.itemsize + 8 * n


BENCHMARK = bench.Benchmark(
    CASES,
    Case({"N": 128, "K": 96, "D": 16}, kinds=(TRAINING,)),
    inputs,
    implementations,
    moved,
    flops,
    baseline=LUCIDRAINS,
    small_calls=bench.small_calls("N K D", SMALL),
)
