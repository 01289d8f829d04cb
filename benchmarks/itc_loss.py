"""BLIP's contrast with a queue and a teacher against eager, torch.compile and bare products."""

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
    Case({"B": 512, "Q": 7200, "D": 256}, sweep=True, quick=True),
    Case({"B": 512, "Q": 14400, "D": 256}, sweep=True),
    Case({"B": 512, "Q": 57600, "D": 256}, sweep=True),  # BLIP's queue
    Case({"B": 512, "Q": 57600, "D": 256}, "bfloat16"),
)


def inputs(case: Case, device: str) -> Inputs:
    """One direction: unit rows, as many keys as queries; the student's need gradients."""
    generator = torch.Generator(device).manual_seed(0)
    b, q, d = case.sizes.values()

    def features(rows: int):
        x = torch.randn(rows, d, device=device, generator=generator)
        return F.normalize(x, dim=1).to(case.torch_dtype)

    return {
        "query": features(b).requires_grad_(), "keys": features(b),
        "scale": torch.tensor(14.3, device=device, requires_grad=True),
        "queue": features(q), "teacher_query": features(b), "alpha": 0.4,
    }  # fmt: skip


def products(inputs: Inputs, kind: str):
    """Logits of student and teacher, the mean of the teacher's softmax; then the student's."""
    query, teacher = inputs["query"].detach(), inputs["teacher_query"]
    candidates = torch.cat([inputs["keys"], inputs["queue"]])  # (B + Q, D)
    logits = query.new_zeros(len(query), len(candidates))
    mean = torch.zeros_like(query)

    def call():
        for x in (teacher, query):
            torch.mm(x, candidates.T, out=logits)
            if kind == TRAINING or x is teacher:
                torch.mm(logits, candidates, out=mean)

    return call


def candidates(device: str) -> dict[str, Candidate]:
    """Everything that computes this loss on `device`."""
    eager = baselines.eager_itc_loss
    return {
        OURS: of_function(tw.itc_loss),
        PRODUCTS: Candidate(products, matrices(1.5, "B", "Q")),
        EAGER: of_function(eager, matrices(8.5, "B", "Q")),
        "torch.compile": of_function(baselines.compiled(eager), matrices(6, "B", "Q")),
    }


def flops(case: Case, kind: str) -> int:
    """Four products of B x (B + Q) x D in training, three without gradients."""
    b, q, d = case.sizes.values()
    return (4 if kind == TRAINING else 3) * 2 * b * (b + q) * d


def moved(case: Case, kind: str) -> int:
    """All features are read and, in training, the query's gradient written."""
    b, q, d = case.sizes.values()
    return ((4 if kind == TRAINING else 3) * b + q) * d * case.torch_dtype.itemsize


BENCHMARK = Benchmark(
    axis="Q",
    cases=CASES,
    small=Case({"B": 128, "Q": 600, "D": 64}),
    inputs=inputs,
    candidates=candidates,
    flops=flops,
    moved=moved,
)
