"""The search for the nearest code against what people run for it, and one product of that size."""

from collections.abc import Callable

import torch
from torch import Tensor

import tilewise as tw
from benchmarks import baselines
from benchmarks.harness import bench
from benchmarks.harness.bench import FORWARD, OURS, PRODUCTS, Case

ADDMM, FAISS = "chunked addmm", "faiss"
TRUTH = 2**29  # elements of rows and codes that the count of mistakes looks at

Data = Callable[[int, int, int], tuple[Tensor, Tensor]]


def normal(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows (n, d) and codes (k, d) without any structure."""
    return torch.randn(n, d), torch.randn(k, d)


def trained(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows beside their codes."""
    codes = torch.randn(k, d)
    return codes[torch.randint(k, (n,))] + 0.05 * torch.randn(n, d), codes


def clustered(clusters: int, spread: float = 1e-4) -> Data:
    """Codes that differ by little from few centres, as in a collapsed codebook."""

    def make(n, k, d):
        centres = torch.randn(clusters, d)
        return torch.randn(n, d), centres[torch.arange(k) % clusters] + spread * torch.randn(k, d)

    return make


def equal(share: float) -> Data:
    """A share of the codes equal one another: dead codes, or silence that revived them."""

    def make(n, k, d):
        x, codes = normal(n, k, d)
        codes[torch.randperm(k)[: round(share * k)]] = 0.0
        return x, codes

    return make


def offset(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Everything far from the origin."""
    return torch.randn(n, d) + 1e4, torch.randn(k, d) + 1e4


def outlier(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """One element of one code is a million."""
    x, codes = normal(n, k, d)
    codes[k // 2, d // 2] = 1e6
    return x, codes


DATA: dict[str, Data] = {
    "": normal,
    "trained": trained,
    **{f"{n} cluster{'s' * (n > 1)}": clustered(n) for n in (1, 2, 16, 256)},
    "nearly equal": clustered(2, 1e-7),
    "10% equal": equal(0.1),
    "all equal": equal(1.0),
    "offset": offset,
    "outlier": outlier,
}


def sized(n: int, k: int, d: int, data: str = "", kinds=(FORWARD,), **options) -> Case:
    """A case of N rows, K codes and D elements, here and in the benchmarks of what uses them."""
    return Case({"N": n, "K": k, "D": d}, data=data, kinds=kinds, sweep=True, **options)


CASES = (
    sized(2048, 1024, 64, quick=True),
    sized(2048, 1024, 64, "16 clusters", quick=True),
    sized(1200, 1024, 128, "all equal", quick=True),
    sized(1200, 1024, 128, "nearly equal", quick=True),
    sized(16384, 512, 64),
    sized(16384, 1024, 256),
    sized(16384, 8192, 8),
    sized(16384, 8192, 64),
    sized(16384, 8192, 256),
    sized(8192, 16384, 256),
    sized(4096, 65536, 32),
    *(
        sized(16384, 8192, 64, data, only=(OURS, PRODUCTS, ADDMM, FAISS))
        for data in list(DATA)[1:]
    ),
)


def inputs(case: Case, device: str) -> bench.Inputs:
    """Rows and codes, the same in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pair = DATA[case.data](*case.sizes.values())
    x, codebook = (t.to(device, case.torch_dtype) for t in pair)
    return {"x": x, "codebook": codebook}


def products(inputs: bench.Inputs, kind: str) -> bench.Call:
    """The product that a search by matrix multiplication begins with."""
    x, codebook = inputs["x"], inputs["codebook"]
    scores = x.new_zeros(len(x), len(codebook))
    return lambda: torch.mm(x, codebook.T, out=scores)


def lucidrains(inputs: bench.Inputs, kind: str) -> bench.Call:
    """The search of a quantiser that does not learn."""
    quantizer = baselines.lucidrains_quantizer(inputs["codebook"]).eval()

    def call():
        with torch.no_grad():
            return (quantizer(inputs["x"])[1],)

    return call


def implementations(device: str) -> dict[str, bench.Implementation]:
    """Everything that finds the nearest code on `device`, if it is installed."""
    found = {
        OURS: bench.of_function(lambda x, codebook: tw.nearest_code(x, codebook).index),
        PRODUCTS: bench.Implementation(products, bench.matrices(1, "N", "K")),
        ADDMM: bench.of_function(baselines.addmm_nearest_code),
        "cdist": bench.of_function(baselines.cdist_nearest_code, bench.matrices(1.1, "N", "K")),
    }
    if device == "cpu" and baselines.installed("faiss"):
        found[FAISS] = bench.of_function(baselines.faiss_nearest_code)
    if device == "cpu" and baselines.installed("sklearn"):
        found["scikit-learn"] = bench.of_function(baselines.sklearn_nearest_code)
    if device == "cuda" and baselines.installed("flash_kmeans"):
        found["flash_kmeans"] = bench.of_function(baselines.flash_kmeans_nearest_code)
    if baselines.installed("vector_quantize_pytorch"):
        found["lucidrains"] = bench.Implementation(lucidrains, bench.matrices(5, "N", "K"))
    return found


def mistakes(inputs: bench.Inputs):
    """Indices that float64 does not confirm, on as many rows as it takes a few seconds for."""
    x, codebook = inputs["x"], inputs["codebook"]
    count = min(len(x), max(1, TRUTH // codebook.numel()))
    rows = torch.linspace(0, len(x) - 1, count, device=x.device).long()
    truth = tw.reference.nearest_code(x[rows], codebook).index

    def count_wrong(result: tuple[Tensor]) -> tuple[int, int]:
        return int((result[0][rows] != truth).sum()), count

    return count_wrong


def flops(case: Case, kind: str) -> int:
    """One product of N x K x D."""
    n, k, d = case.sizes.values()
    return 2 * n * k * d


def moved(case: Case, kind: str) -> int:
    """Rows and codes are read, indices written."""
    n, k, d = case.sizes.values()
    return (n + k) * d * case.torch_dtype.itemsize + 8 * n


SMALL = [(16, 512, 64), (64, 512, 64), (256, 512, 64), (1, 512, 64), (16, 64, 16), (64, 8192, 64)]

BENCHMARK = bench.Benchmark(
    CASES,
    Case({"N": 128, "K": 96, "D": 16}, kinds=(FORWARD,)),
    inputs,
    implementations,
    moved,
    flops,
    baseline=ADDMM,
    mistakes=mistakes,
    small_calls=bench.small_calls("N K D", SMALL, FORWARD),
    rival="cdist",
)
