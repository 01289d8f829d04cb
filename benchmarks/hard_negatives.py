"""Hard negatives of both directions against eager, torch.compile and one product."""

import tilewise as tw
from benchmarks import baselines, sigmoid_loss
from benchmarks.harness import bench
from benchmarks.harness.bench import Case


def sized(b: int, dtype: str = "float32", **options) -> Case:
    """A case without gradients: an index has none."""
    return Case({"B": b, "D": 256}, dtype, kinds=(bench.FORWARD,), **options)


CASES = (
    sized(512, sweep=True, quick=True),
    sized(2048, sweep=True, quick=True),
    sized(8192, sweep=True),
    sized(8192, "bfloat16"),
)


def inputs(case: Case, device: str) -> bench.Inputs:
    """Unit rows, and the usual temperature of 0.07."""
    found = sigmoid_loss.features(case, device) | {"logit_scale": bench.scalar(14.3, device)}
    return {name: x.detach() for name, x in found.items()}


def implementations(device: str) -> dict[str, bench.Implementation]:
    """Everything that draws negatives on `device`."""
    eager, several = baselines.eager_hard_negatives, bench.matrices(5.5, "B", "B")
    return {
        bench.OURS: bench.of_function(tw.hard_negatives),
        bench.PRODUCTS: bench.Implementation(
            sigmoid_loss.products, bench.matrices(1, "B", "B")  # the logits
        ),
        bench.EAGER: bench.of_function(eager, several),
        bench.COMPILED: bench.of_function(baselines.compiled(eager), several),
    }  # fmt: skip


def flops(case: Case, kind: str) -> int:
    """One product of B x B x D."""
    return 2 * case.sizes["B"] ** 2 * case.sizes["D"]


def moved(case: Case, kind: str) -> int:
    """Both features are read, and two indices of each pair written."""
    b, d = case.sizes.values()
    return 2 * b * d * case.torch_dtype.itemsize + 16 * b


BENCHMARK = bench.Benchmark(
    CASES,
    Case({"B": 512, "D": 256}, kinds=(bench.FORWARD,)),
    inputs,
    implementations,
    moved,
    flops,
    axis="B",
    small_calls=bench.small_calls(
        "B D", [(8, 32), (64, 128), (256, 256), (16, 64), (32, 64)], bench.FORWARD
    ),
)
