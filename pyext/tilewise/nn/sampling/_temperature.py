"""The temperature of relaxed samples: constant, on a schedule, or learned."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tilewise._numbers import integer, real, version
from tilewise.nn._precision import without_halving

Schedule = Callable[[int], float]


class Temperature(nn.Module):
    """A temperature that its module reads in every call.

    It is a tensor, so that torch.compile does not compile again when it changes, and a GPU is not
    waited for.

    Args:
        tau: its value, or a schedule: a function of the number of steps taken.
        learnable_tau: whether it is a parameter, whose logarithm learns.

    State dict: `tau` () float32 and, with a schedule, `step_count` () int64; or if it learns,
    `log_tau` () float32. A state dict without them leaves them as they are: others have none.
    `.half()` leaves them in float32, where one step of a schedule is not lost.
    """

    tau: Tensor
    step_count: Tensor

    def __init__(self, tau: float | Schedule, learnable_tau: bool):
        super().__init__()
        self.schedule = tau if callable(tau) else None
        if learnable_tau and self.schedule is not None:
            raise ValueError("learnable_tau: expected False beside a schedule, got True")
        self._first = _first(tau)
        if learnable_tau and self._first == 0:
            raise ValueError("tau: expected more than 0 to learn from, got 0")
        value = torch.tensor(self._first, dtype=torch.float32)
        self.log_tau = nn.Parameter(value.log()) if learnable_tau else None
        if not learnable_tau:
            self.register_buffer("tau", value)
        if self.schedule is not None:
            self.register_buffer("step_count", torch.tensor(0))
            self._remember(0)

    def value(self) -> Tensor:
        """() float32: a copy, because `step` may write before the backward pass reads."""
        return self.tau.clone() if self.log_tau is None else self.log_tau.exp()

    @torch.no_grad()
    def set(self, tau: float | Tensor) -> None:
        """Gives it a new value, until the next step of a schedule."""
        if self.log_tau is None:
            self.tau.copy_(torch.as_tensor(checked(tau)))
        else:
            self.log_tau.copy_(torch.as_tensor(checked(tau)).log())

    def step(self, count: int | None = None) -> None:
        """Takes the value that the schedule has after one more step, or after `count` steps."""
        if self.schedule is None:
            raise RuntimeError("step: expected tau to be a schedule, got a constant or a parameter")
        count = self._steps() + 1 if count is None else integer("count", count, least=0)
        self.tau.fill_(checked(float(self.schedule(count))))
        self.step_count.fill_(count)
        self._remember(count)

    def _steps(self) -> int:
        """What `step_count` says; only if someone else wrote it is a GPU asked, and waited for."""
        tensor, written, count = self._known
        if tensor is self.step_count and written == version(tensor):
            return count
        return int(self.step_count)

    def _remember(self, count: int) -> None:
        self._known = self.step_count, version(self.step_count), count

    def _apply(self, fn, recurse=True):
        super()._apply(without_halving(fn), recurse)
        if _leaves_out_values(fn):  # and a state dict of others will not fill it
            self._begin()
        return self

    @torch.no_grad()
    def _begin(self) -> None:
        self.set(self._first)
        if self.schedule is not None:
            self.step_count.zero_()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *args):
        already = len(missing)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)
        assigned = metadata.get("assign_to_params_buffers", False)
        if not (assigned and self.value().is_meta):  # then nothing else gives it a value
            del missing[already:]

    def extra_repr(self) -> str:
        kind = "learnable" if self.log_tau is not None else self.schedule or "constant"
        return str(kind)


class HasTemperature(nn.Module):
    """A module with a `temperature`, which can be assigned a number, as taming's schedulers do."""

    temperature: Temperature

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "temperature" and not isinstance(value, nn.Module):
            self.temperature.set(value)
        else:
            super().__setattr__(name, value)

    @property
    def tau(self) -> Tensor:
        """The temperature, () float32. `module.tau = 0.5` sets it."""
        return self.temperature.value()

    @tau.setter
    def tau(self, value: float) -> None:
        self.temperature.set(value)

    def step(self, count: int | None = None) -> None:
        """Lets the schedule of the temperature take one step, or go to step `count`."""
        self.temperature.step(count)


def _first(tau: float | Schedule) -> float:
    """The temperature at step 0."""
    if callable(tau):
        tau = tau(0)
    elif isinstance(tau, Tensor):
        raise TypeError("tau: expected a float or a schedule, got Tensor")
    return float(checked(tau, "a float or a schedule"))


def _leaves_out_values(fn) -> bool:
    """Whether it is `to_empty`'s: what it makes of a tensor without values can't have any."""
    try:
        return not fn(torch.empty((), device="meta")).is_meta
    except RuntimeError:  # values can't be copied out of there
        return False


def checked(tau, expected: str = "a tensor or a float"):
    """A temperature that is not below 0. A tensor is not looked at: that would stall a GPU."""
    if isinstance(tau, Tensor):
        return tau
    try:
        tau = real("tau", tau)
    except TypeError:
        raise TypeError(f"tau: expected {expected}, got {type(tau).__name__}") from None
    if not tau >= 0:
        raise ValueError(f"tau: expected at least 0, got {tau}")
    return float(tau)
