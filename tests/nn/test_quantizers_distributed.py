"""Quantisers in two processes: the same codes in both, and those of one process with all rows."""

from pathlib import Path

import pytest
import torch

from tests.common import fresh
from tests.common.contrastive_cases import DEVICE
from tests.common.quantizer_cases import CLOSE, HEADS, quantizer, residual, rows

SETTINGS = [
    dict(),
    dict(threshold_ema_dead_code=2.0, kmeans_init=True, kmeans_iters=3),
    dict(HEADS, separate_codebook_per_head=True, use_cosine_sim=True, kmeans_init=True,
         threshold_ema_dead_code=2.0),
    dict(learnable_codebook=True, threshold_ema_dead_code=1.0),
]


def trained(part: slice) -> list[dict]:
    """State dicts after three batches, of which this process sees `part`."""
    states = []
    for settings in SETTINGS:
        module = quantizer(**settings)
        for seed in range(3):
            x = rows(40, 16, seed=seed)
            x[3, 2] = float("nan")
            torch.manual_seed(seed)
            module(x[part])
        states.append(module.state_dict())
    return states


def trained_residual(rank: int) -> tuple[list[int], dict]:
    """How many layers each of some batches kept, and the state dict after them."""
    module = residual(quantize_dropout=True, threshold_ema_dead_code=1.0, kmeans_init=True)
    torch.manual_seed(rank)
    kept = []
    for seed in range(6):
        _, index, _ = module(rows(20 + rank, 16, seed=10 * rank + seed))
        kept.append(int((index[0] >= 0).sum()))
    return kept, module.state_dict()


def resumed(rank: int, make, settings: dict) -> dict:
    """The state dict after training on, of a checkpoint that the first process alone has loaded.

    Its first batch has no rows, which must not count; then one process has none.
    """
    torch.manual_seed(0)
    checkpoint = make(**settings)
    checkpoint(rows(0, 16))
    checkpoint(rows(rank * 40, 16) + 1)
    module = make(**settings)
    if rank == 0:
        module.load_state_dict(checkpoint.state_dict())
    module = torch.nn.parallel.DistributedDataParallel(WithParameter(module))
    first = module.module.quantizer.state_dict()
    first = {key: x.clone() for key, x in first.items()}
    for seed in range(2):
        quantized, _, loss, *_ = module(rows(30, 16, seed=10 * rank + seed) - 5)
        (quantized.square().mean() + loss.sum()).backward()
    return {"first": first, "last": module.module.quantizer.state_dict()}


class WithParameter(torch.nn.Module):
    """DistributedDataParallel wants something to learn."""

    def __init__(self, quantizer):
        super().__init__()
        self.scale, self.quantizer = torch.nn.Parameter(torch.ones(())), quantizer

    def forward(self, x):
        return self.quantizer(self.scale * x)


KMEANS = dict(kmeans_init=True, kmeans_iters=3)
RESUMED = [(quantizer, KMEANS), (residual, KMEANS)]


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    states = trained(slice(0, 15) if rank == 0 else slice(15, 40))
    after = [resumed(rank, make, settings) for make, settings in RESUMED]
    torch.save((states, *trained_residual(rank), after), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo, on CPU tensors")
def test_processes_agree(tmp_path: Path):
    fresh.run_all(process, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for ours, theirs, alone in zip(first[0], second[0], trained(slice(None)), strict=True):
        for key, value in ours.items():
            assert torch.equal(value, theirs[key])
            torch.testing.assert_close(value, alone[key], **CLOSE)
    # The layers that are left out, too, although the processes' own random numbers differ.
    assert first[1] == second[1] and len(set(first[1])) > 1
    assert all(torch.equal(value, second[2][key]) for key, value in first[2].items())
    for ours, theirs in zip(first[3], second[3], strict=True):
        for when in ("first", "last"):
            assert all(torch.equal(x, theirs[when][key]) for key, x in ours[when].items())
        embed = next(key for key in ours["last"] if key.endswith("embed"))
        assert (ours["first"][embed].mean() - 1).abs() < 0.3  # where the checkpoint's rows lay
        far = (ours["last"][embed] + 5).square().mean(-1)  # k-means would have moved all codes
        assert (far > 20).sum() > 10
