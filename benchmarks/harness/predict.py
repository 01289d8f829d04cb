"""What a kernel could reach on GPUs, computed and not measured.

Three times bound a fused kernel from below: the matrix products at the tensor cores' dense peak,
the bytes that must move at the memory's bandwidth, and the other instructions at the rate at which
an SM issues them (4 schedulers, one instruction for 32 lanes each per clock). Tiles are taken to
stay in the cache. At best all three overlap and the longest one counts; at worst the instructions
wait for the products.
"""

from dataclasses import dataclass

from benchmarks.harness.bench import OURS, Benchmark, Case
from benchmarks.harness.report import PREDICTED, Row, provenance

LANES_PER_CLOCK = 4 * 32  # of one SM


@dataclass(frozen=True)
class Gpu:
    """Peaks from the vendor's data sheets: dense bfloat16 products with float32 accumulation."""

    name: str
    tflops: float
    gb_per_s: float
    sms: int
    ghz: float


GPUS = (
    Gpu("A100 SXM (sm_80)", 312, 2039, 108, 1.41),
    Gpu("L40S (sm_89)", 362, 864, 142, 2.52),
    Gpu("RTX 4090 (sm_89)", 165, 1008, 128, 2.52),
    Gpu("H100 SXM (sm_90)", 989, 3350, 132, 1.83),
    Gpu("B200 (sm_100)", 2250, 8000, 148, 1.85),
)


def bounds_ms(gpu: Gpu, flops: int, moved: int, instructions: int) -> tuple[float, float]:
    """Milliseconds if everything overlaps, and if the instructions overlap with nothing."""
    products = flops / (gpu.tflops * 1e9)
    memory = moved / (gpu.gb_per_s * 1e6)
    issue = instructions / (gpu.sms * LANES_PER_CLOCK * gpu.ghz * 1e6)
    return max(products, memory, issue), max(products, memory) + issue


def rows(op: str, benchmark: Benchmark) -> list[Row]:
    """A row for each GPU and each bfloat16 case of the op."""
    if benchmark.instructions is None:
        return []
    cases = [case for case in benchmark.cases if case.dtype == "bfloat16"]
    return [
        _row(op, benchmark, case, kind, gpu)
        for case in cases
        for kind in case.kinds
        for gpu in GPUS
    ]


def _row(op: str, benchmark: Benchmark, case: Case, kind: str, gpu: Gpu) -> Row:
    flops, moved = benchmark.flops(case, kind), benchmark.moved(case, kind)
    assert benchmark.instructions is not None
    best, worst = bounds_ms(gpu, flops, moved, benchmark.instructions(case, kind))
    return Row(
        op, case.label, kind, OURS, PREDICTED, verified=False, dtype=case.dtype,
        sizes=case.sizes_text, median_ms=worst, q25_ms=best, q75_ms=worst,
        flops=flops, moved_bytes=moved, machine=gpu.name, **provenance(),
    )
