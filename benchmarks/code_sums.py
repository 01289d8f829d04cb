"""Counts and sums of the rows of each code, against a one-hot matrix, index_add and others."""

import torch
import torch.nn.functional as F
from torch import Tensor

import tilewise as tw
from benchmarks import baselines
from benchmarks.harness.measure import Call
from benchmarks.harness.registry import (
    FORWARD,
    OURS,
    PRODUCTS,
    Benchmark,
    Candidate,
    Case,
    Inputs,
    matrices,
    of_function,
)
from benchmarks.nearest_code import flops, sized

INDEX_ADD = "index_add"


CASES = (
    sized(4096, 1024, 64, quick=True),
    sized(16384, 512, 64),
    sized(16384, 1024, 256),
    sized(16384, 8192, 64),
    sized(16384, 8192, 256),
    sized(16384, 8192, 64, "skewed"),
)


def inputs(case: Case, device: str) -> Inputs:
    """Rows and their codes: all codes alike, or a few of them with nearly all rows."""
    n, k, d = case.sizes.values()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, place = torch.randn(n, d), torch.rand(n)
    index = (place ** (16 if case.data == "skewed" else 1) * k).long()
    return {"x": x.to(device, case.torch_dtype), "index": index.to(device), "num_codes": k}


def products(inputs: Inputs, kind: str) -> Call:
    """The product of a one-hot matrix that is there already."""
    x, num_codes = inputs["x"], inputs["num_codes"]
    one_hot = F.one_hot(inputs["index"], num_codes).to(x.dtype)
    sums = x.new_zeros(num_codes, x.shape[1])
    return lambda: torch.mm(one_hot.T, x, out=sums)


def candidates(device: str) -> dict[str, Candidate]:
    """Everything that counts and sums on `device`."""
    return {
        OURS: of_function(tw.code_sums),
        PRODUCTS: Candidate(products, matrices(3, "N", "K")),
        "one-hot": of_function(baselines.one_hot_code_sums, matrices(3, "N", "K")),
        INDEX_ADD: of_function(baselines.index_add_code_sums),
        "scatter_add": of_function(baselines.scatter_add_code_sums),
        "bincount": of_function(baselines.bincount_code_sums),
    }


def mistakes(inputs: Inputs):
    """Elements that are not the sum in float64, rounded once."""
    _, truth = tw.reference.code_sums(**inputs)

    def count_wrong(result: tuple[tuple[Tensor, Tensor]]) -> tuple[int, int]:
        _, sums = result[0]
        return int((sums != truth).sum()), truth.numel()

    return count_wrong


def moved(case: Case, kind: str) -> int:
    """Rows and indices are read, sums and counts written."""
    n, k, d = case.sizes.values()
    return (n + k) * (d * case.torch_dtype.itemsize + 8)


BENCHMARK = Benchmark(
    axis=None,
    cases=CASES,
    small=Case({"N": 128, "K": 96, "D": 16}, kinds=(FORWARD,)),
    inputs=inputs,
    candidates=candidates,
    flops=flops,  # of the one-hot product: no other way needs one
    moved=moved,
    baseline=INDEX_ADD,
    mistakes=mistakes,
    short=True,
)
