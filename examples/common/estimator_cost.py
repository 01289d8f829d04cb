"""Time and memory of a sample of each gradient estimator, where f is a network."""

from __future__ import annotations

import statistics

import torch
from torch import nn

from benchmarks.harness.measure import Call, peak_bytes_each, time_interleaved
from tilewise.estimators import Categorical, gradient

ROWS, VARIABLES, CATEGORIES, SAMPLES = 64, 16, 32, 8


def prepare(name: str, options: dict, device: str = "cpu") -> Call:
    """The gradient for 64 rows of 16 variables with 32 categories, 8 samples of each."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(VARIABLES * CATEGORIES, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, 1),
    ).to(device)  # fmt: skip
    rows = Categorical(torch.randn(ROWS, VARIABLES, CATEGORIES).to(device))

    def call(samples: int = SAMPLES):
        return gradient(
            lambda y: network(y.flatten(-2)).squeeze(-1), rows, name, samples, **options
        )

    call(2)  # one-time costs are not the sample's
    return call


def measure(
    kinds: dict[str, tuple[str, dict]], seconds: float, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """For each kind milliseconds and kB at the peak, of one sample of all rows."""
    calls = {kind: prepare(*chosen, device) for kind, chosen in kinds.items()}
    times = time_interleaved(calls, device, seconds)
    cases = [
        {"name": name, "options": options, "device": device} for name, options in kinds.values()
    ]
    peaks = peak_bytes_each(prepare, cases)
    return {
        kind: {"ms": statistics.median(times[kind]) / SAMPLES, "kb": peak / SAMPLES / 1e3}
        for kind, peak in zip(kinds, peaks, strict=True)
    }
