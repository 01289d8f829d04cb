"""nn.grad_cache: the gradients of the whole batch, with one micro-batch's activations."""

import copy
import datetime
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tilewise as tw
from benchmarks.harness.measure import peak_bytes
from tests.common.budget import assert_within_budget
from tests.common.contrastive_cases import DEVICE


def tower(width: int = 12, dim: int = 8, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, dim), Unit()
    )


class Unit(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=-1)


class Scaled(nn.Module):
    """A loss that learns its scale and bias."""

    def __init__(self):
        super().__init__()
        self.log_scale, self.bias = (nn.Parameter(torch.tensor(x)) for x in (1.0, -2.0))

    def forward(self, image, text):
        return tw.sigmoid_loss(image, text, self.log_scale.exp(), self.bias)


class Clip(nn.Module):
    """Both towers in one module, which returns what open_clip's do."""

    def __init__(self, output_dict: bool, dropout: float = 0.0):
        super().__init__()
        self.image, self.text = tower(dropout=dropout), tower(5)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.output_dict = output_dict

    def forward(self, image, text):
        results = self.image(image), self.text(text["tokens"]), self.logit_scale.exp()
        names = "image_features", "text_features", "logit_scale"
        return dict(zip(names, results, strict=True)) if self.output_dict else results


def pictures(rows: int = 22, seed: int = 0):
    torch.manual_seed(seed)
    return torch.randn(rows, 12), torch.randn(rows, 5)


def gradients(*modules: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{i}.{name}": p.grad for i, m in enumerate(modules) for name, p in m.named_parameters()
    }


def trained(dtype: torch.dtype, micro_batch: int | None):
    torch.manual_seed(0)
    modules = [tower(), tower(5), Scaled()]
    for module in modules:
        module.to(dtype)
    inputs = [x.to(dtype) for x in pictures()]
    if micro_batch is None:
        value = modules[2](*(m(x) for m, x in zip(modules[:2], inputs, strict=True)))
        value.backward()
    else:
        value = tw.nn.grad_cache(modules[:2], modules[2], *inputs, micro_batch=micro_batch)
        assert not value.requires_grad
    return {"loss": value.detach(), **gradients(*modules)}


@pytest.mark.parametrize("micro_batch", [1, 5, 11, 22, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_of_the_whole_batch(dtype, micro_batch):
    """Within the error of the step without it; 22 rows, so that the last is smaller."""
    with tw.backend("reference"):
        truth = trained(torch.float64, None)
    whole, ours = trained(dtype, None), trained(dtype, micro_batch)
    magnitude = {name: float(x.abs().max()) for name, x in truth.items()}
    assert_within_budget(ours, whole, truth, magnitude)


@pytest.mark.parametrize("output_dict", [False, True])
def test_one_module_with_a_scale_among_its_results(output_dict):
    """Inputs in a dictionary; the scale's gradient counts once, not once a micro-batch."""
    image, text = pictures()
    text = {"tokens": text, "nothing": None, "length": 5}
    results = []
    for cached in (False, True):
        torch.manual_seed(1)
        model, loss = Clip(output_dict), tw.nn.ClipLoss()
        if cached:
            value = tw.nn.grad_cache(model, loss, image, text, micro_batch=8)
        else:
            found = model(image, text)
            value = loss(**found) if output_dict else loss(*found)
            value.backward()
        results.append({"loss": value.detach(), **gradients(model)})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-5, atol=1e-6)


def test_dropout_is_the_same_in_both_passes():
    """Then the gradients are those of the features that the loss has seen."""
    image, text = pictures()
    results = []
    for cached in (False, True):
        torch.manual_seed(1)
        model, loss = Clip(False, dropout=0.5), tw.nn.ClipLoss()
        torch.manual_seed(2)
        if cached:
            tw.nn.grad_cache(model, loss, image, {"tokens": text}, micro_batch=8)
        else:
            parts = [
                model(x, {"tokens": y}) for x, y in zip(image.split(8), text.split(8), strict=True)
            ]
            features = [torch.cat([part[k] for part in parts]) for k in range(2)]
            loss(*features, parts[0][2]).backward()
        results.append([*gradients(model).values(), torch.rand(3)])  # and what is drawn later
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_autocast():
    """Its casts of weights are made anew in the second pass: those of the first are constants."""
    image, text = pictures()
    results = []
    for micro_batch in (None, 8):
        torch.manual_seed(1)
        modules = [tower(), tower(5), Scaled()]
        with torch.autocast(DEVICE, torch.bfloat16):
            if micro_batch is None:
                modules[2](modules[0](image), modules[1](text)).backward()
            else:
                tw.nn.grad_cache(modules[:2], modules[2], image, text, micro_batch=micro_batch)
        results.append(gradients(*modules))
    for name, expected in results[0].items():
        assert results[1][name].dtype == torch.float32
        torch.testing.assert_close(results[1][name], expected, rtol=0.05, atol=2e-3)


def test_gradients_are_scaled_and_added():
    """By a scaler; to what is there already."""
    image, text = pictures()
    modules = [tower(), tower(5), Scaled()]
    step = dict(micro_batch=8)
    value = tw.nn.grad_cache(modules[:2], modules[2], image, text, **step)
    once = {name: x.clone() for name, x in gradients(*modules).items()}
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    again = tw.nn.grad_cache(modules[:2], modules[2], image, text, scaler=scaler, **step)
    assert torch.equal(value, again)
    for name, x in gradients(*modules).items():
        torch.testing.assert_close(x, 5 * once[name])


def test_a_frozen_tower_runs_once():
    image, text = pictures()
    locked, learning, loss = tower().requires_grad_(False), tower(5), Scaled()
    calls = {locked: 0, learning: 0}

    def count(module, inputs, output):
        calls[module] += 1

    for module in calls:
        module.register_forward_hook(count)
    tw.nn.grad_cache([locked, learning], loss, image, text, micro_batch=10)
    assert list(calls.values()) == [3, 6]
    assert all(p.grad is not None for m in (learning, loss) for p in m.parameters())
    with torch.no_grad():
        value = tw.nn.grad_cache([locked, learning], loss, image, text, micro_batch=10)
    assert list(calls.values()) == [6, 9] and not value.requires_grad


def test_functions_are_towers_too():
    """The second of them does not learn, which shows in its second pass only."""
    image, text = pictures()
    learning, locked = tower(), tower(5).requires_grad_(False)
    towers = [lambda x: learning(x), lambda x: (locked(x),)[0]]
    tw.nn.grad_cache(towers, Scaled(), image, text, micro_batch=8)
    assert all(p.grad is not None for p in learning.parameters())


def test_buffers_move_once():
    """One module for both towers: each micro-batch is normalised by itself, in both passes."""
    x, y = (torch.randn(20, 6) * 3 + 1 for _ in range(2))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    expected = copy.deepcopy(model)
    tw.nn.grad_cache([model, model], lambda a, b: tw.clip_loss(a, b, 2.0), x, y, micro_batch=5)
    features = [torch.cat([expected(part) for part in z.split(5)]) for z in (x, y)]
    tw.clip_loss(*features, 2.0).backward()
    for ours, theirs in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_a_queue_moves_once():
    image, text = pictures()
    towers, loss = [tower(), tower(5)], tw.nn.ItcLoss(8, queue_size=64)
    teachers = [copy.deepcopy(t).requires_grad_(False) for t in towers]
    targets = [t(x) for t, x in zip(teachers, (image, text), strict=True)]
    tw.nn.grad_cache(towers, lambda x, y: loss(x, y, *targets), image, text, micro_batch=6)
    assert int(loss.queue_pointer) == 22 and loss.temperature.grad is not None


def test_bad_arguments_are_named():
    x, y = pictures(6)
    towers, loss = [tower(), tower(5)], Scaled()
    for arguments, size, error, message in [
        ((x,), 2, ValueError, "inputs: expected 2, one a tower, got 1"),
        ((x, ["a", "b"]), 2, TypeError, "inputs: expected tensors.*got str"),
        ((x, {"a": y, "b": y[:4]}), 2, ValueError, r"inputs: .*as many rows.*\[4, 6\]"),
        ((x, 3), 2, ValueError, r"inputs: .*as many rows.*\[\]"),
        ((x, y.clone().requires_grad_()), 2, ValueError, "inputs: .*gradient"),
        ((x, y), 0, ValueError, "micro_batch: .*at least 1.*0"),
        ((x, y), 2.5, TypeError, "micro_batch: .*float"),
    ]:
        with pytest.raises(error, match=f"^{message}"):
            tw.nn.grad_cache(towers, loss, *arguments, micro_batch=size)


def prepare(rows: int, micro_batch: int):
    torch.manual_seed(0)
    wide = [nn.Sequential(nn.Linear(64, 1024), nn.GELU(), nn.Linear(1024, 64)) for _ in range(2)]
    inputs = [torch.randn(rows, 64) for _ in range(2)]
    loss = Scaled()
    tw.nn.grad_cache(wide, loss, *(x[:8] for x in inputs), micro_batch=4)  # gradients are there
    return lambda: tw.nn.grad_cache(wide, loss, *inputs, micro_batch=micro_batch)


@pytest.mark.alone
def test_memory_is_that_of_a_micro_batch():
    """The whole batch's activations would take 100 MB for each tower."""
    small, large = (peak_bytes(prepare, rows=rows, micro_batch=512) for rows in (512, 8192))
    features = 8192 * 64 * 4
    assert large - small < 8 * features + 20e6 < 40e6


# DistributedDataParallel


def reductions(model: DistributedDataParallel) -> list[int]:
    """A list that grows with every bucket that is reduced."""
    found: list[int] = []

    def hook(state, bucket):
        found.append(bucket.index())
        work = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return work.then(lambda future: future.value()[0] / 2)

    model.register_comm_hook(None, hook)
    return found


def step(rank: int, micro_batch: int | None, shared: bool):
    """Gradients after one step of a process's own batch, of another size in each."""
    torch.manual_seed(0)
    model = DistributedDataParallel(tower(5) if shared else Clip(False))
    count = reductions(model)
    image, text = pictures(16 + 3 * rank, seed=rank)
    inputs, towers, loss = (image, {"tokens": text}), model, tw.nn.ClipLoss()
    if shared:
        inputs, towers, loss = (text, text + 1), [model, model], Scaled().requires_grad_(False)
    if micro_batch is not None:
        tw.nn.grad_cache(towers, loss, *inputs, micro_batch=micro_batch)
    elif shared:
        loss(model(inputs[0]), model(inputs[1])).backward()
    else:
        loss(*model(*inputs)).backward()
    return gradients(model), len(count)


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),  # a process that waits for nobody fails
    )
    results = [step(rank, size, shared) for shared in (False, True) for size in (None, 5)]
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo, on CPU tensors")
def test_processes_reduce_once(tmp_path: Path):
    """Four and five micro-batches; then one module for both towers."""
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for whole, cached in (ranks[0][:2], ranks[0][2:]):
        assert whole[1] == cached[1] == 1
        for name, expected in whole[0].items():
            torch.testing.assert_close(cached[0][name], expected, rtol=1e-5, atol=1e-6)
    for first, second in zip(*ranks, strict=True):
        assert all(torch.equal(x, second[0][name]) for name, x in first[0].items())
