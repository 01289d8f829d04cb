"""GumbelSoftmax: relaxed categorical samples, with a temperature that a schedule lowers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from tilewise.nn import _sync
from tilewise.nn.sampling._temperature import HasTemperature, Schedule, Temperature
from tilewise.ops.gumbel_softmax import gumbel_softmax

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


class GumbelSoftmax(HasTemperature):
    r"""Samples from the categorical distribution of the logits, relaxed or one-hot.

        y = softmax((logits + g) / tau),    g Gumbel noise

    `tilewise.gumbel_softmax` with its temperature as the module's state. Like
    `torch.nn.functional.gumbel_softmax` it draws in evaluation as well as in training; for the most
    likely category, take the argmax of the logits.

    Args:
        tau: the temperature, >= 0, or a schedule of it: any function from the number of steps to a
            temperature, as `ExponentialSchedule`, `LinearSchedule` and `CosineSchedule` are.
        hard: return one-hot vectors, with the gradient of the relaxed sample (straight-through).
        dim: of the categories.
        learnable_tau: make the temperature a parameter. What learns is its logarithm, so that it
            stays positive; a weight decay would pull tau to 1.
        group: processes that draw what one would with the rows of all, in the order of their ranks:
            the first one's seed, and a row offset for each. All must then call it. The categories
            may not be the dimension that the rows are divided by. None: each draws for itself.

    Raises:
        ValueError, TypeError: tau below 0, or of another type; `learnable_tau` beside a schedule.

    State dict: `temperature.tau` () float32 and, with a schedule, `temperature.step_count` ()
    int64, so that a run goes on where it stopped; or `temperature.log_tau` () float32 if it learns.

    Paper: Jang, Gu and Poole, Categorical Reparameterization with Gumbel-Softmax, ICLR 2017.

    Example:
        >>> sample = tw.nn.GumbelSoftmax(tau=tw.nn.ExponentialSchedule(rate=1e-4), hard=True)
        >>> for batch in batches:
        ...     loss(sample(model(batch))).backward()
        ...     optimizer.step()
        ...     sample.step()
    """

    __call__: Callable[..., Tensor]  # nn.Module's returns Any

    def __init__(
        self,
        tau: float | Schedule = 1.0,
        hard: bool = False,
        dim: int = -1,
        learnable_tau: bool = False,
        *,
        group: ProcessGroup | None = None,
    ):
        super().__init__()
        self.hard, self.dim, self.group = hard, dim, group
        self.temperature = Temperature(tau, learnable_tau)

    def forward(
        self, logits: Tensor, seed: Tensor | int | None = None, row_offset: int = 0
    ) -> Tensor:
        """A sample like the logits; arguments and errors as in `tilewise.gumbel_softmax`."""
        if self.group is not None:
            rows = logits.numel() // max(logits.shape[self.dim], 1)
            seed, first = _sync.place_in_stream(
                "tilewise.nn.GumbelSoftmax", rows, seed, logits.device, self.group
            )
            row_offset += first
        return gumbel_softmax(
            logits, self.tau, self.hard, dim=self.dim, seed=seed, row_offset=row_offset
        )

    def extra_repr(self) -> str:
        return f"hard={self.hard}, dim={self.dim}"


@dataclass(frozen=True)
class ExponentialSchedule:
    """tau = max(end, start * exp(-rate * step)).

    Args:
        start: tau at step 0.
        end: the lowest tau.
        rate: in Jang et al. 1e-5 to 1e-4 a step; a factor f for each step is a rate of -log(f).
    """

    start: float = 1.0
    end: float = 0.5
    rate: float = 1e-4

    def __call__(self, step: int) -> float:
        return max(self.end, self.start * math.exp(-self.rate * step))


@dataclass(frozen=True)
class LinearSchedule:
    """tau on a straight line from `start` to `end` in `steps` steps, then `end`."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * _part(step, self.steps)


@dataclass(frozen=True)
class CosineSchedule:
    """tau on half a cosine from `start` to `end` in `steps` steps, then `end`.

    The default is that of DALL-E's autoencoder: Ramesh et al., Zero-Shot Text-to-Image Generation,
    ICML 2021.
    """

    start: float = 1.0
    end: float = 1 / 16
    steps: int = 150_000

    def __call__(self, step: int) -> float:
        remains = (1 + math.cos(math.pi * _part(step, self.steps))) / 2
        return self.end + (self.start - self.end) * remains


def _part(step: int, steps: int) -> float:
    """How much of a schedule is over, from 0 to 1."""
    return min(max(step / steps, 0.0), 1.0) if steps > 0 else 1.0
