"""Inputs that matter for losses over all pairs of two batches; every such op runs all of them."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Where the tests' tensors live: `make test-gpu` sets this to "cuda".
DEVICE = os.environ.get("TILEWISE_TEST_DEVICE", "cpu")


@dataclass(frozen=True)
class Case:
    """Features are made in float64 by `make(generator)`; `layout` then changes their strides."""

    name: str
    make: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    logit_scale: float = 10.0
    logit_bias: float | None = -10.0
    positives: int | tuple[Tensor, Tensor] | None = 0
    layout: Callable[[Tensor], Tensor] = lambda x: x

    def features(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        generator = torch.Generator("cpu").manual_seed(sum(map(ord, self.name)))
        image, text = self.make(generator)
        return self.layout(image.to(DEVICE, dtype)), self.layout(text.to(DEVICE, dtype))


def normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Drawn on the CPU wherever the tests run: the same numbers everywhere."""
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu")


def related(b: int, n: int, d: int, noise: float = 1.0):
    """Unit rows; text i looks like image i, as far as there is one."""

    def make(generator):
        image = normal(b, d, generator)
        text = noise * normal(n, d, generator)
        m = min(b, n)
        text[:m] += image[:m]
        return F.normalize(image, dim=1), F.normalize(text, dim=1)

    return make


def unrelated(b: int, n: int, d: int):
    def make(generator):
        return tuple(F.normalize(normal(rows, d, generator), dim=1) for rows in (b, n))

    return make


def duplicated(b: int, d: int):
    """Half of the rows are equal to the other half."""

    def make(generator):
        image, text = related(b // 2, b // 2, d)(generator)
        return image.repeat(2, 1), text.repeat(2, 1)

    return make


def all_equal(b: int, d: int):
    def make(generator):
        row = F.normalize(normal(1, d, generator), dim=1)
        return row.repeat(b, 1), row.repeat(b, 1)

    return make


def with_nan(b: int, n: int, d: int):
    def make(generator):
        image, text = related(b, n, d)(generator)
        image[b // 2, d // 2] = float("nan")
        return image, text

    return make


def transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T


def strided(x: Tensor) -> Tensor:
    wide = x.new_full((2 * x.shape[0], 3 * x.shape[1]), float("nan"))
    wide[::2, ::3] = x
    return wide[::2, ::3]


def offset(x: Tensor) -> Tensor:
    """A slice out of the middle of a larger, NaN-filled tensor."""
    wide = x.new_full((x.shape[0] + 5, x.shape[1] + 7), float("nan"))
    wide[2:-3, 3:-4] = x
    return wide[2:-3, 3:-4]


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape[0], -1)


def ids(b: int, n: int, names: int) -> tuple[Tensor, Tensor]:
    """Of b images and n texts that have one of `names` names each; any int64 may be one."""
    generator = torch.Generator("cpu").manual_seed(b + n)
    values = torch.randint(-(2**63), 2**63 - 1, (names,), generator=generator, device="cpu")
    draws = (torch.randint(names, (size,), generator=generator, device="cpu") for size in (b, n))
    return tuple(values[i].to(DEVICE) for i in draws)


CASES = [
    Case("typical", related(64, 64, 32)),
    Case("no-bias", related(33, 33, 16), logit_bias=None),
    Case("peaked-scale-100", related(48, 48, 64, noise=0.05), logit_scale=100.0, logit_bias=-50.0),
    Case("unrelated-scale-100", unrelated(40, 40, 24), logit_scale=100.0),
    Case("tiny-logits", related(31, 31, 8), logit_scale=1e-4, logit_bias=0.0),
    Case("far-negatives", related(40, 40, 16), logit_scale=1.0, logit_bias=-120.0),
    Case("far-positives", related(40, 40, 16), logit_scale=1.0, logit_bias=120.0),
    Case("negative-scale", related(20, 20, 8), logit_scale=-7.0),
    Case("zero-scale", related(20, 20, 8), logit_scale=0.0),
    Case("duplicated-rows", duplicated(50, 16)),
    Case("all-rows-equal", all_equal(37, 8), logit_scale=100.0),
    Case("no-images", related(0, 5, 4)),
    Case("no-texts", related(5, 0, 4)),
    Case("nothing", related(0, 0, 4)),
    Case("one-pair", related(1, 1, 8)),
    Case("no-columns", related(3, 4, 0)),
    Case("one-column", related(30, 30, 1)),
    Case("odd", related(7, 7, 5)),
    Case("more-texts", related(9, 40, 6)),
    Case("more-images", related(40, 9, 6)),
    Case("offset-up", related(20, 31, 6), positives=11),
    Case("offset-down", related(31, 20, 6), positives=-11),
    Case("offset-outside", related(12, 12, 6), positives=400),
    Case("offset-huge", related(12, 12, 6), positives=2**63 - 1),
    Case("offset-hugely-negative", related(12, 12, 6), positives=-(2**63)),
    Case("ids-captions", related(30, 45, 8), positives=ids(30, 45, 20)),
    Case("ids-few", related(41, 37, 8), positives=ids(41, 37, 3)),
    Case("ids-one", related(10, 12, 6), positives=ids(10, 12, 1)),
    Case("ids-apart", related(12, 12, 6), positives=ids(12, 12, 1000)),
    Case("ids-no-texts", related(5, 0, 4), positives=ids(5, 0, 3)),
    Case("no-positives", related(21, 34, 8), positives=None),
    Case("transposed", related(18, 18, 12), layout=transposed),
    Case("strided", related(18, 18, 12), layout=strided),
    Case("offset-storage", related(18, 18, 12), layout=offset),
    Case("expanded", related(18, 18, 12), layout=expanded),
    Case("nan", with_nan(10, 12, 6)),
]
