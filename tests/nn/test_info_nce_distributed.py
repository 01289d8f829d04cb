"""InfoNCELoss of several processes: that of one with all rows, and nothing else fails silently."""

import math
import re
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import tilewise as tw
from benchmarks.baselines import eager_info_nce
from tests.common.budget import assert_within_budget
from tests.common.contrastive_cases import Case, related
from tests.common.cross_entropy_cases import ROWS, magnitudes, outputs
from tests.common.processes import OF_PROCESSES, WORLDS, processes

pytestmark = OF_PROCESSES

DIM, SCALE = 12, 9.0
EQUAL = {2: [5, 5], 3: [4, 4, 4], 4: [3, 3, 3, 3], 8: [2] * 8}
RAGGED = {2: [7, 2], 3: [3, 0, 5], 4: [0, 6, 1, 4], 8: [0, 6, 1, 4, 2, 0, 3, 5]}
MORE = [9, 3, 0, 2, 0, 0, 5, 1]  # keys beyond the queries'


@dataclass(frozen=True)
class Problem:
    """Positives of the kind, queries of each process, keys of each."""

    positives: str
    smoothing: float
    queries: list[int]
    keys: list[int]

    def features(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of all processes."""
        make = related(sum(self.queries), sum(self.keys), DIM)
        return Case(f"{self.positives}{self.keys}", make).features(dtype)

    def ids(self) -> tuple[Tensor, Tensor]:
        """Of all queries and keys: few names, or what an offset in a process means."""
        keys = torch.arange(sum(self.keys))
        if self.positives == "ids":
            return torch.arange(sum(self.queries)) * 5 % 7, keys * 3 % 8
        queries, first = [], 0
        for b, n in zip(self.queries, self.keys, strict=True):
            place = torch.arange(b) + OFFSETS[self.positives]
            queries.append(torch.where((place >= 0) & (place < n), first + place, -1))
            first += n
        return torch.cat(queries), keys

    def of_rank(self, rank: int) -> int | None | tuple[Tensor, Tensor]:
        if self.positives != "ids":
            return None if self.positives == "none" else OFFSETS[self.positives]
        queries, keys = self.ids()
        return queries.split(self.queries)[rank], keys.split(self.keys)[rank]


OFFSETS = {"diagonal": 0, "ahead": 2, "behind": -1, "none": 2**62}


def problems(world: int) -> list[Problem]:
    found = []
    for queries in (EQUAL[world], RAGGED[world]):
        keys = [b + more for b, more in zip(queries, MORE, strict=False)]
        for positives in ("diagonal", "ahead", "behind", "ids"):
            found += [Problem(positives, smoothing, queries, keys) for smoothing in (0.0, 0.2)]
    return [*found, Problem("none", 0.1, EQUAL[world], RAGGED[world])]


def of_rank(problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    rank = dist.get_rank()
    rows = zip(problem.features(dtype), (problem.queries, problem.keys), strict=True)
    leaves = [x.split(sizes)[rank].clone().requires_grad_() for x, sizes in rows]
    loss = tw.nn.InfoNCELoss(
        1 / SCALE, learnable=True, normalize=False, label_smoothing=problem.smoothing,
        group=dist.group.WORLD,
    ).to(torch.promote_types(dtype, torch.float32))
    with torch.no_grad():
        loss.logit_scale.fill_(math.log(SCALE))  # in its dtype
    value = loss(*leaves, positives=problem.of_rank(rank))
    assert torch.equal(value, forward_alone(loss, leaves, problem.of_rank(rank)))
    d_image, d_text, d_log = torch.autograd.grad(value, [*leaves, loss.logit_scale])
    return {"loss": value.detach(), "d_image": d_image, "d_text": d_text, "d_scale": d_log / SCALE}


def forward_alone(loss, leaves, positives) -> Tensor:
    with torch.no_grad():
        return loss(*leaves, positives=positives)


def of_ranks(world: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    return [of_rank(problem, dtype) for problem in problems(world)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("world", [*WORLDS, pytest.param(8, marks=pytest.mark.slow)])
def test_equals_one_process_with_all_rows(world, dtype):
    parts = processes(world).run(world, of_ranks, world, dtype)
    for problem, *found in zip(problems(world), *parts, strict=True):
        ours = {n: torch.stack([x[n] for x in found]).mean(0) for n in ("loss", "d_scale")}
        ours |= {n: torch.cat([x[n] for x in found]) / world for n in ("d_image", "d_text")}
        case = Case("joined", related(0, 0, 1), SCALE, positives=problem.ids())
        features = problem.features(dtype)
        exact = [x.double() for x in features]
        smoothing = problem.smoothing
        truth = outputs(tw.reference.info_nce, case, exact, torch.float64, smoothing)
        eager = outputs(eager_info_nce, case, features, dtype, smoothing)
        sizes = magnitudes(case, *exact, smoothing, sides=(ROWS,))
        assert_within_budget(ours, eager, truth, sizes)


# Training


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tower = torch.nn.Linear(DIM, 8)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [self.tower(x) for x in inputs]


def batch(world: int) -> list[list[Tensor]]:
    """Anchors, positives and three negatives of each, of every process."""
    generator = torch.Generator().manual_seed(world)
    shapes = (DIM,), (DIM,), (3, DIM)
    return [
        list(torch.randn(sum(RAGGED[world]), *shape, generator=generator).split(RAGGED[world]))
        for shape in shapes
    ]


def trained(autocast: bool = False) -> dict[str, Tensor]:
    """The gradients of two accumulated batches, under DistributedDataParallel or alone."""
    alone = not dist.is_initialized()
    world = 3 if alone else dist.get_world_size()
    model, group = Encoder(), None if alone else dist.group.WORLD
    loss = tw.nn.InfoNCELoss(0.1, learnable=True, group=group)
    both = torch.nn.ModuleDict({"encoder": model, "loss": loss})
    both.forward = lambda *inputs: loss(*model(*inputs))
    if not alone:
        both = torch.nn.parallel.DistributedDataParallel(both)
    for last in (False, True):
        inputs = [torch.cat(x) if alone else x[dist.get_rank()] for x in batch(world)]
        if not alone:
            both.require_backward_grad_sync = last  # what no_sync sets
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = both(*inputs)
        value.backward()
    module = both if alone else both.module
    return {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_trains_as_one_process(autocast):
    close = dict(rtol=0.05, atol=0.02) if autocast else dict(rtol=1e-4, atol=1e-6)
    alone = trained(autocast)
    for found in processes().run(3, trained, autocast):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, **close)


# What differs


def narrow(q, k):
    return q[:, :7], k[:, :7], {}


DIFFERENCES = {
    "D": (narrow, "D: expected the same in every process, got 12 in rank 0, 2 and 7 in rank 1"),
    "dtype": (lambda q, k: (q.bfloat16(), k.bfloat16(), {}), "dtype: .* and torch.bfloat16 in ra"),
    "keys": (lambda q, k: (q, None, {}), "rank 1: keys: expected a tensor, got NoneType"),
    "ids": (lambda q, k: (q, k, {"positives": (torch.arange(4), torch.arange(6))}),
            "positives: .*an offset in rank 0, 2 and ids in rank 1"),
    "few ids": (lambda q, k: (q, k, {"positives": (torch.arange(3), torch.arange(6))}),
                "rank 1: positives: expected 4 ids"),
    "temperature": (lambda q, k: (q, k, {"settings": {"temperature": 0.1}}),
                    "temperature: .*0.05 in rank 0, 2 and 0.1 in rank 1"),
    "normalize": (lambda q, k: (q, k, {"settings": {"normalize": True}}), "normalize: .*False in"),
    "frozen": (lambda q, k: (q, k.detach(), {}), "gradients: .*query keys in rank 0, 2 and query"),
}  # fmt: skip


def differing(name: str) -> str:
    q, k = (torch.ones(n, DIM).requires_grad_() for n in (4, 6))
    options: dict = {}
    if dist.get_rank() == 1:
        q, k, options = DIFFERENCES[name][0](q, k)
    settings = options.pop("settings", {})
    loss = tw.nn.InfoNCELoss(**{"normalize": False, **settings}, group=dist.group.WORLD)
    with pytest.raises(ValueError) as error:
        loss(q, k, **options)
    return str(error.value)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences_are_named_everywhere(name):
    for found in processes().run(3, differing, name):
        assert re.search(DIFFERENCES[name][1], found), found
