"""BLIP's contrast with a queue and a teacher against eager, torch.compile and the products."""

import torch

import tilewise as tw
from benchmarks import baselines
from benchmarks.harness import bench
from benchmarks.harness.bench import Case

CASES = (
    Case({"B": 512, "Q": 7200, "D": 256}, sweep=True, quick=True),
    Case({"B": 512, "Q": 14400, "D": 256}, sweep=True),
    Case({"B": 512, "Q": 57600, "D": 256}, sweep=True),  # BLIP's queue
    Case({"B": 512, "Q": 57600, "D": 256}, "bfloat16"),
)


def inputs(case: Case, device: str) -> bench.Inputs:
    """One direction: unit rows, as many keys as queries; the student's need gradients."""
    draw = bench.Normal(case, device)
    b, q, d = case.sizes.values()
    return {
        "query": draw.unit(b, d).requires_grad_(), "keys": draw.unit(b, d),
        "logit_scale": bench.scalar(14.3, device),
        "queue": draw.unit(q, d), "teacher_query": draw.unit(b, d), "alpha": 0.4,
    }  # fmt: skip


def products(inputs: bench.Inputs, kind: str):
    """Logits of student and teacher, the mean of the teacher's softmax; then the student's."""
    query, teacher = inputs["query"].detach(), inputs["teacher_query"]
    candidates = torch.cat([inputs["keys"], inputs["queue"]])  # (B + Q, D)
    logits = query.new_zeros(len(query), len(candidates))
    mean = torch.zeros_like(query)

    def call():
        for x in (teacher, query):
            torch.mm(x, candidates.T, out=logits)
            if kind == bench.TRAINING or x is teacher:
                torch.mm(logits, candidates, out=mean)

    return call


def implementations(device: str) -> dict[str, bench.Implementation]:
    """Everything that computes this loss on `device`."""
    eager = baselines.eager_itc_loss
    return {
        bench.OURS: bench.of_function(tw.itc_loss),
        bench.PRODUCTS: bench.Implementation(products, bench.matrices(1.5, "B", "Q")),
        bench.EAGER: bench.of_function(eager, bench.matrices(8.5, "B", "Q")),
        bench.COMPILED: bench.of_function(baselines.compiled(eager), bench.matrices(6, "B", "Q")),
    }


def flops(case: Case, kind: str) -> int:
    """Four products of B x (B + Q) x D in training, three without gradients."""
    b, q, d = case.sizes.values()
    return (4 if kind == bench.TRAINING else 3) * 2 * b * (b + q) * d


def moved(case: Case, kind: str) -> int:
    """All features are read and, in training, the query's gradient written."""
    b, q, d = case.sizes.values()
    return ((4 if kind == bench.TRAINING else 3) * b + q) * d * case.torch_dtype.itemsize


BENCHMARK = bench.Benchmark(
    CASES,
    Case({"B": 128, "Q": 600, "D": 64}),
    inputs,
    implementations,
    moved,
    flops,
    axis="Q",
    small_calls=bench.small_calls(
        "B Q D", [(8, 64, 32), (64, 512, 128), (256, 1024, 256), (16, 128, 64), (32, 256, 64)]
    ),
)
