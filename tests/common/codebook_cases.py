"""Rows and codebooks that break searches which are only nearly exact."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.common.contrastive_cases import DEVICE


@dataclass(frozen=True)
class Case:
    """A search problem: `make(n, k, d)` returns rows (n, d) and codes (k, d) in float32."""

    name: str
    make: Callable[[int, int, int], tuple[Tensor, Tensor]]
    sizes: tuple[int, int, int] = (70, 150, 19)

    def tensors(self, dtype=torch.float32, code_dtype=None, sizes=None) -> tuple[Tensor, Tensor]:
        """Rows and codebook, the same in every run."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(self.name) + sum(map(ord, self.name)))
            x, codes = self.make(*(sizes or self.sizes))
        return x.to(DEVICE, dtype), codes.to(DEVICE, code_dtype or dtype)


def normal(n, k, d):
    return torch.randn(n, d), torch.randn(k, d)


def near(n, k, d):
    """Rows beside their codes, as in a trained codebook."""
    codes = torch.randn(k, d)
    return codes[torch.randint(k, (n,))] + 0.05 * torch.randn(n, d), codes


def duplicates(n, k, d):
    """Every code many times: the lowest index must win."""
    codes = torch.randn(max(k // 16, 1), d)[torch.arange(k) % max(k // 16, 1)]
    return torch.randn(n, d), codes


def rows_are_codes(n, k, d):
    codes = torch.randn(k, d)
    return codes[torch.arange(n) % k].clone(), codes


def common_offset(n, k, d):
    """c^2 - 2xc in float32 has no digit left here."""
    return torch.randn(n, d) + 1e4, torch.randn(k, d) + 1e4


def one_cluster(n, k, d):
    return torch.randn(n, d), torch.randn(1, d) + 1e-4 * torch.randn(k, d)


def clusters(n, k, d):
    centres = torch.randn(max(k // 40, 2), d)
    return torch.randn(n, d), centres[torch.arange(k) % len(centres)] + 1e-4 * torch.randn(k, d)


def neighbouring_floats(n, k, d):
    """Codes that differ by one bit in one element."""
    codes = torch.ones(k, d)
    codes[torch.arange(k), torch.arange(k) % d] += torch.randint(-3, 4, (k,)) * 2.0**-23
    return torch.ones(n, d) + torch.randint(-3, 4, (n, d)) * 2.0**-24, codes


def outlier_code(n, k, d):
    x, codes = normal(n, k, d)
    codes[k // 2, d // 2] = 1e6
    return x, codes


def outlier_row(n, k, d):
    x, codes = normal(n, k, d)
    x[n // 2, d // 2] = 1e6
    return x, codes


def scales(n, k, d):
    """Rows and codes of sizes that differ by orders of magnitude."""
    x, codes = normal(n, k, d)
    return x * torch.logspace(-4, 4, n)[:, None], codes * torch.logspace(4, -4, k)[:, None]


def denormal(n, k, d):
    x, codes = normal(n, k, d)
    return x * 1e-41, codes * 1e-41


def huge(n, k, d):
    x, codes = normal(n, k, d)
    return x * 3e37, codes * 3e37


def integers(n, k, d):
    """Exact ties between different codes."""
    return torch.randint(-1, 2, (n, d)).float(), torch.randint(-1, 2, (k, d)).float()


def zeros(n, k, d):
    x, codes = normal(n, k, d)
    x[::3], codes[::4] = 0.0, 0.0
    return x, codes


def opposite(n, k, d):
    """All distances nearly equal: codes on a sphere around the row."""
    codes = torch.nn.functional.normalize(torch.randn(k, d), dim=1)
    return 1e-6 * torch.randn(n, d), codes


def nan_codes(n, k, d):
    x, codes = normal(n, k, d)
    codes[::3, d // 2] = float("nan")
    codes[0] = float("nan")
    return x, codes


def nan_rows(n, k, d):
    x, codes = normal(n, k, d)
    x[::5, 0] = float("nan")
    codes[k // 2, 0] = float("nan")
    return x, codes


def infinities(n, k, d):
    x, codes = normal(n, k, d)
    codes[::7, 0], codes[1::7, d - 1] = float("inf"), float("-inf")
    x[::11, 0] = float("inf")
    x[5::11, d - 1] = float("-inf")
    return x, codes


def no_finite_code(n, k, d):
    x, codes = normal(n, k, d)
    codes[:, 0] = float("inf")
    codes[::2, 0] = float("nan")
    return x, codes


CASES = [
    *(Case(f"normal-{n}x{k}x{d}", normal, (n, k, d)) for n, k, d in [
        (0, 5, 3), (1, 1, 1), (3, 1, 7), (1, 70, 1), (2, 64, 8), (97, 65, 16), (100, 129, 33),
    ]),
    *(Case(f.__name__, f) for f in (
        near, duplicates, rows_are_codes, common_offset, one_cluster, clusters,
        neighbouring_floats, outlier_code, outlier_row, scales, denormal, huge, integers, zeros,
        opposite, nan_codes, nan_rows, infinities, no_finite_code,
    )),
]
