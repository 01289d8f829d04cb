"""The score function estimator, which needs no derivative of f, and its baselines."""

import torch
from torch import Tensor, nn

from tilewise import _numbers
from tilewise.estimators import _samples
from tilewise.estimators._distributions import Distribution, Gaussian
from tilewise.ops import _arguments
from tilewise.reference._precision import accumulate_dtype


class MovingAverage(nn.Module):
    """The mean of f over past calls, as a baseline: what is expected before samples are drawn.

        m <- decay m + (1 - decay) mean f,    baseline m / (1 - decay^calls)

    Args:
        decay: of what is older, from 0 to 1.

    Its two numbers are buffers: they move and are saved with a module that has it. 0 at first.
    """

    mean: Tensor
    calls: Tensor

    def __init__(self, decay: float = 0.9):
        super().__init__()
        self.decay = _numbers.between("decay", decay, 0, 1)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        """The baseline."""
        return self.mean / (1 - self.decay**self.calls).clamp(min=1e-12)

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Counts new values of f, of any shape."""
        self.mean.lerp_(values.detach().mean().to(self.mean), 1 - self.decay)
        self.calls += 1


def score_function(
    f: _samples.Function,
    distribution: Distribution,
    num_samples: int = 1,
    *,
    baseline: str | float | Tensor | MovingAverage | None = None,
    seed: Tensor | int | None = None,
) -> Tensor:
    r"""REINFORCE: samples that did well become more likely.

        d/dtheta E f(y) = E (f(y) - b) d/dtheta log p(y)

    Unbiased for every f, differentiable or not, and every baseline b that does not depend on the
    sample it is used for: E d/dtheta log p = 0.

    Args:
        f: of samples (S, B, ...), one-hot for a `Categorical`, gives (S, B). It is called once,
            with constants; where it has parameters, these get their gradient.
        distribution: a `Categorical` or a `Gaussian`.
        num_samples: S.
        baseline: None; "leave_one_out", the mean of the other samples of the row, for S >= 2; a
            `MovingAverage`; or a number or a tensor that broadcasts to (S, B). One that requires a
            gradient is learned: the backward pass also gives it the gradient of (f - b)^2 / 2.
        seed: an int or an int64 tensor of one element; equal seeds give equal samples. None draws
            one from torch's default generator.

    Returns:
        (B,), the mean of f over the samples.

    Cost: f forward for each sample; backward only if it has parameters.

    Raises:
        ValueError, TypeError: an argument of the wrong type, shape or dtype, named in the text.

    Paper: Williams, Simple Statistical Gradient-Following Algorithms for Connectionist
    Reinforcement Learning, Machine Learning 1992; leave-one-out: Kool, van Hoof and Welling, Buy 4
    REINFORCE Samples, Get a Baseline for Free!, 2019; learned: Mnih and Gregor, ICML 2014.
    """
    seed = _arguments.seed(seed, distribution[0].device)
    if isinstance(distribution, Gaussian):
        sample, mean, logvar = _samples.normal(distribution, num_samples, seed, "score_function")
        sample = sample.detach()
        log_prob = _samples.row_sum(_log_density(sample, mean, logvar))
    else:
        logits = _samples.logits_of(distribution, num_samples, "score_function")
        sample = _samples.one_hot(logits, seed)
        log_prob = _samples.log_prob(logits[0], sample)
    values = _samples.values(f, sample)
    expected = _baseline(baseline, values.detach())
    score = (values - expected).detach() * log_prob
    result = values + _samples.for_gradient(score)
    if isinstance(expected, Tensor) and expected.requires_grad:
        error = (values.detach() - expected).square() / 2
        result = result + _samples.for_gradient(error)
    return result.mean(0)


def _log_density(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """But for a constant."""
    wide = accumulate_dtype(mean)
    z, mean, logvar = z.to(wide), mean.to(wide), logvar.to(wide)
    return -((z - mean).square() * torch.exp(-logvar) + logvar) / 2


def _baseline(
    baseline: str | float | Tensor | MovingAverage | None, values: Tensor
) -> Tensor | float:
    """What is subtracted from the values (S, B)."""
    if baseline is None:
        return 0.0
    if isinstance(baseline, MovingAverage):
        expected = baseline().clone()
        baseline.update(values)
        return expected
    if isinstance(baseline, str):
        if baseline != "leave_one_out":
            raise ValueError(f'baseline: expected "leave_one_out", got {baseline!r}')
        others = len(values) - 1
        if not others:
            raise ValueError("num_samples: expected at least 2 for leave_one_out, got 1")
        return (values.sum(0) - values) / others
    if not isinstance(baseline, Tensor):
        return _numbers.real("baseline", baseline)
    try:
        return baseline.expand(values.shape)
    except RuntimeError:
        raise ValueError(
            f"baseline: expected to broadcast to {tuple(values.shape)}, "
            f"got {tuple(baseline.shape)}"
        ) from None
