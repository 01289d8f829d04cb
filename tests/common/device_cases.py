"""A step of each op and module, forward and backward, as tests of devices run it."""

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import tilewise as tw
from tilewise import _backend

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


# Modules


def module_step(
    module: torch.nn.Module, device: str, call: Callable[..., object], *inputs: Tensor
) -> Step:
    """A training step from the same state each time: results, gradients, and the state after it."""
    module.to(device).train()
    first = {name: x.clone() for name, x in module.state_dict().items()}

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            for name, x in module.state_dict().items():
                x.copy_(first[name])
        made = call(module)
        results = tuple(made) if isinstance(made, tuple) else (made,)
        ends = [x for x in results if x.requires_grad]
        wanted = [x for x in (*inputs, *module.parameters()) if x.requires_grad]
        gradients = torch.autograd.grad(ends, wanted, [torch.ones_like(x) for x in ends])
        state = [x.clone() for x in module.state_dict().values()]
        return *(x.detach() for x in results), *gradients, *state

    return step


def made_on_the_cpu(make: Callable[..., torch.nn.Module], *args, **options) -> torch.nn.Module:
    """With the same weights on every device."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        return make(*args, **options)


def loss_module(n: int, device: str, make: Callable, *scalars: float) -> Step:
    image, text = (rows(n, device, torch.bfloat16, seed).requires_grad_() for seed in (1, 2))
    numbers = [torch.tensor(x, device=device) for x in scalars]
    return module_step(make(), device, lambda m: m(image, text, *numbers), image, text)


def itc_module(n: int, device: str) -> Step:
    loss = made_on_the_cpu(tw.nn.ItcLoss, DIM, queue_size=2 * n + 5)
    image, text, *teacher = (rows(n, device, torch.bfloat16, seed) for seed in range(4))
    image.requires_grad_(), text.requires_grad_()
    ids = torch.arange(n, device=device) // 2
    return module_step(loss, device, lambda m: m(image, text, *teacher, ids), image, text)


def quantizer_step(n: int, device: str, make: Callable, *args, **options) -> Step:
    quantizer = made_on_the_cpu(make, *args, **options)
    x = rows(n, device).unsqueeze(0).requires_grad_()
    return module_step(quantizer, device, lambda m: m(x), x)


def gumbel_quantizer_step(n: int, device: str) -> Step:
    quantizer = made_on_the_cpu(tw.nn.GumbelQuantizer, DIM, 96)
    x, seed = rows(n, device).unsqueeze(0).requires_grad_(), torch.tensor(3, device=device)
    return module_step(quantizer, device, lambda m: m(x, seed=seed), x)


def gumbel_module(n: int, device: str) -> Step:
    logits, seed = rows(n, device).requires_grad_(), torch.tensor(3, device=device)
    sample = tw.nn.GumbelSoftmax(0.7, learnable_tau=True)
    return module_step(sample, device, lambda m: m(logits, seed), logits)


def posterior_step(n: int, device: str) -> Step:
    parameters = rows(n, device).view(n, 4, 4, 4).requires_grad_()
    seed = torch.tensor(3, device=device)

    def call():
        posterior = tw.nn.DiagonalGaussian(parameters)
        return posterior.sample(seed=seed).sum((1, 2, 3)) + posterior.kl()

    return with_gradients(call, parameters)


def in_small_chunks(monkeypatch, n: int) -> None:
    """Makes steps of n rows go through several chunks, on every device."""
    for op in _backend.ops():
        kernels = importlib.import_module(f"tilewise.kernels.{op}")
        for name in CHUNKS:
            if hasattr(kernels, name):
                monkeypatch.setattr(kernels, name, CHUNKS[name](n))


# Globals that bound a chunk: about half of n rows, and for losses half as many columns.
CHUNKS: dict[str, Callable[[int], int]] = {
    "CHUNK_ROWS": lambda n: max(n // 2, 64), "CHUNK_COLS": lambda n: max(n // 2, 64),
    "CHUNK_BYTES": lambda n: n * n // 2, "WORKSPACE_BYTES": lambda n: 128 * n,
}

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
    "nn.SigLipLoss": lambda n, d: loss_module(n, d, tw.nn.SigLipLoss, 10.0, -10.0),
    "nn.ClipLoss": lambda n, d: loss_module(n, d, tw.nn.ClipLoss, 10.0),
    "nn.InfoNCELoss": lambda n, d: loss_module(n, d, tw.nn.InfoNCELoss),
    "nn.ItcLoss": itc_module,
    "nn.VectorQuantizer": lambda n, d: quantizer_step(n, d, tw.nn.VectorQuantizer, DIM, 300),
    "nn.VectorQuantizer cosine, heads": lambda n, d: quantizer_step(
        n, d, tw.nn.VectorQuantizer, DIM, 300, 16, 4, separate_codebook_per_head=True,
        use_cosine_sim=True,
    ),
    "nn.ResidualVectorQuantizer": lambda n, d: quantizer_step(
        n, d, tw.nn.ResidualVectorQuantizer, dim=DIM, codebook_size=100, num_quantizers=3
    ),
    "nn.GroupedResidualVectorQuantizer": lambda n, d: quantizer_step(
        n, d, tw.nn.GroupedResidualVectorQuantizer, dim=DIM, groups=2, codebook_size=100,
        num_quantizers=2,
    ),
    "nn.GumbelQuantizer": gumbel_quantizer_step,
    "nn.GumbelSoftmax": gumbel_module,
    "nn.DiagonalGaussian": posterior_step,
}
