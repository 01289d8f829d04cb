"""Nearest codes, and sums of the rows of each code: plain PyTorch, faiss and scikit-learn."""

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor


def cdist_nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code by torch.cdist, whose N x K distances are stored."""
    return torch.cdist(x, codebook).argmin(1)


def addmm_nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code by c^2 / 2 - <x, c> in float32, a few rows at a time.

    The fastest few lines of PyTorch (`min` finds a minimum faster than `argmin`), and inexact where
    distances are small beside the vectors.
    """
    half = codebook.square().sum(1) / 2
    cached = 2**20 if x.device.type == "cpu" else 2**23  # 4 MB; of a GPU 32: they stay in the cache
    step = max(1, cached // len(codebook))
    scores = x.new_empty(step, len(codebook))
    indices = []
    for part in x.split(step):
        out = torch.addmm(half, part, codebook.T, alpha=-1, out=scores[: len(part)])
        indices.append(out.min(1).indices)
    return torch.cat(indices)


def faiss_nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code by faiss' exhaustive search, the index made of the codes as they are now."""
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    return torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])


def sklearn_nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code by scikit-learn."""
    metrics = importlib.import_module("sklearn.metrics")
    return torch.from_numpy(metrics.pairwise_distances_argmin(x.numpy(), codebook.numpy()))


def one_hot_code_sums(x: Tensor, index: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts and sums of the rows of each code by an N x K one-hot matrix."""
    one_hot = F.one_hot(index, num_codes).to(x.dtype)
    return one_hot.sum(0).long(), one_hot.T @ x


def index_add_code_sums(x: Tensor, index: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts and sums of the rows of each code by index_add, torch's fastest way on a CPU."""
    counts = torch.bincount(index, minlength=num_codes)
    return counts, x.new_zeros(num_codes, x.shape[1]).index_add_(0, index, x)


def scatter_add_code_sums(x: Tensor, index: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts and sums of the rows of each code by scatter_add."""
    counts = torch.bincount(index, minlength=num_codes)
    places = index.unsqueeze(1).expand_as(x)
    return counts, x.new_zeros(num_codes, x.shape[1]).scatter_add_(0, places, x)


def bincount_code_sums(x: Tensor, index: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts and sums of the rows of each code by a weighted torch.bincount for each column."""
    columns = [torch.bincount(index, column, minlength=num_codes) for column in x.T]
    return torch.bincount(index, minlength=num_codes), torch.stack(columns, 1).to(x.dtype)
