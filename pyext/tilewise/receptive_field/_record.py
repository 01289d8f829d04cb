"""What a model does to its input, as a torch.fx graph of ATen calls.

torch.fx's symbolic tracing stops at the first `if` that looks at a shape, and meets a layer under
many names (a module, a function, a method). Below, at the dispatcher, every layer has one name,
and the model just runs: on meta tensors, which have shapes and no numbers, or, where it looks at
numbers, on real ones. Forward hooks say which module each call belongs to.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Recording:
    """The graph; each node's meta has its "shape" and "module"; the node that a module returned."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.outputs: dict[str, fx.Node] = {}
        self.kept: list[Tensor] = []  # so that no id is given twice
        self.nodes: dict[int, fx.Node] = {}  # by the id of a tensor that depends on the input
        self.written: dict[int, fx.Node] = {}  # by the storage that an in-place call wrote to

    def add(self, node: fx.Node, tensor: Tensor, module: str) -> None:
        node.meta.update(shape=tuple(tensor.shape), module=module, order=len(self.kept))
        self.kept.append(tensor)
        self.nodes[id(tensor)] = node

    def write(self, tensor: Tensor) -> None:
        """A call wrote to it in place: whoever looks at the same memory sees the new values."""
        self.written[_storage(tensor)] = self.nodes[id(tensor)]

    def find(self, tensor: Any) -> fx.Node | None:
        """The node of a tensor that depends on the input."""
        if not isinstance(tensor, Tensor):
            return None
        node, writer = self.nodes.get(id(tensor)), self.written.get(_storage(tensor))
        if writer is None or node is not None and node.meta["order"] >= writer.meta["order"]:
            return node
        parts = (writer,) if node is None else (node, writer)
        changed = self.graph.call_function(written_through_a_view, parts)
        self.add(changed, tensor, writer.meta["module"])
        return changed

    def argument(self, value: Any) -> Any:
        """A call's argument as the graph has it."""
        node = self.find(value)
        if node is None and isinstance(value, Tensor):
            node = self.graph.create_node("get_attr", "constant")  # a weight: its shape is all
            node.meta.update(shape=tuple(value.shape), module="")
        return value if node is None else node


def written_through_a_view(*parts: Any) -> None:
    """Stands in the graph for a tensor of whose memory a part was overwritten."""


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def record(model: nn.Module, shape: tuple[int, ...], known: Callable[[Any], bool]) -> Recording:
    """Runs the model, in evaluation, on zeros; calls that are not `known` are taken apart."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        try:
            return _run(model, shape, known, "meta")
        except Exception:  # it looks at numbers, or makes tensors of its own
            return _run(model, shape, known, None)
    finally:
        for module in training:
            module.training = True


def _run(model: nn.Module, shape: tuple[int, ...], known: Callable, device: str | None
         ) -> Recording:  # fmt: skip
    """On a device's zeros; None is where the model is."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    x = next(iter(model.parameters()), torch.zeros(())).detach().new_zeros(shape, device=device)
    if device is not None:
        state = {name: value.detach().to(device) for name, value in state.items()}
    recording = Recording()
    recording.add(recording.graph.placeholder("x"), x, "")
    with _module_names(model, recording) as names, _plain_layers(), torch.inference_mode():
        with _Recorder(recording, names, known):
            torch.func.functional_call(model, state, (x,))
    recording.kept.clear()
    return recording


class _Recorder(TorchDispatchMode):
    """Adds each call on something that depends on the input to the graph."""

    def __init__(self, recording: Recording, names: list[str], known: Callable) -> None:
        super().__init__()
        self.recording, self.names, self.known = recording, names, known

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(self.recording.find(value) for value in leaves):
            return func(*args, **kwargs)
        if not self.known(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self._add(func, args, kwargs, result)
        return result

    def _add(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        tensors = [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]
        if not tensors:
            return
        recording, module = self.recording, self.names[-1]
        args, kwargs = pytree.tree_map(recording.argument, (list(args), kwargs))
        call = recording.graph.call_function(func, tuple(args), kwargs)
        call.meta.update(shape=tuple(tensors[0].shape), module=module)
        if isinstance(result, Tensor):
            recording.add(call, result, module)
            if func._schema.is_mutable:
                recording.write(result)
            return
        for i, tensor in enumerate(tensors):
            part = recording.graph.call_function(operator.getitem, (call, i))
            recording.add(part, tensor, module)


@contextmanager
def _plain_layers() -> Iterator[None]:
    """Deterministic algorithms off, with which torch takes an interpolation apart."""
    asked = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=warn_only)


@contextmanager
def _module_names(model: nn.Module, recording: Recording) -> Iterator[list[str]]:
    """A stack of the names of the modules that run; notes what each returns."""
    names = {module: name for name, module in model.named_modules()}
    stack = [""]

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(names.get(module, stack[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        name = stack.pop()
        for value in pytree.tree_leaves(output):
            if id(value) in recording.nodes:
                recording.outputs[name] = recording.nodes[id(value)]
                break

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()
