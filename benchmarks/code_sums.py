"""Counts and sums of the rows of each code, against a one-hot matrix, index_add and others."""

import torch
import torch.nn.functional as F
from torch import Tensor

import tilewise as tw
from benchmarks import baselines
from benchmarks.harness import bench
from benchmarks.harness.bench import FORWARD, Case
from benchmarks.nearest_code import SMALL, flops, sized

INDEX_ADD, ONE_HOT = "index_add", "one-hot"

CASES = (
    sized(4096, 1024, 64, quick=True),
    sized(16384, 512, 64),
    sized(16384, 1024, 256),
    sized(16384, 8192, 64),
    sized(16384, 8192, 256),
    sized(16384, 8192, 64, "skewed"),
)


def inputs(case: Case, device: str) -> bench.Inputs:
    """Rows and their codes: all codes alike, or a few of them with nearly all rows."""
    n, k, d = case.sizes.values()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, place = torch.randn(n, d), torch.rand(n)
    index = (place ** (16 if case.data == "skewed" else 1) * k).long()
    return {"x": x.to(device, case.torch_dtype), "index": index.to(device), "num_codes": k}


def products(inputs: bench.Inputs, kind: str) -> bench.Call:
    """The product of a one-hot matrix that is there already."""
    x, num_codes = inputs["x"], inputs["num_codes"]
    one_hot = F.one_hot(inputs["index"], num_codes).to(x.dtype)
    sums = x.new_zeros(num_codes, x.shape[1])
    return lambda: torch.mm(one_hot.T, x, out=sums)


def implementations(device: str) -> dict[str, bench.Implementation]:
    """Everything that counts and sums on `device`."""
    three = bench.matrices(3, "N", "K")
    return {
        bench.OURS: bench.of_function(tw.code_sums),
        bench.PRODUCTS: bench.Implementation(products, three),
        ONE_HOT: bench.of_function(baselines.one_hot_code_sums, three),
        INDEX_ADD: bench.of_function(baselines.index_add_code_sums),
        "scatter_add": bench.of_function(baselines.scatter_add_code_sums),
        "bincount": bench.of_function(baselines.bincount_code_sums),
    }


def mistakes(inputs: bench.Inputs):
    """Elements that are not the sum in float64, rounded once."""
    _, truth = tw.reference.code_sums(**inputs)

    def count_wrong(result: tuple[Tensor, Tensor]) -> tuple[int, int]:
        _, sums = result
        return int((sums != truth).sum()), truth.numel()

    return count_wrong


def moved(case: Case, kind: str) -> int:
    """Rows and indices are read, sums and counts written."""
    n, k, d = case.sizes.values()
    return (n + k) * (d * case.torch_dtype.itemsize + 8)


BENCHMARK = bench.Benchmark(
    CASES,
    Case({"N": 128, "K": 96, "D": 16}, kinds=(FORWARD,)),
    inputs,
    implementations,
    moved,
    flops,  # of the one-hot product: no other way needs one
    baseline=INDEX_ADD,
    mistakes=mistakes,
    short=True,
    small_calls=bench.small_calls("N K D", SMALL, FORWARD),
    rival=ONE_HOT,
)
