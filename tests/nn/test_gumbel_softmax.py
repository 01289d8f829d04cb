"""GumbelSoftmax, its temperature and the schedules of it."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

import tilewise as tw
from tests.common.contrastive_cases import DEVICE
from tests.common.quantizer_cases import CLOSE, NoHostReads, rows

EXPONENTIAL = tw.nn.ExponentialSchedule(start=1.0, end=0.5, rate=0.1)
LINEAR = tw.nn.LinearSchedule(start=2.0, end=0.5, steps=10)
COSINE = tw.nn.CosineSchedule(start=1.0, end=1 / 16, steps=8)


@pytest.mark.parametrize("settings", [
    dict(), dict(tau=0.3, hard=True), dict(dim=1, hard=True), dict(tau=0),
], ids=str)
def test_is_the_function(settings):
    module = tw.nn.GumbelSoftmax(**settings)
    x = rows(3, 4, 5)
    expected = tw.gumbel_softmax(x, seed=5, row_offset=7, **settings)
    for training in (True, False):  # draws in both
        assert torch.equal(module.train(training)(x, seed=5, row_offset=7), expected)
    torch.manual_seed(1)
    first, second = module(x), module(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(first, module(x))


def test_parts_of_a_batch_get_the_noise_of_the_whole():
    module, x = tw.nn.GumbelSoftmax(), rows(6, 9)
    parts = [module(part, seed=3, row_offset=2 * i) for i, part in enumerate(x.split(2))]
    assert torch.equal(torch.cat(parts), module(x, seed=3))


# Schedules


@pytest.mark.parametrize("schedule, expected", [
    (EXPONENTIAL, {0: 1.0, 3: math.exp(-0.3), 6: math.exp(-0.6), 7: 0.5, 10**9: 0.5}),
    (LINEAR, {0: 2.0, 1: 1.85, 5: 1.25, 10: 0.5, 11: 0.5}),
    (COSINE, {0: 1.0, 4: (1 + 1 / 16) / 2, 8: 1 / 16, 9: 1 / 16}),
    (tw.nn.LinearSchedule(1.0, 0.25, 0), {0: 0.25}),
], ids=str)
def test_schedules(schedule, expected):
    for step, tau in expected.items():
        assert schedule(step) == pytest.approx(tau, rel=1e-12)
    values = [schedule(step) for step in range(20)]
    assert values == sorted(values, reverse=True)
    assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_defaults_are_the_papers():
    assert tw.nn.ExponentialSchedule()(0) == 1.0 and tw.nn.ExponentialSchedule()(10**6) == 0.5
    assert tw.nn.CosineSchedule()(75_000) == pytest.approx((1 + 1 / 16) / 2)
    assert tw.nn.CosineSchedule()(150_000) == 1 / 16


@pytest.mark.parametrize("schedule", [EXPONENTIAL, LINEAR, COSINE, lambda step: 1 / (1 + step)])
def test_steps(schedule):
    module = tw.nn.GumbelSoftmax(schedule)
    for step in range(12):
        assert module.tau == torch.tensor(schedule(step))
        assert module.temperature.step_count == step
        module.step()
    module.step(3)
    assert module.tau == torch.tensor(schedule(3))
    module.step()
    assert module.tau == torch.tensor(schedule(4))


@pytest.mark.parametrize("schedule", [EXPONENTIAL, LINEAR, COSINE])
def test_a_run_resumes(schedule):
    module = tw.nn.GumbelSoftmax(schedule)
    module.step(), module.step()
    state = copy.deepcopy(module.state_dict())
    assert set(state) == {"temperature.tau", "temperature.step_count"}
    loaded = tw.nn.GumbelSoftmax(schedule)
    loaded.load_state_dict(state)
    assigned = tw.nn.GumbelSoftmax(schedule)
    assigned.load_state_dict(state, assign=True)
    for other in (loaded, assigned, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.tau == schedule(2)
        other.step()
        assert other.tau == torch.tensor(schedule(3)) and other.temperature.step_count == 3


def test_a_state_without_temperature_leaves_it():
    module = tw.nn.GumbelSoftmax(LINEAR)
    module.step()
    assert not module.load_state_dict({}).missing_keys
    assert module.tau == torch.tensor(LINEAR(1))


def test_tau_can_be_set():
    for module in (tw.nn.GumbelSoftmax(), tw.nn.GumbelSoftmax(learnable_tau=True)):
        module.tau = 0.25
        torch.testing.assert_close(module.tau.detach(), torch.tensor(0.25))
        with pytest.raises(ValueError, match="tau: expected at least 0, got -1"):
            module.tau = -1
        module.temperature = 0.5  # as taming's schedulers do
        torch.testing.assert_close(module.tau.detach(), torch.tensor(0.5))
        with pytest.raises(TypeError, match="tau: expected a tensor or a float, got str"):
            module.temperature = "0.5"


def test_numbers_of_numpy():
    for number in (np.float32(0.5), np.int64(1), np.array(0.25)):
        assert tw.nn.GumbelSoftmax(number).tau == float(number)


def test_steps_do_not_disturb_the_backward_pass():
    module, x = tw.nn.GumbelSoftmax(LINEAR, hard=True), rows(4, 8).requires_grad_()
    weight = rows(4, 8, seed=1)
    loss = (module(x, seed=1) * weight).sum()
    module.step()
    loss.backward()
    expected = torch.autograd.grad(
        (tw.gumbel_softmax(x, 2.0, hard=True, seed=1) * weight).sum(), x
    )[0]
    assert torch.equal(x.grad, expected)


# Learned temperature


def test_learnable_tau():
    module = tw.nn.GumbelSoftmax(0.7, learnable_tau=True)
    assert [name for name, _ in module.named_parameters()] == ["temperature.log_tau"]
    assert not list(tw.nn.GumbelSoftmax(0.7).parameters())
    x, weight = rows(5, 6), rows(5, 6, seed=1)
    (module(x, seed=2) * weight).sum().backward()
    tau = torch.tensor(0.7, requires_grad=True)
    (tw.gumbel_softmax(x, tau, seed=2) * weight).sum().backward()
    grad = module.temperature.log_tau.grad
    torch.testing.assert_close(grad, tau.grad * 0.7, **CLOSE)  # d tau / d log tau = tau
    optimiser = torch.optim.SGD(module.parameters(), lr=100.0)
    optimiser.step()
    assert module.tau >= 0
    other = tw.nn.GumbelSoftmax(learnable_tau=True)
    other.load_state_dict(module.state_dict())
    assert other.tau == module.tau


# As a module


@pytest.mark.parametrize("settings", [dict(tau=LINEAR), dict(tau=0.7, learnable_tau=True)], ids=str)
def test_half_precision_keeps_the_temperature(settings):
    module = tw.nn.GumbelSoftmax(**settings).to(torch.bfloat16)
    assert module.tau.dtype == torch.float32
    assert module(rows(3, 4).bfloat16()).dtype == torch.bfloat16
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert module(rows(3, 4)).dtype == torch.float32


def test_no_host_reads():
    module = tw.nn.GumbelSoftmax(LINEAR)
    seed = torch.tensor(1)
    with NoHostReads():
        module(rows(3, 4), seed=seed)
        module.step()


def test_new_temperatures_do_not_compile_again():
    torch._dynamo.reset()
    module = tw.nn.GumbelSoftmax(LINEAR, hard=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, seed = rows(4, 8).requires_grad_(), torch.tensor(3)
    compiled(x, seed=seed)
    for _ in range(3):
        module.step()
        with torch.compiler.set_stance("fail_on_recompile"):
            ours = torch.autograd.grad(compiled(x, seed=seed).square().sum(), x)[0]
        expected = torch.autograd.grad(module(x, seed=seed).square().sum(), x)[0]
        torch.testing.assert_close(ours, expected, **CLOSE)


def test_repr_shows_what_it_does():
    text = repr(tw.nn.GumbelSoftmax(LINEAR, hard=True))
    assert "hard=True" in text and "LinearSchedule(start=2.0, end=0.5, steps=10)" in text


@pytest.mark.parametrize("settings, error, text", [
    (dict(tau=-1), ValueError, "tau: expected at least 0, got -1"),
    (dict(tau=float("nan")), ValueError, "tau: expected at least 0, got nan"),
    (dict(tau="1"), TypeError, "tau: expected a float or a schedule, got str"),
    (dict(tau=True), TypeError, "tau: expected a float or a schedule, got bool"),
    (dict(tau=lambda step: -step - 1.0), ValueError, "tau: expected at least 0"),
    (dict(tau=LINEAR, learnable_tau=True), ValueError, "learnable_tau: expected False beside a"),
    (dict(tau=0, learnable_tau=True), ValueError, "tau: expected more than 0"),
])
def test_bad_arguments(settings, error, text):
    with pytest.raises(error, match=text):
        tw.nn.GumbelSoftmax(**settings)


def test_steps_need_a_schedule():
    with pytest.raises(RuntimeError, match="step: expected tau to be a schedule"):
        tw.nn.GumbelSoftmax().step()
    with pytest.raises(ValueError, match="count: expected at least 0, got -1"):
        tw.nn.GumbelSoftmax(LINEAR).step(-1)
