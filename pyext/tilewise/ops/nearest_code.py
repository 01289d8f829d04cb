"""Exact search for the nearest code of a codebook, without the matrix of distances."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise import _backend, reference
from tilewise._numbers import version
from tilewise.ops import _arguments
from tilewise.ops._register import define, register
from tilewise.ops.code_sums import code_sums
from tilewise.reference._shapes import flat, rows
from tilewise.reference.nearest_code import NearestCode

METRICS = ("l2", "cosine", "dot")
MAX_K = 16


@dataclass(frozen=True)
class PreparedCodebook:
    """A codebook together with what the search makes of it first; see `prepare_codebook`."""

    codebook: Tensor
    metric: str
    packed: Tensor | None  # None where the backend that serves it needs nothing
    backend: str  # that packed it
    version: int | None  # of the codebook

    def __reduce__(self):
        """A copy is prepared anew: its tensor counts what is written to it from the start."""
        return prepare_codebook, (self.codebook, self.metric)


def nearest_code(
    x: Tensor,
    codebook: Tensor | PreparedCodebook,
    metric: str = "l2",
    k: int | None = None,
    mask: Tensor | None = None,
) -> NearestCode:
    r"""The nearest code of each row: the true argmin, without the N x K matrix of distances.

        index_i = argmin_k d(x_i, c_k), the lowest k among equals        distance_i = the minimum

    with d = ||x - c||^2 ("l2"), 1 - <x, c> / (||x|| ||c||) ("cosine"; 1 where a norm is 0) or
    -<x, c> ("dot"), evaluated in float64 on the values as they are given, in one fixed order. So
    the index is the same on every machine, for every number of threads and split of the batch.
    Codes with a NaN never win. A row with a NaN gets index 0 and distance NaN.

    Args:
        x: (..., D), float16, bfloat16, float32 or float64.
        codebook: (K, D), or (H, K, D) for the heads of x (H, ..., D); on the device of `x`, of any
            floating dtype. Or what `prepare_codebook` made of it.
        metric: "l2", "cosine" or "dot".
        k: how many codes to return, nearest first, at most 16. None: one, without a dimension.
        mask: bool, broadcasts to x.shape[:-1]; rows where it is False get index -1, distance 0.

    Returns:
        (index, distance): int64 and float32, (...) or (..., k). `distance` is the float64
        distance, rounded once.

    `distance` is differentiable in `x` and `codebook`, any number of times; `index` is not.
    Autocast changes nothing.

    Cost: a product of N * K * D in 8-bit integers (AVX-512 VNNI, AVX2) and a few distances in
    float64 for each row; where the data is such that integers cannot tell its codes apart, a
    product in float32 as well. Memory O((N + K) * D) plus a fixed workspace for each thread. On
    CUDA: a product in float16 on matrix units instead, and a workspace of at most 64 MiB.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, named in the text;
            an empty codebook; k > K.
        RuntimeError: inside a torch.func transform, or the codebook was changed after
            `prepare_codebook`.

    Paper: van den Oord et al., Neural Discrete Representation Learning, NeurIPS 2017.
    """
    packed = None
    if isinstance(codebook, PreparedCodebook):
        prepared = codebook
        _check_prepared(prepared, metric)
        codebook = prepared.codebook
        if _backend.choose(codebook.device, x.dtype, codebook.dtype) == prepared.backend:
            packed = prepared.packed
    heads, count = _check(x, codebook, metric, k)
    if mask is not None:
        mask = _arguments.row_mask("mask", mask, x)

    op = _backend.operator("nearest_code", x.device, x.dtype, codebook.dtype)
    if op is None:
        return reference.nearest_code(x, codebook, metric, k, mask)
    index, distance = op(
        rows(x, heads),
        codebook if codebook.dim() == 3 else codebook.unsqueeze(0),
        metric,
        count,
        None if mask is None else flat(mask, heads),
        packed,
    )
    shape = x.shape[:-1] if k is None else (*x.shape[:-1], count)
    return NearestCode(index.view(shape), distance.view(shape))


def prepare_codebook(codebook: Tensor, metric: str = "l2") -> PreparedCodebook:
    """Packs a codebook once, for many searches with one that does not change (evaluation).

    Worth it for batches that are small beside the codebook; `nearest_code` otherwise packs it in
    each call. The codebook must not be modified in place while this is used: that is an error
    (which an inference tensor, whose writes are not counted, cannot raise). Copies and what
    pickle and `torch.load` restore are prepared anew.

    Args:
        codebook, metric: as in `nearest_code`.

    Returns:
        What `nearest_code` takes in the codebook's place, with the same metric. It holds the
        codebook, and about half its bytes again; another backend takes the codebook alone.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype, named in the text.
    """
    _check_codebook(codebook, metric)
    backend = _backend.choose(codebook.device, codebook.dtype)
    packed, op = None, _backend.operator("pack_codebook", codebook.device, codebook.dtype)
    if op is not None:
        codes = codebook.detach()
        packed = op(codes if codes.dim() == 3 else codes.unsqueeze(0), metric)
    return PreparedCodebook(codebook, metric, packed, backend, version(codebook))


def _check_codebook(codebook: Tensor, metric: str) -> None:
    _arguments.check_floating("codebook", codebook)
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    if codebook.dim() not in (2, 3):
        raise ValueError(f"codebook: expected (K, D) or (H, K, D), got {tuple(codebook.shape)}")
    if codebook.shape[-2] == 0:
        raise ValueError(f"codebook: expected at least one code, got {tuple(codebook.shape)}")


def _check(x: Tensor, codebook: Tensor, metric: str, k: int | None) -> tuple[int, int]:
    """How many heads there are, and how many codes are wanted."""
    _check_codebook(codebook, metric)
    _arguments.check_floating("x", x)
    heads = codebook.shape[0] if codebook.dim() == 3 else 1
    if x.dim() < codebook.dim() - 1 or x.shape[-1] != codebook.shape[-1]:
        expected = "(H, ..., D)" if codebook.dim() == 3 else "(..., D)"
        raise ValueError(
            f"x: expected {expected} for codebook {tuple(codebook.shape)}, got {tuple(x.shape)}"
        )
    if codebook.dim() == 3 and x.shape[0] != heads:
        raise ValueError(
            f"x: expected {heads} heads first, as in the codebook, got {tuple(x.shape)}"
        )
    if x.device != codebook.device:
        raise ValueError(f"codebook: expected on {x.device} like x, got {codebook.device}")
    count = 1 if k is None else _arguments.integer("k", k, least=1)
    if count > min(MAX_K, codebook.shape[-2]):
        raise ValueError(
            f"k: expected at most {MAX_K} and at most the {codebook.shape[-2]} codes, got {count}"
        )
    return heads, count


def _check_prepared(prepared: PreparedCodebook, metric: str) -> None:
    if prepared.metric != metric:
        raise ValueError(
            f"metric: expected {prepared.metric!r}, which the codebook was prepared for, "
            f"got {metric!r}"
        )
    if torch.compiler.is_compiling():
        return  # versions are not traced
    if version(prepared.codebook) != prepared.version:
        raise RuntimeError(
            "codebook: it was modified after prepare_codebook; prepare it again, or pass the tensor"
        )


def _fake(x, codebook, metric, k, mask, packed):
    h, n, _ = x.shape
    return (
        x.new_empty((h, n, k), dtype=torch.int64), x.new_empty((h, n, k), dtype=torch.float32)
    )


def _gradients(ops, d_distance, x, codebook, index, metric, need_x, need_codebook):
    wide = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    head = torch.arange(len(codebook), device=x.device)[:, None, None]
    codes = codebook[head, index.clamp(min=0)].to(wide)  # (H, N, k, D)
    masked = index.unsqueeze(-1) < 0
    grad = d_distance.to(wide).unsqueeze(-1)  # (H, N, k, 1)
    d_rows, d_codes = _derivatives(metric, x.to(wide).unsqueeze(2), codes, need_x, need_codebook)
    d_x = d_codebook = None
    if d_rows is not None:
        d_x = (grad * d_rows).masked_fill(masked, 0.0).sum(2).to(x.dtype)
    if d_codes is not None:
        terms = (grad * d_codes).flatten(1, 2)  # (H, N * k, D)
        sums = code_sums(terms, index.flatten(1), codebook.shape[1], per_head=True).sums
        d_codebook = sums.to(codebook.dtype)
    return d_x, d_codebook


def _derivatives(metric: str, x: Tensor, codes: Tensor, need_x: bool, need_codes: bool):
    """Derivatives of the distances by x and by the codes, (H, N, k, D); None if not needed."""
    if metric == "l2":
        difference = 2 * (x - codes)
        return difference if need_x else None, -difference if need_codes else None
    if metric == "dot":
        d_codes = -x.expand_as(codes) if need_codes else None
        return -codes if need_x else None, d_codes
    x_norm, code_norm = (v.norm(dim=-1, keepdim=True) for v in (x, codes))
    zero = (x_norm == 0) | (code_norm == 0)  # there the distance is constant
    x_norm, code_norm = x_norm.masked_fill(zero, 1.0), code_norm.masked_fill(zero, 1.0)
    a, b = x / x_norm, codes / code_norm
    cosine = (a * b).sum(-1, keepdim=True)
    d_x = ((cosine * a - b) / x_norm).masked_fill(zero, 0.0) if need_x else None
    d_codes = ((cosine * b - a) / code_norm).masked_fill(zero, 0.0) if need_codes else None
    return d_x, d_codes


register(
    "nearest_code",
    "(Tensor x, Tensor codebook, str metric, int k, Tensor? mask, Tensor? packed) "
    "-> (Tensor index, Tensor distance)",
    _fake,
    "(Tensor d_distance, Tensor x, Tensor codebook, Tensor index, str metric, bool need_x, "
    "bool need_codebook) -> (Tensor d_x, Tensor d_codebook)",
    _gradients,
)
define(
    "pack_codebook",
    "(Tensor codebook, str metric) -> Tensor",
    lambda codebook, metric: codebook.new_empty(
        (codebook.shape[0], torch.library.get_ctx().new_dynamic_size()), dtype=torch.uint8
    ),
    module="nearest_code",
)
