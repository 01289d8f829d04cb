"""Quantisers in two processes: the same codes in both, and those of one process with all rows."""

import pytest
import torch
import torch.distributed as dist

import tilewise as tw
from tests.common.processes import OF_PROCESSES, processes
from tests.common.quantizer_cases import CLOSE, HEADS, grouped, quantizer, residual, rows

pytestmark = OF_PROCESSES

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
        self.scale, self.quantizer = torch.nn.Parameter(torch.ones(1)), quantizer

    def forward(self, x):
        return self.quantizer(self.scale * x)


KMEANS = dict(kmeans_init=True, kmeans_iters=3)
RESUMED = [(quantizer, KMEANS), (residual, KMEANS)]


def process() -> tuple:
    rank = dist.get_rank()
    states = trained(slice(0, 15) if rank == 0 else slice(15, 40))
    after = [resumed(rank, make, settings) for make, settings in RESUMED]
    return states, *trained_residual(rank), after


def test_processes_agree():
    first, second = processes().run(2, process)
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


PARTS = [7, 0, 4]  # rows of each of three processes


def long_run(wrapped: bool) -> list[torch.Tensor]:
    """The state after 100 steps, in some of which a process has no rows, and codes die."""
    module = quantizer(threshold_ema_dead_code=1.0, kmeans_init=True, kmeans_iters=2)
    outer = WithParameter(module)
    if wrapped:
        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        dist.fsdp.fully_shard(outer, mesh=mesh)
    torch.manual_seed(dist.get_rank())
    for step in range(100 if not wrapped else 10):
        place = (dist.get_rank() + step // 3) % len(PARTS)
        x = rows(PARTS[place], 16, seed=10 * step + place) * (1 + step % 5)
        quantized, _, loss = outer(x)
        (quantized.square().sum() + loss).backward()
    return [*module.state_dict().values()]


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "fsdp2"])
def test_codebooks_do_not_drift(wrapped):
    first, *others = processes().run(3, long_run, wrapped)
    assert len(first) >= 4 and all(x.isfinite().all() for x in first)
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def exchanges(make, settings: dict) -> int:
    """How many reductions a step takes, after the first one."""
    module = make(**settings)
    module(rows(9, 16))
    count, real = 0, dist.all_reduce

    def counted(*arguments, **options):
        nonlocal count
        count += 1
        return real(*arguments, **options)

    dist.all_reduce = counted
    try:
        module(rows(9, 16))
    finally:
        dist.all_reduce = real
    return count


@pytest.mark.parametrize("make", [quantizer, residual, grouped])
def test_a_step_is_one_exchange(make):
    """Two more where codes are revived: which rows there are, and those that are chosen."""
    assert processes().run(2, exchanges, make, {}) == [1, 1]
    assert processes().run(2, exchanges, make, dict(threshold_ema_dead_code=2.0)) == [3, 3]



# Noise


def drawn(sizes: list[int]) -> list[torch.Tensor]:
    """What this process draws, with a generator that is its own, and with a seed."""
    rank = dist.get_rank()
    torch.manual_seed(10 + rank)
    x = rows(sum(sizes), 3, 16).split(sizes)[rank]
    sample = tw.nn.GumbelSoftmax(0.7, group=dist.group.WORLD)
    torch.manual_seed(3)
    codes = tw.nn.GumbelQuantizer(16, 20, group=dist.group.WORLD)
    torch.manual_seed(10 + rank)
    results = [sample(x), codes(x)[0], sample(x, seed=-5, row_offset=2)]
    results.append(codes.eval()(x)[0])  # where nothing is drawn
    return [y.detach() for y in results]


@pytest.mark.parametrize("sizes", [[2, 2, 2], [3, 0, 2]], ids=str)
def test_processes_draw_what_one_would(sizes):
    x = rows(sum(sizes), 3, 16)
    torch.manual_seed(3)
    codes = tw.nn.GumbelQuantizer(16, 20)
    torch.manual_seed(10)  # the first process's
    sample = tw.nn.GumbelSoftmax(0.7)
    alone = [sample(x), codes(x)[0], sample(x, seed=-5, row_offset=2), codes.eval()(x)[0]]
    parts = zip(*processes().run(3, drawn, sizes), strict=True)
    for expected, found in zip(alone, parts, strict=True):
        torch.testing.assert_close(torch.cat(found), expected.detach(), rtol=1e-6, atol=1e-6)
