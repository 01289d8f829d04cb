"""ItcLoss of several processes with a group: loss, gradients and queues of one with all rows."""

import copy
import re

import pytest
import torch
import torch.distributed as dist

import tilewise as tw
from tests.common.processes import OF_PROCESSES, WORLDS, processes
from tests.nn.test_itc_loss import QUEUES, features, ids

pytestmark = OF_PROCESSES

D, STEPS = 8, 3
EQUAL = {2: [4, 4], 3: [3, 3, 3], 4: [2, 2, 2, 2], 8: [1] * 8}
RAGGED = {2: [7, 2], 3: [3, 0, 5], 4: [0, 6, 1, 4], 8: [0, 6, 1, 4, 2, 0, 3, 5]}
PROBLEMS = [  # size of the queue, whether there are ids, alpha
    (20, False, 0.4),
    (20, True, torch.tensor(0.4)),
    (5, True, 0.4),  # fewer than a batch has
    (0, True, 1.0),
    (0, False, 0.4),
    (14, True, 0.0),
]
NAMES = ("loss", "d_image", "d_text", "d_temperature")


def trained(rows: list[int], dtype: torch.dtype, autocast: bool = False) -> list:
    """Of each problem and step, results and queues: of this process, or of one with all rows."""
    alone = not dist.is_initialized()
    found = []
    for size, with_ids, alpha in PROBLEMS:
        torch.manual_seed(0)
        loss = tw.nn.ItcLoss(D, size, group=None if alone else dist.group.WORLD)
        loss = loss.to(torch.promote_types(dtype, torch.float32))
        for step in range(STEPS):
            loss.train(step != 1)
            names = ids(sum(rows), names=4, seed=step) if with_ids else None
            inputs = [*features(sum(rows), D, seed=step, dtype=dtype), names]
            if not alone:
                rank = dist.get_rank()
                inputs = [None if x is None else x.split(rows)[rank] for x in inputs]
            inputs = [x.detach().requires_grad_() for x in inputs[:2]] + inputs[2:]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                value = loss(*inputs, alpha=alpha)
            gradients = torch.autograd.grad(value, [*inputs[:2], loss.temperature])
            results = dict(zip(NAMES, (value.detach(), *gradients), strict=True))
            found.append((results, copy.deepcopy({n: getattr(loss, n) for n in QUEUES})))
    return found


def check(rows: list[int], dtype: torch.dtype, close: float, autocast: bool = False) -> None:
    world = len(rows)
    parts = processes(world).run(world, trained, rows, dtype, autocast)
    alone = trained(rows, dtype, autocast)
    assert len(alone) == len(PROBLEMS) * STEPS
    for (expected, queues), *found in zip(alone, *parts, strict=True):
        for _, theirs in found:  # the bits of one process, whichever was first
            assert all(torch.equal(theirs[name], x) for name, x in queues.items())
        ours = [x for x, _ in found]
        for name, value in expected.items():
            several = [x[name] for x in ours]
            mean = torch.stack(several).mean(0) if value.dim() == 0 else torch.cat(several) / world
            size = max(float(value.abs().max()), 1e-3)
            torch.testing.assert_close(mean, value, rtol=0, atol=close * size)


@pytest.mark.parametrize("rows", [EQUAL, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("world", [*WORLDS, pytest.param(8, marks=pytest.mark.slow)])
def test_equals_one_process_with_all_rows(world, rows):
    check(rows[world], torch.float64, 1e-10)
    check(rows[world], torch.float32, 1e-5)


@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, False), (torch.float32, True)])
def test_half_precision(dtype, autocast):
    """The bits of the queues too: under autocast they keep what was not rounded."""
    check(RAGGED[3], dtype, 0.02, autocast)


class Student(torch.nn.Module):
    """Towers, their teacher and the loss."""

    def __init__(self, group):
        super().__init__()
        torch.manual_seed(0)
        self.towers = torch.nn.ModuleList(torch.nn.Linear(D, D) for _ in range(2))
        self.teacher = copy.deepcopy(self.towers).requires_grad_(False)
        self.loss = tw.nn.ItcLoss(D, 14, group=group)

    def forward(self, image, text, names):
        both = [*self.towers, *self.teacher]
        found = [tower(x) for tower, x in zip(both, (image, text) * 2, strict=True)]
        return self.loss(*found, names)


def gradients_of_two_batches() -> dict[str, torch.Tensor]:
    """Accumulated, under DistributedDataParallel or alone; the second sees the first's queue."""
    rows, alone = RAGGED[3], not dist.is_initialized()
    module = model = Student(None if alone else dist.group.WORLD)
    if not alone:
        model = torch.nn.parallel.DistributedDataParallel(model)
    for step, last in enumerate((False, True)):
        inputs = [x.detach() for x in features(sum(rows), D, seed=step)[:2]]
        inputs.append(ids(sum(rows), names=4, seed=step))
        if not alone:
            inputs = [x.split(rows)[dist.get_rank()] for x in inputs]
            model.require_backward_grad_sync = last  # what no_sync sets
        model(*inputs).backward()
    return {n: p.grad for n, p in module.named_parameters() if p.requires_grad}


def test_trains_as_one_process():
    alone = gradients_of_two_batches()
    for found in processes().run(3, gradients_of_two_batches):
        assert found.keys() == alone.keys() and len(alone) == 5
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


DIFFERENCES = {
    "D": (lambda x: [y[:, :4] for y in x], {}, r"rank 1: image_features: expected shape \(6, 8\)"),
    "dtype": (lambda x: [y.bfloat16() for y in x], {}, "dtype: .*float32 in rank 0, 2 and torch.b"),
    "rows": (lambda x: [x[0], x[1][:2], *x[2:]], {}, "rank 1: text_features: expected shape"),
    "missing": (lambda x: [x[0], None, *x[2:]], {}, "rank 1: text_features: expected a tensor"),
    "ids": (lambda x: x, {"ids": torch.arange(6)}, "ids: .*None in rank 0, 2 and given in rank 1"),
    "alpha": (lambda x: x, {"alpha": 2.0}, "rank 1: alpha: expected from 0 to 1"),
    "no teacher": (lambda x: x, {"alpha": 0.0}, "alpha: .*0.4 in rank 0, 2 and 0.0 in rank 1"),
}


def differing(name: str) -> str:
    inputs, options = features(), {}
    loss = tw.nn.ItcLoss(8, 10, group=dist.group.WORLD)
    before = copy.deepcopy(loss.state_dict())
    if dist.get_rank() == 1:
        change, options, _ = DIFFERENCES[name]
        inputs = change(inputs)
    with pytest.raises(ValueError) as error:
        loss(*inputs, **options)
    assert all(torch.equal(x, before[key]) for key, x in loss.state_dict().items())
    return str(error.value)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences_are_named_everywhere(name):
    for found in processes().run(3, differing, name):
        assert re.search(DIFFERENCES[name][2], found), found
