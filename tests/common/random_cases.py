"""Logits, means and variances that break random ops, and eager yardsticks with the same noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import tilewise as tw
from tests.common.contrastive_cases import DEVICE
from tilewise.reference import _philox

KERNELS = ["cpu", "triton"] if DEVICE == "cpu" else ["triton"]
BACKENDS = ["reference", *KERNELS]
OPERATORS = {"cpu": torch.ops.tilewise, "triton": torch.ops.tilewise_triton}
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
NAN, INF = float("nan"), float("inf")

EXACT = [name for name in BACKENDS if name != "triton"]  # they have float64, and cost little
backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
exact_backends = pytest.mark.parametrize("backend", EXACT, indirect=True)
cpu_backends = pytest.mark.parametrize("backend", [r for r in KERNELS if r == "cpu"], indirect=True)
kernels = pytest.mark.parametrize("backend", KERNELS, indirect=True)


def serve(request):
    """The body of the fixture `backend`: everything inside runs in the backend of its parameter."""
    with tw.backend(request.param):
        yield request.param


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Drawn on the CPU wherever the tests run, in float64."""
    generator = torch.Generator("cpu").manual_seed(seed)
    draws = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return draws.to(DEVICE)


def peaked(*shape: int, height: float) -> Tensor:
    x = normal(*shape)
    x[..., shape[-1] // 2] += height
    return x


def masked(*shape: int) -> Tensor:
    """-inf here and there; one element at least is left in each row, in the last row just one."""
    x = normal(*shape)
    x[normal(*shape, seed=1) < 0.5] = -INF
    x[..., 0] = 0.5
    x[-1, 1:] = -INF
    return x


def masked_tail(*shape: int) -> Tensor:
    """Padding: row i has 3 i + 1 elements that count."""
    x = normal(*shape)
    for i in range(shape[0]):
        x[i, 3 * i + 1 :] = -INF
    return x


def not_finite(*shape: int) -> Tensor:
    """Rows: only -inf, with a NaN, with +inf, with two, with NaN beside -inf; others are sound."""
    x = normal(*shape)
    x[0] = -INF
    x[1, 3] = NAN
    x[2, 2] = INF
    x[3, 1], x[3, 4] = INF, INF
    x[4], x[4, 0] = -INF, NAN
    return x


def strided(x: Tensor) -> Tensor:
    wide = x.new_full([3 * size for size in x.shape], NAN)
    inner = (slice(1, None, 3),) * x.dim()
    wide[inner] = x
    return wide[inner]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


@dataclass(frozen=True)
class Case:
    """Logits, made in float64, and how they are sampled; `layout` changes their strides."""

    name: str
    make: Callable[[], Tensor]
    tau: float = 1.0
    dim: int = -1
    layout: Callable[[Tensor], Tensor] = lambda x: x
    row_offset: int = 0

    def logits(self, dtype: torch.dtype) -> Tensor:
        return self.layout(self.make().to(dtype))

    @property
    def seed(self) -> int:
        return sum(map(ord, self.name)) - 1000

    @property
    def sampling(self) -> dict[str, int]:
        return dict(dim=self.dim, seed=self.seed, row_offset=self.row_offset)


CASES = [
    Case("typical", lambda: normal(4, 33)),
    Case("one-element", lambda: normal(1, 1)),
    Case("one-column", lambda: normal(5, 1)),
    Case("two-columns", lambda: normal(3, 2)),
    Case("seven", lambda: normal(7)),
    Case("1025", lambda: 3 * normal(3, 1025)),
    Case("wide", lambda: normal(2, 5000)),
    Case("no-rows", lambda: normal(0, 5)),
    Case("no-columns", lambda: normal(3, 0)),
    Case("nothing", lambda: normal(2, 0, 3), dim=0),
    Case("peaked", lambda: peaked(4, 33, height=30.0)),
    Case("very-peaked", lambda: peaked(4, 33, height=2000.0)),
    Case("ties", lambda: torch.zeros(4, 33, dtype=torch.float64, device=DEVICE)),
    Case("offset-up", lambda: normal(4, 33) + 1e4),
    Case("offset-down", lambda: normal(4, 33) - 1e4),
    Case("masked", lambda: masked(5, 33)),
    Case("masked-tail", lambda: masked_tail(5, 37)),
    Case("not-finite", lambda: not_finite(7, 19)),
    Case("cool", lambda: normal(4, 33), tau=0.1),
    Case("cold", lambda: normal(4, 33), tau=1e-3),
    Case("cold-masked", lambda: masked(5, 33), tau=1e-6),
    Case("hot", lambda: masked(5, 33), tau=30.0),
    Case("very-hot", lambda: masked(5, 33), tau=1e30),
    Case("expanded-rows", lambda: normal(1, 33), layout=lambda x: x.expand(5, -1)),
    Case("expanded-columns", lambda: normal(4, 1), layout=lambda x: x.expand(-1, 9)),
    Case("strided", lambda: normal(4, 33), layout=strided),
    Case("transposed", lambda: normal(4, 33), layout=transposed),
    *(Case(f"4d-dim{d}", lambda: normal(2, 3, 3, 5), dim=d) for d in (0, 1, 2, 3)),
    Case("4d-strided", lambda: normal(2, 3, 3, 5), dim=-3, layout=strided),
    Case("4d-permuted", lambda: normal(2, 3, 3, 5), dim=1, layout=transposed),
    Case("far-rows", lambda: normal(3, 33), row_offset=2**32 - 1),
    Case("negative-rows", lambda: normal(3, 33), row_offset=-2),
]
BY_NAME = {case.name: case for case in CASES}
FEW = [BY_NAME[n] for n in ("typical", "offset-up", "masked-tail", "cool", "4d-dim1", "peaked")]


def in_backends(*values):
    """(backend, value) for every backend; where programs are interpreted, the first value only."""
    interpreted = DEVICE == "cpu"
    return [(backend, value) for backend in BACKENDS
            for value in (values[:1] if backend == "triton" and interpreted else values)]


# Every backend and dtype, the interpreted one's half precision with a few cases only.
SERVED = [
    (backend, dtype, case)
    for backend in BACKENDS for dtype in DTYPES for case in CASES
    if dtype == torch.float32 or backend == "cpu" or case in FEW
]
served = pytest.mark.parametrize(
    "backend, dtype, case", SERVED, indirect=["backend"],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)


def gumbel(logits: Tensor, dim: int, seed: int, row_offset: int) -> Tensor:
    """The reference's noise for logits, float32, in their shape."""
    shape = logits.movedim(dim, -1).shape  # (..., K)
    rows = math.prod(shape[:-1])
    noise = _philox.gumbel(torch.tensor(seed), rows, shape[-1], row_offset)
    return noise.view(shape).movedim(-1, dim)


def backend_gumbel(logits: Tensor, dim: int, seed: int, row_offset: int) -> Tensor:
    """The backend's noise in float64, up to a constant of its row, which cancels in a softmax."""
    return tw.gumbel_softmax(torch.zeros_like(logits), dim=dim, seed=seed,
                             row_offset=row_offset).log()


def eager_gumbel_softmax(logits, tau=1.0, hard=False, dim=-1, noise=None):
    """torch.nn.functional.gumbel_softmax, the noise given to it."""
    y = ((logits + noise.to(logits.dtype)) / tau).softmax(dim)
    if not hard:
        return y
    index = y.argmax(dim, keepdim=True)
    return torch.zeros_like(y).scatter_(dim, index, 1.0) - y.detach() + y


def clamped(x, lowest, highest):
    """x.clamp(lowest, highest); at the bounds torch's own has a gradient up to 2.13 only."""
    return torch.where((x < lowest) | (x > highest), x.detach().clamp(lowest, highest), x)


def eager_gaussian_sample(mean, logvar, noise, logvar_range=None):
    """The lines that users write."""
    if logvar_range is not None:
        logvar = clamped(logvar, *logvar_range)
    z = mean + torch.exp(0.5 * logvar) * noise.to(mean.dtype)
    terms = mean.square() + logvar.exp() - 1 - logvar
    return z, 0.5 * row_sums(terms.expand(z.shape))


def row_sums(x: Tensor) -> Tensor:
    """Over all dimensions but the first, if there are any."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:])).sum(1)


def largest(x: Tensor) -> float:
    """Largest element, without those that overflowed in the making."""
    x = x[x.isfinite()]
    return float(x.max()) if x.numel() else 0.0


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Collects the tensors that a graph keeps for its backward pass."""

    def __init__(self):
        self.tensors: list[Tensor] = []
        super().__init__(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        self.tensors.append(x)
        return x

    def bytes_beyond(self, *known: Tensor) -> int:
        """Of the storages that none of the `known` tensors has."""
        theirs = {x.untyped_storage().data_ptr() for x in known}
        kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.tensors}
        return sum(size for pointer, size in kept.items() if pointer not in theirs)
