"""Registers an op with torch's dispatcher: schema, fake kernel and autograd formula.

A loss computes its gradients in the forward pass: `(inputs…, bool need_x…) -> (loss, dx…)`.
Its backward only scales them, in a second op whose own autograd formula raises: a plain `g * dx`
would be a constant to a second differentiation, and silently wrong.
"""

import importlib
from collections.abc import Callable, Sequence
from itertools import compress

import torch
from torch import Tensor

from tilewise import _extension
from tilewise.reference._precision import accumulate_dtype

_library = torch.library.Library("tilewise", "FRAGMENT")
_triton_library = torch.library.Library("tilewise_triton", "FRAGMENT")


def _triton(name: str, module: str) -> Callable:
    def run(*arguments):
        return getattr(importlib.import_module(f"tilewise.kernels.{module}"), name)(*arguments)

    return run


def register(
    name: str, schema: str, fake: Callable, setup_context: Callable, backward: Callable
) -> None:
    """Defines `tilewise::name`, and `tilewise_triton::name` for the Triton backend alone.

    Args:
        fake: computes empty outputs from inputs, for tracing.
        setup_context, backward: the autograd formula, as torch.library.register_autograd takes it.
            `ctx.namespace` holds the namespace of the op that ran: its helpers live there too.
    """
    define(name, schema, fake, module=name)
    for library in (_library, _triton_library):
        _register_autograd(library, name, setup_context, backward)


def _register_autograd(library, name: str, setup_context: Callable, backward: Callable) -> None:
    torch.library.register_autograd(
        f"{library.ns}::{name}", backward, lib=library,
        setup_context=_with_namespace(getattr(torch.ops, library.ns), setup_context),
    )


def _with_namespace(namespace, setup_context: Callable) -> Callable:
    def with_namespace(ctx, inputs, output):
        ctx.namespace = namespace
        setup_context(ctx, inputs, output)

    return with_namespace


def define(name: str, schema: str, fake: Callable, module: str | None = None) -> None:
    """Defines an op without a gradient; for the CPU only, unless a Triton `module` has it."""
    for library in (_library, _triton_library) if module else (_library,):
        library.define(f"{name}{schema}")
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
    if module:
        run = _triton(name, module)
        _library.impl(name, run, "CUDA")
        # Any device: Triton's interpreter takes CPU tensors.
        _triton_library.impl(name, run, "CompositeExplicitAutograd")


def register_loss(name: str, schema: str, differentiable: Sequence[str]) -> None:
    """Registers a loss of features, its first input, whose gradients are outputs of the op.

    Args:
        differentiable: the inputs that gradients belong to, in the order in which the op returns
            the gradients, after the loss. In this order the schema's `bool need_…` say which of
            them are needed.
    """
    names = [a.name for a in torch._C.parse_schema(name + schema).arguments]
    places = [names.index(x) for x in differentiable]
    flags = [i for i, x in enumerate(names) if x.startswith("need_")]

    def fake(*inputs):
        features = inputs[0]
        shapes = [()]
        for i, flag in zip(places, flags, strict=True):
            x = inputs[i]
            of_one_element = x is not None and x.dim() < 2
            shapes.append((0,) if not inputs[flag] else () if of_one_element else x.shape)
        dtype = accumulate_dtype(features)
        return tuple(features.new_empty(shape, dtype=dtype) for shape in shapes)

    def setup_context(ctx, inputs, output):
        _, *gradients = output
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)
        ctx.num_inputs = len(inputs)
        needed = [inputs[flag] for flag in flags]
        ctx.places = list(compress(places, needed))
        ctx.save_for_backward(*compress(gradients, needed), *(inputs[i] for i in ctx.places))

    def backward(ctx, grad, *_):
        result: list[Tensor | None] = [None] * ctx.num_inputs
        if grad is None:
            return tuple(result)
        n, saved = len(ctx.places), ctx.saved_tensors  # checkpointing lets them be read once
        gradients, inputs = saved[:n], saved[n:]
        scaled = torch.ops.tilewise.scale_gradients(grad, gradients, inputs)
        for i, value in zip(ctx.places, scaled, strict=True):
            result[i] = value
        return tuple(result)

    define(name, schema, fake, module=name)
    _register_autograd(_triton_library, name, setup_context, backward)
    if _extension.module:
        _extension.module.register_loss(name, places, flags)
    else:
        _register_autograd(_library, name, setup_context, backward)


def _scale_gradients(grad: Tensor, gradients: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """grad * gradient, in each input's dtype and shape."""
    return [
        (d * grad).to(x.dtype).view(x.shape) for d, x in zip(gradients, inputs, strict=True)
    ]


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "tilewise computes this loss's gradients in the forward pass and cannot differentiate them "
        "again; for second derivatives call it under `with tilewise.backend('reference'):`"
    )


_library.define("scale_gradients(Tensor grad, Tensor[] gradients, Tensor[] inputs) -> Tensor[]")
_library.impl("scale_gradients", _scale_gradients, "CompositeExplicitAutograd")
torch.library.register_fake("tilewise::scale_gradients", _scale_gradients, lib=_library)
torch.library.register_autograd(
    "tilewise::scale_gradients", _no_second_derivative, lib=_library
)
