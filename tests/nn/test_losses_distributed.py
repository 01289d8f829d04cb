"""Losses of several processes: those of one with all rows, and open_clip's own beside ours."""

import ctypes
import os
import re
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import tilewise as tw
from benchmarks import distributed
from benchmarks.baselines import eager_clip_loss, eager_info_nce, eager_sigmoid_loss
from benchmarks.baselines.peers import open_clip_losses
from tests.common import cross_entropy_cases
from tests.common.budget import assert_within_budget
from tests.common.contrastive_cases import Case
from tests.common.peers import need
from tests.common.processes import OF_PROCESSES, WORLDS, processes
from tests.ops import test_sigmoid_loss

pytestmark = OF_PROCESSES

DIM = 12
EQUAL = {2: [5, 5], 3: [4, 4, 4], 4: [4, 4, 4, 4], 8: [3] * 8}
RAGGED = {2: [7, 2], 3: [3, 0, 5], 4: [0, 6, 1, 4], 8: [0, 6, 1, 4, 2, 0, 3, 5]}
ROUTES = ["bidir", "shift", "reduce", "gather"]
CLIP_OPTIONS = [
    dict(local_loss=local, gather_with_grad=grad) for local in (False, True)
    for grad in (False, True)
]  # fmt: skip
SCALE, BIAS = 9.0, -6.0


def features(rows: list[int], dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Of all processes."""
    generator = torch.Generator().manual_seed(sum(rows))
    image = torch.randn(sum(rows), DIM, generator=generator, dtype=torch.float64)
    text = image + torch.randn(sum(rows), DIM, generator=generator, dtype=torch.float64)
    return F.normalize(image, dim=1).to(dtype), F.normalize(text, dim=1).to(dtype)


def leaves(rows: list[int], rank: int | None, dtype=torch.float32) -> list[Tensor]:
    """Image and text features of one process (None: of all), logit_scale, logit_bias."""
    wide = torch.promote_types(dtype, torch.float32)
    tensors = [x if rank is None else x.split(rows)[rank] for x in features(rows, dtype)]
    tensors += [torch.tensor(value, dtype=wide) for value in (SCALE, BIAS)]
    return [x.clone().requires_grad_() for x in tensors]


def differentiated(loss, inputs: list[Tensor]) -> dict[str, Tensor]:
    value = loss(*inputs)
    gradients = torch.autograd.grad(value, inputs)
    names = ("d_image", "d_text", "d_scale", "d_bias")
    return {"loss": value.detach(), **dict(zip(names, gradients, strict=False))}


def of_each(rows: list[int], dtype: torch.dtype) -> dict:
    """In a process: what every loss gives, by its name and options."""
    rank, world = dist.get_rank(), dist.get_world_size()
    inputs = leaves(rows, rank, dtype)
    place = {"rank": rank, "world_size": world}
    found = {}
    for route in ROUTES:
        found[route] = differentiated(tw.nn.SigLipLoss(dist_impl=route, **place), inputs)
    for options in CLIP_OPTIONS:
        loss = tw.nn.ClipLoss(**options, **place)
        found[tuple(options.values())] = differentiated(loss, inputs[:3])
    return found


def joined(parts: list[dict], features_times: float) -> dict[str, Tensor]:
    """Means over the processes, as DistributedDataParallel takes them; features row by row."""
    out = {name: torch.stack([x[name] for x in parts]).mean(0) for name in ("loss", "d_scale")}
    if "d_bias" in parts[0]:
        out["d_bias"] = torch.stack([x["d_bias"] for x in parts]).mean(0)
    for name in ("d_image", "d_text"):
        out[name] = torch.cat([x[name] for x in parts]) * features_times
    return out


def of_queries(info_nce):
    """CLIP's loss without gradients of candidates, made of both directions."""

    def loss(image, text, *scale, **options):
        ways = (image, text.detach()), (text, image.detach())
        return sum(info_nce(*way, *scale, **options) for way in ways) / 2

    return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [EQUAL, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("world", [*WORLDS, pytest.param(8, marks=pytest.mark.slow)])
def test_equal_one_process_with_all_rows(world, rows, dtype):
    rows = rows[world]
    found = processes(world).run(world, of_each, rows, dtype)
    exact = [x.double() for x in features(rows, dtype)]
    case = Case("joined", lambda g: None, SCALE, BIAS)

    def check(key, parts, module, eager, reference, magnitudes):
        times = 1.0 if key == (False, False) else 1 / world  # those are already of the mean
        ours = joined([x[key] for x in parts], times)
        truth = module.outputs(reference, case, exact, torch.float64)
        theirs = module.outputs(eager, case, features(rows, dtype), torch.float32
                                if dtype != torch.float64 else torch.float64)
        assert_within_budget(ours, theirs, truth, magnitudes(truth))

    for key in found[0]:
        if isinstance(key, str):
            check(key, found, test_sigmoid_loss, eager_sigmoid_loss, tw.reference.sigmoid_loss,
                  lambda truth: test_sigmoid_loss.magnitudes(case, *exact, truth))
        else:
            losses = eager_clip_loss, tw.reference.clip_loss
            if key == (True, False):
                losses = of_queries(eager_info_nce), of_queries(tw.reference.info_nce)
            check(key, found, cross_entropy_cases, *losses,
                  lambda truth: cross_entropy_cases.magnitudes(case, *exact))


def beside_open_clip(rows: list[int]) -> list[tuple]:
    """In a process: a name, our results and open_clip's, of every option and hook."""
    theirs = open_clip_losses()
    rank = dist.get_rank()
    place = {"rank": rank, "world_size": dist.get_world_size()}
    inputs = leaves(rows, rank)
    pairs = []
    for route in ROUTES:
        modules = [x.SigLipLoss(dist_impl=route, **place) for x in (tw.nn, theirs)]
        pairs.append((route, *(differentiated(x, inputs) for x in modules)))
    for options in CLIP_OPTIONS:
        modules = [x.ClipLoss(**options, **place) for x in (tw.nn, theirs)]
        results = [differentiated(x, inputs) for x in modules]  # the bias's gradient is 0
        if options["local_loss"]:  # only the mean is promised
            for result in results:
                dist.all_reduce(result["d_scale"])
        pairs.append((str(options), *results))
        hooks = [  # without the bias, which open_clip adds twice to a matrix and its transpose
            differentiated(lambda *x, m=m: sum((z * z).sum() for z in m.get_logits(*x)), inputs[:3])
            for m in modules
        ]
        labels = [{"labels": m.get_ground_truth(inputs[0].device, len(inputs[0]))} for m in modules]
        pairs += [(f"logits {options}", *hooks), (f"labels {options}", *labels)]
    return pairs


@pytest.mark.parametrize("world", WORLDS)
def test_equal_open_clip(world):
    """Loss and gradients of each process, before any mean is taken."""
    need("open_clip")
    for pairs in processes().run(world, beside_open_clip, EQUAL[world]):
        assert len(pairs) == len(ROUTES) + 3 * len(CLIP_OPTIONS)
        for name, ours, theirs in pairs:
            assert ours.keys() == theirs.keys(), name
            for key, value in theirs.items():
                size = float(value.abs().max())
                torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-5 * max(size, 1))


class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (torch.nn.Linear(DIM, 8) for _ in range(2))
        self.scale, self.bias = (torch.nn.Parameter(torch.tensor([x])) for x in (2.0, -3.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        image, text = F.normalize(self.image(image)), F.normalize(self.text(text))
        return image, text, self.scale.exp(), self.bias.clone()


def trained(wrap: str, make, batches: list[list[int]]) -> dict[str, Tensor]:
    """The gradients of two accumulated batches, with a wrapper of torch or alone."""
    model = Towers()
    alone = not dist.is_initialized()
    if wrap == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif wrap == "fsdp2":
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    loss = make()
    for rows, last in zip(batches, (False, True), strict=True):
        inputs = [
            x if alone else x.split(rows)[dist.get_rank()] for x in features(rows)
        ]
        if wrap == "fsdp2":
            model.set_requires_gradient_sync(last)
        elif wrap == "ddp":
            model.require_backward_grad_sync = last  # what no_sync sets
        (loss(*model(*inputs)) / 2).backward()
    gradients = {}
    for name, p in (model.module if wrap == "ddp" else model).named_parameters():
        gradients[name] = p.grad.full_tensor() if wrap == "fsdp2" else p.grad
    return gradients


def all_trained(batches: list[list[int]]) -> dict:
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    makes = {
        "siglip": lambda: tw.nn.SigLipLoss(**place),
        "clip": lambda: tw.nn.ClipLoss(gather_with_grad=True, **place),
        "local clip": lambda: tw.nn.ClipLoss(True, gather_with_grad=True, **place),
    }
    return {
        (wrap, name): trained(wrap, make, batches)
        for wrap in ("ddp", "fsdp2") for name, make in makes.items()
    }  # fmt: skip


@pytest.mark.parametrize("world", [2, 3])
def test_trains_as_one_process(world):
    """DistributedDataParallel and FSDP2 with two accumulated batches; a bias that ClipLoss gets."""
    batches = [EQUAL[world], RAGGED[world]]
    alone = {
        "siglip": trained("", tw.nn.SigLipLoss, batches),
        "clip": trained("", tw.nn.ClipLoss, batches),
    }
    for found in processes().run(world, all_trained, batches):
        for (_, name), gradients in found.items():
            for key, value in alone[name.split()[-1]].items():
                torch.testing.assert_close(gradients[key], value, rtol=1e-4, atol=1e-6)


def failing(**changes) -> str:
    """In a process: the message of a loss one of whose processes differs."""
    rank, world = dist.get_rank(), dist.get_world_size()
    image, text, scale, bias = leaves([3] * world, rank)
    make, options, call = tw.nn.SigLipLoss, {}, {}
    if rank == 1:
        make, options = changes.get("make", make), changes.get("options", {})
        call = changes.get("call", {})
        image, text = changes.get("features", lambda *x: x)(image, text)
    loss = make(rank=rank, world_size=world, **options)
    try:
        loss(**({"image_features": image, "text_features": text, "logit_scale": scale,
                 "logit_bias": bias} | call))
    except ValueError as error:
        return str(error)
    return ""


def narrow(image, text):
    return image[:, :7], text[:, :7]


def half(image, text):
    return image.bfloat16(), text.bfloat16()


def frozen(image, text):
    return image.detach(), text


def shorter(image, text):
    return image, text[:2]


DIFFERENCES = {
    "D": (dict(features=narrow), "D: expected the same in every process, got 12 in rank 0, 2 and "),
    "dtype": (dict(features=half), "dtype: .*float32 in rank 0, 2 and torch.bfloat16 in rank 1"),
    "option": (dict(options={"dist_impl": "shift"}), "route: .*bidir in rank 0, 2 and shift in"),
    "loss": (dict(make=tw.nn.ClipLoss), "loss: .*SigLipLoss in rank 0, 2 and ClipLoss in rank 1"),
    "text": (dict(call={"text_features": None}), "rank 1: text_features: expected a tensor, got"),
    "rows": (dict(features=shorter), "rank 1: text_features: expected 3 rows.*got 2"),
    "bias": (dict(call={"logit_bias": None}), "logit_bias: .*given in rank 0, 2 and None in rank"),
    "frozen": (dict(features=frozen), "gradients: .*got image_features .* in rank 0, 2 and text_"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences_are_named_everywhere(name):
    changes, message = DIFFERENCES[name]
    for found in processes().run(3, failing_with, name):
        assert re.search(message, found), found


def failing_with(name: str) -> str:
    return failing(**DIFFERENCES[name][0])


def killed(victim: int, during: str) -> tuple[str, float]:
    """In a process: what it is told when another one dies in the middle of a step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    place = {"rank": rank, "world_size": world}
    loss = tw.nn.SigLipLoss(**place) if during == "siglip" else tw.nn.ClipLoss(True, True, **place)
    inputs = leaves([64] * world, rank)[: 4 if during == "siglip" else 3]
    loss(*inputs)
    if rank == victim:
        from tilewise.nn.losses import _ring

        name = "sigmoid_block" if during == "siglip" else "block_gradients"
        setattr(_ring, name, lambda *x: os.kill(os.getpid(), signal.SIGKILL))
    began = time.monotonic()
    try:
        loss(*inputs)
    except RuntimeError as error:
        return str(error), time.monotonic() - began
    return "no error", 0.0


def check_killed(world: int, victim: int, during: str) -> None:
    answers = processes().attempt(world, killed, victim, during, group=10)
    for rank, (good, answer) in enumerate(answers):
        if rank == victim:
            assert not good and "died" in answer
            continue
        assert good, answer
        message, seconds = answer
        name = "SigLipLoss" if during == "siglip" else "ClipLoss"
        assert seconds < 12 and f"tilewise.nn.{name}: rank {rank} lost rank" in message, answer
        assert "process group" in message and f"({world} processes)" in message
        if world < 4:  # all of them are neighbours
            assert f"lost rank {victim} of" in message, message


@pytest.mark.parametrize("during", ["siglip", "clip"])
def test_killed_process_is_reported(during):
    check_killed(3, 1, during)


@pytest.mark.slow
@pytest.mark.parametrize("run", range(20))
def test_killed_process_is_always_reported(run):
    check_killed(2 + run % 3, run % 2, ("siglip", "clip")[run // 10])


def peak_of_step(rows: int) -> int:
    """Bytes that a step of this process adds, of what is alive: freed memory goes back at once."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    return distributed.peak("SigLIP, ring", rows, 64)


@pytest.mark.alone
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_flat_in_the_number_of_processes():
    two, four, small = (
        max(processes().run(w, peak_of_step, rows)) for w, rows in ((2, 2048), (4, 2048), (4, 512))
    )
    assert four < two + 2**18, (two, four)  # half a block
    assert two < 20e6 and small < two / 4 + 2**20, (two, small)


def twice() -> tuple[Tensor, Tensor]:
    """A gradient of a graph that is kept, before its values are overwritten, and of it again."""
    inputs = leaves([3, 3], dist.get_rank())
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    loss = 3 * tw.nn.SigLipLoss(**place)(*inputs[:4])
    (first,) = torch.autograd.grad(loss, inputs[0], retain_graph=True)
    kept = first.clone()
    first.zero_()
    return kept, torch.autograd.grad(loss, inputs[0])[0]


def test_a_graph_that_is_kept_has_the_same_gradients_again():
    for first, second in processes().run(2, twice):
        assert torch.equal(first, second) and first.any()


def changed_in_place() -> list[bool]:
    """A loss and its gradients are tensors of their own: nothing else sees them change."""
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    found = []
    for module, count in ((tw.nn.SigLipLoss(**place), 4), (tw.nn.ClipLoss(**place), 3)):
        inputs = [x.detach().double().requires_grad_() for x in leaves([3, 3], place["rank"])]
        loss = module(*inputs[:count])
        other = loss.detach() * torch.ones((), requires_grad=True)
        gradients = torch.autograd.grad(loss, inputs[:3])
        other.backward()  # which kept the value that it was made of
        loss = module(*inputs[:count])
        loss += inputs[0].sum()
        found += [x.detach_().add_(1).isfinite().all().item() for x in gradients]
    return found


def test_losses_and_gradients_may_be_changed_in_place():
    for found in processes().run(2, changed_in_place):
        assert len(found) == 6 and all(found)
