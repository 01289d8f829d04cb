"""A step of each op and module, forward and backward, as tests of devices run it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import tilewise as tw

Step = Callable[[], tuple[Tensor, ...]]
DIM = 64


def rows(n: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Unit rows, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, DIM, generator=generator, device="cpu")
    return F.normalize(x, dim=1).to(device, dtype)


def with_gradients(call: Callable[[], Tensor], *inputs: Tensor) -> Step:
    def step() -> tuple[Tensor, ...]:
        result = call()
        gradients = torch.autograd.grad(result, inputs, torch.ones_like(result))
        return result.detach(), *gradients

    return step


def loss_step(function: Callable, n: int, device: str, dtype: torch.dtype, **options) -> Step:
    image, text = (rows(n, device, dtype, seed).requires_grad_() for seed in (1, 2))
    scale = torch.tensor(10.0, device=device, requires_grad=True)
    return with_gradients(
        lambda: function(image, text, scale, **options), image, text, scale
    )


def itc_step(n: int, device: str) -> Step:
    query, keys, teacher, queue = (
        rows(size, device, torch.bfloat16, seed)
        for seed, size in enumerate((n, n, n, 3 * n + 7))
    )
    query.requires_grad_()
    scale = torch.tensor(14.0, device=device, requires_grad=True)
    return with_gradients(
        lambda: tw.itc_loss(query, keys, scale, queue=queue, teacher_query=teacher), query, scale
    )


def negatives_step(n: int, device: str) -> Step:
    image, text = rows(n, device, torch.bfloat16, 1), rows(n, device, torch.bfloat16, 2)
    scale = torch.tensor(10.0, device=device)
    seed = torch.tensor(3, device=device)
    return lambda: tuple(tw.hard_negatives(image, text, scale, seed=seed))


def search_step(n: int, device: str, metric: str) -> Step:
    x, codebook = rows(n, device, seed=1), rows(max(n // 4, 1), device, seed=2)
    return lambda: tuple(tw.nearest_code(x, codebook, metric))


def sums_step(n: int, device: str) -> Step:
    x, index = rows(n, device), torch.arange(n, device=device) * 7919 % (n // 8 + 1)
    return lambda: tuple(tw.code_sums(x, index, n // 8 + 1))


def sample_step(n: int, device: str, hard: bool) -> Step:
    logits, tau = rows(n, device).requires_grad_(), torch.tensor(0.7, device=device)
    seed = torch.tensor(3, device=device)
    return with_gradients(
        lambda: tw.gumbel_softmax(logits, tau, hard, seed=seed), logits
    )


def draw_step(n: int, device: str) -> Step:
    logits, seed = rows(n, device), torch.tensor(3, device=device)
    return lambda: (tw.gumbel_argmax(logits, k=3, seed=seed),)


def gaussian_step(n: int, device: str) -> Step:
    mean, logvar = rows(n, device, seed=1).requires_grad_(), rows(n, device, seed=2)
    seed = torch.tensor(3, device=device)
    return with_gradients(lambda: tw.gaussian_sample(mean, logvar, seed=seed)[0], mean)


# By name: a step of n rows on a device.
STEPS: dict[str, Callable[[int, str], Step]] = {
    "sigmoid_loss": lambda n, d: loss_step(tw.sigmoid_loss, n, d, torch.bfloat16),
    "sigmoid_loss float32": lambda n, d: loss_step(tw.sigmoid_loss, n, d, torch.float32),
    "clip_loss": lambda n, d: loss_step(tw.clip_loss, n, d, torch.bfloat16),
    "clip_loss float16 smoothed": lambda n, d: loss_step(
        tw.clip_loss, n, d, torch.float16, label_smoothing=0.1
    ),
    "info_nce": lambda n, d: loss_step(tw.info_nce, n, d, torch.bfloat16),
    "itc_loss": itc_step,
    "hard_negatives": negatives_step,
    "nearest_code l2": lambda n, d: search_step(n, d, "l2"),
    "nearest_code cosine": lambda n, d: search_step(n, d, "cosine"),
    "code_sums": sums_step,
    "gumbel_softmax": lambda n, d: sample_step(n, d, False),
    "gumbel_softmax hard": lambda n, d: sample_step(n, d, True),
    "gumbel_argmax": draw_step,
    "gaussian_sample": gaussian_step,
}
