"""Codes chosen by logits and Gumbel noise, and the divergence of the logits from uniform.

Logits (N, K) are read in tiles of whole rows: no sample, one-hot or relaxed, and no softmax of that
size is ever stored. The backward pass makes all of it again from logits and seed.

This is no op of the library beside those in `tilewise.ops`: it has no kernel, no backend and no
public function, only calls of ops that have. It is registered with torch for one reason: autograd
and torch.compile then see one node with a backward pass of its own, and not the loop over tiles.
"""

import math
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise import _backend
from tilewise.nn.quantizers._derivatives import in_functorch, refuse_second_derivative
from tilewise.ops.code_sums import code_sums
from tilewise.ops.gumbel_argmax import gumbel_argmax
from tilewise.ops.gumbel_softmax import gumbel_softmax, relaxed_gradients
from tilewise.reference._precision import no_autocast

HARD, SOFT, MODE = "hard", "soft", "mode"
CPU_TILE, GPU_TILE = 1 << 19, 1 << 21  # elements: what a cache holds


def choose_codes(
    logits: Tensor,
    codebook: Tensor,
    tau: Tensor,
    seed: Tensor,
    row_offset: int,
    kind: str,
    need_kl: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""(quantized, index, kl) of logits (N, K) and codebook (K, D).

        y = softmax((logits + g) / tau),    index = argmax (logits + g)
        quantized = codebook[index]  (hard)    or    y @ codebook  (soft)
        kl_i = sum_k p_ik log(K p_ik),    p = softmax(logits)

    Without noise, g = 0, for the kind "mode", which is hard. Gradients of quantized are those of
    y @ codebook by the logits and tau, and of what was computed by the codebook.

    Returns:
        quantized (N, D) as the codebook, index (N) int64, kl (N) float32 (float64 for float64); of
        size 0 if not needed.
    """
    function = _differentiable if in_functorch() else gumbel_codes
    return function(logits, codebook, tau, seed, row_offset, kind, need_kl)


def _differentiable(
    logits: Tensor,
    codebook: Tensor,
    tau: Tensor,
    seed: Tensor,
    row_offset: int,
    kind: str,
    need_kl: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`choose_codes` of differentiable operations, for torch.func: stores the one-hot matrix."""
    if kind == MODE:
        index = logits.argmax(-1)
        soft = torch.softmax(logits.to(tau.dtype) / torch.where(tau == 0, 1.0, tau), -1)
        hot = F.one_hot(index, logits.shape[-1])
        y = (hot + (soft - soft.detach())).to(logits.dtype)
    else:
        y = gumbel_softmax(logits, tau, kind == HARD, seed=seed, row_offset=row_offset)
        index = y.argmax(-1)
    kl = logits.new_empty(0, dtype=tau.dtype)
    if need_kl:
        log_p = torch.log_softmax(logits.to(tau.dtype), -1).clamp(torch.finfo(tau.dtype).min)
        kl = (log_p.exp() * (log_p + math.log(max(logits.shape[-1], 1)))).sum(-1)
    return y.to(codebook.dtype) @ codebook, index, kl


@torch.library.custom_op("tilewise::gumbel_codes", mutates_args=())
def gumbel_codes(
    logits: Tensor,
    codebook: Tensor,
    tau: Tensor,
    seed: Tensor,
    row_offset: int,
    kind: str,
    need_kl: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`choose_codes` for autograd."""
    n, k = logits.shape
    with no_autocast(logits):
        if kind == MODE:
            index = logits.argmax(-1)
        else:
            drawn = gumbel_argmax(logits, seed=seed, row_offset=row_offset)
            index = cast(Tensor, drawn).contiguous()
        if kind == SOFT:
            quantized = codebook.new_empty(n, codebook.shape[1])
            table = codebook.to(_product_dtype(logits))
            for rows in _tiles(logits):
                y = gumbel_softmax(logits[rows], tau, seed=seed, row_offset=row_offset + rows.start)
                quantized[rows] = y.to(table.dtype) @ table
        else:
            quantized = codebook.index_select(0, index)
        kl = logits.new_empty(n if need_kl else 0, dtype=tau.dtype)
        for rows in _tiles(logits) if need_kl else ():
            p, ratio = _against_uniform(logits[rows])
            kl[rows] = p.mul_(ratio).sum(-1)
    return quantized, index, kl


@gumbel_codes.register_fake
def _(logits, codebook, tau, seed, row_offset, kind, need_kl):
    n = logits.shape[0]
    return (
        codebook.new_empty(n, codebook.shape[1]),
        logits.new_empty(n, dtype=torch.int64),
        logits.new_empty(n if need_kl else 0, dtype=tau.dtype),
    )


def _setup_context(ctx, inputs, output):
    logits, codebook, tau, seed, ctx.row_offset, ctx.kind, _ = inputs
    _, index, _ = output
    ctx.mark_non_differentiable(index)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, codebook, tau, seed, index)


def _backward(ctx, d_quantized, _, d_kl):
    refuse_second_derivative()
    needed = ctx.needs_input_grad[:3]
    if d_quantized is None:  # what remains does not depend on codebook and tau
        needed = needed[0], False, False
    gradients = gumbel_codes_backward(
        d_quantized, d_kl, *ctx.saved_tensors, ctx.row_offset, ctx.kind, *needed
    )
    first = [g if need else None for g, need in zip(gradients, needed, strict=True)]
    return *first, None, None, None, None


gumbel_codes.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("tilewise::gumbel_codes_backward", mutates_args=())
def gumbel_codes_backward(
    d_quantized: Tensor | None,
    d_kl: Tensor | None,
    logits: Tensor,
    codebook: Tensor,
    tau: Tensor,
    seed: Tensor,
    index: Tensor,
    row_offset: int,
    kind: str,
    need_logits: bool,
    need_codebook: bool,
    need_tau: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by logits, codebook and tau; of size 0 where not needed."""
    n, k = logits.shape
    d_logits = torch.zeros_like(logits) if need_logits else logits.new_empty(0)
    d_codebook = codebook.new_zeros(codebook.shape if need_codebook else 0, dtype=tau.dtype)
    d_tau = tau.new_zeros(() if need_tau else 0)
    with no_autocast(logits):
        if need_codebook and kind != SOFT and d_quantized is not None:
            _, d_codebook = code_sums(d_quantized, index, k)
        table = codebook.to(_product_dtype(logits))
        for rows in _tiles(logits) if need_logits or need_tau or kind == SOFT else ():
            x, row = logits[rows], row_offset + rows.start
            if d_quantized is not None:
                grad = d_quantized[rows].to(table.dtype)
                y = _relaxed(x, tau, seed, row, kind)
                if need_codebook and kind == SOFT and y is not None:
                    d_codebook += y.to(table.dtype).mT @ grad
                if need_logits or need_tau:
                    d_y = (grad @ table.mT).to(x.dtype)  # (R, K)
                    d_x, part = _through_sample(d_y, x, y, tau, seed, row, need_tau)
                    if need_logits:
                        d_logits[rows] = d_x
                    if need_tau:
                        d_tau += part
            if d_kl is not None and need_logits:
                p, ratio = _against_uniform(x)
                ratio -= (p * ratio).sum(-1, keepdim=True)
                d_logits[rows] += p.mul_(ratio).mul_(d_kl[rows, None])
    return d_logits, d_codebook.to(codebook.dtype), d_tau


@gumbel_codes_backward.register_fake
def _(
    d_quantized, d_kl, logits, codebook, tau, seed, index, row_offset, kind,
    need_logits, need_codebook, need_tau,
):
    return (
        torch.empty_like(logits) if need_logits else logits.new_empty(0),
        codebook.new_empty(codebook.shape if need_codebook else 0),
        tau.new_empty(() if need_tau else 0),
    )


def _relaxed(x: Tensor, tau: Tensor, seed: Tensor, row: int, kind: str) -> Tensor | None:
    """The sample (R, K) that gradients are those of; None where a kernel makes it for itself."""
    if kind == MODE:
        return torch.softmax(x.to(tau.dtype) / torch.where(tau == 0, 1.0, tau), -1)
    if kind == HARD and _backend.choose(x.device, x.dtype) != "reference":
        return None
    return gumbel_softmax(x, tau, seed=seed, row_offset=row)


def _through_sample(
    d_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    tau: Tensor,
    seed: Tensor,
    row: int,
    need_tau: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients by logits x (R, K) and tau, from that by the relaxed sample y of them."""
    if y is not None:
        return relaxed_gradients(d_y, y, tau, -1)
    backend = _backend.choose(x.device, x.dtype)
    op = torch.ops.tilewise_triton if backend == "triton" else torch.ops.tilewise
    return op.gumbel_softmax_backward(d_y, x, tau, seed, row, 1, True, need_tau)


def _against_uniform(x: Tensor) -> tuple[Tensor, Tensor]:
    """(p, log(K p)) with p = softmax(x) of logits (R, K)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    ratio = torch.log_softmax(wide, -1).clamp_(min=torch.finfo(wide.dtype).min)  # for p = 0
    return ratio.exp(), ratio.add_(math.log(max(x.shape[-1], 1)))


def _tiles(x: Tensor) -> Iterator[slice]:
    """Parts of the rows of x (N, K), of about one tile; sizes alone decide."""
    n, k = x.shape
    size = max((CPU_TILE if x.device.type == "cpu" else GPU_TILE) // max(k, 1), 1)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _product_dtype(x: Tensor) -> torch.dtype:
    """That of x, but float16 on a CPU, whose products are slow."""
    return torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype
