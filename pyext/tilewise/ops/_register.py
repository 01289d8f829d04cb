"""Registers an op with torch's dispatcher: schema, fake kernel and autograd formula.

What a formula is made of stands beside the op's schema, once. Where there is the extension, C++
registers it (csrc/autograd.h), which saves some hundred microseconds a call; else, and for the
Triton backend's own operators, `torch.library` does, here.

A loss computes its gradients in the forward pass: `(inputs…, bool need_x…) -> (loss, dx…)`.
Its backward only scales them, in a second op whose own autograd formula raises: a plain `g * dx`
would be a constant to a second differentiation, and silently wrong.
"""

import importlib
from collections.abc import Callable, Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise import _extension
from tilewise.reference._precision import accumulate_dtype

_library = torch.library.Library("tilewise", "FRAGMENT")
_triton_library = torch.library.Library("tilewise_triton", "FRAGMENT")

# Of each op that Triton has a kernel for, the module of `tilewise.kernels` where it is.
modules: dict[str, str] = {}
# setup_context and backward of each op, as torch.library.register_autograd takes them.
formulas: dict[str, tuple[Callable, Callable]] = {}


def _triton(name: str, module: str) -> Callable:
    def run(*arguments):
        return getattr(importlib.import_module(f"tilewise.kernels.{module}"), name)(*arguments)

    return run


def define(name: str, schema: str, fake: Callable, module: str | None = None) -> None:
    """Defines an op without a gradient; for the CPU only, unless a Triton `module` has it.

    What only modules call may have a kernel in Triton alone: see `_backend.triton_operator`.
    """
    for library in (_library, _triton_library) if module else (_library,):
        library.define(f"{name}{schema}")
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
    if module:
        modules[name] = module
        run = _triton(name, module)
        _library.impl(name, run, "CUDA")
        # Any device: Triton's interpreter takes CPU tensors.
        _triton_library.impl(name, run, "CompositeExplicitAutograd")


class Source(NamedTuple):
    """Where an argument of a backward pass comes from: a place among what is named.

    With `flag`, the place of a bool input: the input if it is set, the output if it is not.
    """

    gradient: int | None = None
    need: int | None = None
    input: int | None = None
    output: int | None = None
    flag: int | None = None

    def kept(self, inputs: Sequence, outputs: Sequence):
        """What the forward pass keeps for it."""
        if self.input is not None and (self.flag is None or inputs[self.flag]):
            return inputs[self.input]
        return None if self.output is None else outputs[self.output]


def register(
    name: str, schema: str, fake: Callable, backward: str, formula: Callable,
    fake_backward: Callable | None = None, saved: tuple[str, str] | None = None,
) -> None:
    """Defines `name` and `name_backward`, in every namespace, and makes one the other's gradient.

    Args:
        fake, fake_backward: compute empty outputs from inputs, for tracing. No fake_backward:
            there is no kernel of the backward pass.
        backward: its schema. Names say what it is given and returns: `d_<output>` (`grad` where
            there is one output), inputs and outputs of the op, `need_<input>`; `d_<input>`.
        formula: the same of differentiable operations, after the namespace of the op that ran,
            whose helpers live there too. Where somebody will differentiate the gradients, or there
            is no kernel, it serves.
        saved: a bool input and an input: the argument `saved` is the latter where the former is
            set, else the op's output.
    """
    define(name, schema, fake, module=name)
    sources, targets = _by_names(name, schema, backward, saved)
    formulas[name] = _formula(name, sources, targets, formula, fake_backward is not None)
    _register_autograd(_triton_library, name)
    if fake_backward:
        define(f"{name}_backward", backward, fake_backward, module=name)
    if not _extension.module:
        _register_autograd(_library, name)
        return

    def differentiable(*arguments):
        return formula(torch.ops.tilewise, *arguments)

    _library.define(f"{name}_formula{backward}")
    _library.impl(f"{name}_formula", differentiable, "CompositeImplicitAutograd")
    _extension.module.register_formula(
        name, [tuple(source) for source in sources], targets, fake_backward is not None
    )


def _by_names(
    name: str, schema: str, backward: str, saved: tuple[str, str] | None
) -> tuple[list[Source], list[int]]:
    """Of each argument of the backward pass its source; of each result the place of its input."""
    forward, behind = (torch._C.parse_schema(name + x) for x in (schema, backward))
    inputs = [x.name for x in forward.arguments]
    outputs = [x.name for x in forward.returns]

    def source(argument: str) -> Source:
        kind, _, of = argument.partition("_")
        if argument == "saved" and saved:
            return Source(input=inputs.index(saved[1]), output=0, flag=inputs.index(saved[0]))
        if argument == "grad":
            return Source(gradient=0)
        if argument in inputs:
            return Source(input=inputs.index(argument))
        if argument in outputs:
            return Source(output=outputs.index(argument))
        return Source(need=inputs.index(of)) if kind == "need" else Source(outputs.index(of))

    sources = [source(x.name) for x in behind.arguments]
    return sources, [inputs.index(x.name.removeprefix("d_")) for x in behind.returns]


def _formula(
    name: str, sources: Sequence[Source], targets: Sequence[int], formula: Callable, kernel: bool
) -> tuple[Callable, Callable]:
    def setup_context(ctx, inputs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*(x for x in outputs if not x.is_floating_point()))
        ctx.set_materialize_grads(False)
        ctx.num_inputs = len(inputs)
        kept = [source.kept(inputs, outputs) for source in sources]
        ctx.rest = [None if isinstance(x, Tensor) else x for x in kept]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in kept))

    def backward(ctx, *grads):
        result: list[Tensor | None] = [None] * ctx.num_inputs
        if all(grad is None for grad in grads):
            return tuple(result)
        saved = ctx.saved_tensors  # checkpointing lets them be read once
        given = [
            grads[source.gradient] if source.gradient is not None
            else ctx.needs_input_grad[source.need] if source.need is not None
            else rest if tensor is None else tensor
            for source, tensor, rest in zip(sources, saved, ctx.rest, strict=True)
        ]
        if kernel and not torch.is_grad_enabled():
            found = getattr(ctx.namespace, f"{name}_backward")(*given)
        else:
            found = formula(ctx.namespace, *given)
        for i, gradient in zip(targets, found if len(targets) > 1 else [found], strict=True):
            if ctx.needs_input_grad[i]:
                result[i] = gradient
        return tuple(result)

    return setup_context, backward


def _register_autograd(library: torch.library.Library, name: str) -> None:
    setup_context, backward = formulas[name]

    def with_namespace(ctx, inputs, output):
        ctx.namespace = getattr(torch.ops, library.ns)
        setup_context(ctx, inputs, output)

    torch.library.register_autograd(
        f"{library.ns}::{name}", backward, lib=library, setup_context=with_namespace
    )


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
    formulas[name] = setup_context, backward
    _register_autograd(_triton_library, name)
    if _extension.module:
        _extension.module.register_loss(name, places, flags)
    else:
        _register_autograd(_library, name)


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
if not _extension.module:
    _library.impl("scale_gradients", _scale_gradients, "CompositeExplicitAutograd")
torch.library.register_fake("tilewise::scale_gradients", _scale_gradients, lib=_library)
torch.library.register_autograd(
    "tilewise::scale_gradients", _no_second_derivative, lib=_library
)
