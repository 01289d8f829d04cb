"""InfoNCE against eager, torch.compile and the four products that it takes.

Of unit rows, as they are after sentence-transformers and info-nce-pytorch have normalised them:
then eager is the formula of both (of the latter where it gets no negatives of their own).
"""

import torch

import tilewise as tw
from benchmarks import baselines
from benchmarks.harness import bench
from benchmarks.harness.bench import Case

# N keys for B queries: their own, and hard negatives.
CASES = (
    *(Case({"B": b, "N": 2 * b, "D": 512}, sweep=True, quick=b == 1024) for b in (256, 1024, 4096)),
    Case({"B": 128, "N": 16384, "D": 512}),
    Case(
        {"B": 32768, "N": 65536, "D": 512}, sweep=True, kinds=(bench.TRAINING,), only=(bench.OURS,),
        timed=False,
    ),
    Case({"B": 4096, "N": 8192, "D": 512}, "bfloat16"),
    *bench.on_gpu({"B": 8192, "N": 16384, "D": 512}),
)  # fmt: skip


def inputs(case: Case, device: str) -> bench.Inputs:
    """Normalised features, and sentence-transformers' scale; all need gradients."""
    draw = bench.Normal(case, device)
    b, n, d = case.sizes.values()
    return {
        "query": draw.unit(b, d).requires_grad_(), "keys": draw.unit(n, d).requires_grad_(),
        "logit_scale": bench.scalar(20.0, device),
    }  # fmt: skip


def products(inputs: bench.Inputs, kind: str):
    """The logits, and in training once more, when all sums are known, and one for each gradient."""
    query, keys = inputs["query"].detach(), inputs["keys"].detach()
    logits = query.new_zeros(len(query), len(keys))
    if kind == bench.FORWARD:
        return lambda: torch.mm(query, keys.T, out=logits)
    d_query, d_keys = torch.zeros_like(query), torch.zeros_like(keys)

    def call():
        for _ in range(2):
            torch.mm(query, keys.T, out=logits)
        torch.mm(logits, keys, out=d_query)
        torch.mm(logits.T, query, out=d_keys)

    return call


def implementations(device: str) -> dict[str, bench.Implementation]:
    """Everything that computes this loss on `device`."""
    eager = baselines.eager_info_nce
    found = {
        bench.OURS: bench.of_function(tw.info_nce),
        bench.PRODUCTS: bench.Implementation(products, bench.matrices(1, "B", "N")),
        bench.EAGER: bench.of_function(eager, bench.matrices(3, "B", "N")),
        bench.COMPILED: bench.of_function(baselines.compiled(eager), bench.matrices(2, "B", "N")),
    }
    if device == "cuda" and baselines.installed("inf_cl"):
        found["inf_cl"] = bench.of_function(baselines.inf_cl_info_nce)
    if device == "cuda" and baselines.installed("cut_cross_entropy"):
        found["cut_cross_entropy"] = bench.of_function(baselines.cut_cross_entropy_info_nce)
    return found


def flops(case: Case, kind: str) -> int:
    """Four products of B x N x D in training, one without gradients."""
    b, n, d = case.sizes.values()
    return (4 if kind == bench.TRAINING else 1) * 2 * b * n * d


def moved(case: Case, kind: str) -> int:
    """Both features are read and, in training, both gradients written."""
    b, n, d = case.sizes.values()
    return (2 if kind == bench.TRAINING else 1) * (b + n) * d * case.torch_dtype.itemsize


BENCHMARK = bench.Benchmark(
    CASES,
    Case({"B": 128, "N": 320, "D": 64}),
    inputs,
    implementations,
    moved,
    flops,
    axis="B",
    small_calls=bench.small_calls(
        "B N D", [(8, 16, 32), (16, 32, 64), (256, 512, 256), (1, 8, 32), (64, 128, 128)]
    ),
)
