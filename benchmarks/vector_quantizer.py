"""A training step of a vector quantiser, forward, backward and EMA, against lucidrains' module."""

import torch

import tilewise as tw
from benchmarks import baselines, nearest_code
from benchmarks.harness.measure import Call
from benchmarks.harness.registry import (
    OURS,
    PRODUCTS,
    TRAINING,
    Benchmark,
    Candidate,
    Case,
    Inputs,
    matrices,
)
from benchmarks.nearest_code import flops, sized

LUCIDRAINS = "lucidrains"


CASES = (
    sized(2048, 512, 64, kinds=(TRAINING,), quick=True),
    sized(16384, 1024, 256, kinds=(TRAINING,)),
    sized(16384, 8192, 64, kinds=(TRAINING,)),
)


def inputs(case: Case, device: str) -> Inputs:
    """A batch (1, N, D) that needs gradients, the codes (K, D), and a gradient of the output."""
    n, k, d = case.sizes.values()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, codebook, grad = torch.randn(1, n, d), torch.randn(k, d), torch.randn(1, n, d)
    x, grad = x.to(device, case.torch_dtype), grad.to(device, case.torch_dtype)
    return {"x": x.requires_grad_(), "codebook": codebook.to(device), "grad": grad}


def ours(inputs: Inputs, kind: str) -> Call:
    """tilewise's module."""
    codebook = inputs["codebook"]
    codes, dim = codebook.shape
    quantizer = tw.nn.VectorQuantizer(dim, codes).to(codebook.device)
    with torch.no_grad():
        quantizer.codebook.copy_(codebook)
    quantizer._codebook.embed_avg.copy_(codebook)
    return step(quantizer, inputs)


def lucidrains(inputs: Inputs, kind: str) -> Call:
    """lucidrains' module, as it is by default."""
    quantizer = baselines.lucidrains_quantizer(inputs["codebook"])
    quantizer._codebook.embed_avg.copy_(inputs["codebook"])
    return step(quantizer, inputs)


def step(quantizer: torch.nn.Module, inputs: Inputs) -> Call:
    """A call that goes forward, learns, and goes backward."""
    x, grad = inputs["x"], inputs["grad"]

    def call():
        quantized, index, loss = quantizer(x)
        loss = loss.sum()  # lucidrains' has one dimension
        (d_x,) = torch.autograd.grad((quantized, loss), x, (grad, torch.ones_like(loss)))
        return quantized.detach(), index, loss.detach(), d_x

    return call


def products(inputs: Inputs, kind: str) -> Call:
    """The product that a search by matrix multiplication begins with."""
    x = inputs["x"].detach()[0]
    return nearest_code.products({"x": x, "codebook": inputs["codebook"].to(x.dtype)}, kind)


def candidates(device: str) -> dict[str, Candidate]:
    """The modules that there are."""
    found = {OURS: Candidate(ours), PRODUCTS: Candidate(products, matrices(1, "N", "K"))}
    if baselines.installed("vector_quantize_pytorch"):
        found[LUCIDRAINS] = Candidate(lucidrains, matrices(6, "N", "K"))
    return found


def moved(case: Case, kind: str) -> int:
    """Rows and their gradient are read, the quantised rows and theirs written, codes both."""
    n, k, d = case.sizes.values()
    return (4 * n + 2 * k) * d * case.torch_dtype.itemsize + 8 * n


BENCHMARK = Benchmark(
    axis=None,
    cases=CASES,
    small=Case({"N": 128, "K": 96, "D": 16}, kinds=(TRAINING,)),
    inputs=inputs,
    candidates=candidates,
    flops=flops,
    moved=moved,
    baseline=LUCIDRAINS,
)
