"""Finds memory errors of a Triton kernel while the interpreter runs it.

    with checked({kernel: ["y_ptr"]}):  # and its outputs
        launcher(x)  # whatever launches `kernel`, any number of times

raises MemoryFault at the end of the first launch in which a program

- touched memory outside of its tensors, or read elements of an input that its view leaves out;
- stored to a tensor that is not an output, or twice to the same element;
- loaded an output element before storing to it;
- touched an element of an output that another program touched (a race on a GPU);
- used an atomic: on the default path nothing may depend on the order of programs;

or in which an element of an output was never stored. An output may be a view of a larger tensor:
its whole storage may be stored to, the view must be. What is an input too may be loaded before it
is stored to, by the program that does it.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple
from unittest import mock

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
    interpreter_builder,
)
from triton.tools.tensor_descriptor import TensorDescriptor

NOBODY = -1


class MemoryFault(AssertionError):
    """What a kernel did wrong, with program, argument and element of its storage."""


class Updated(str):
    """An output that holds what an earlier launch left: it may be loaded, and stored in parts."""


class _Memory:
    """The storage of one or more arguments, and which program touched each of its elements."""

    def __init__(self, tensor: Tensor):
        storage = tensor.untyped_storage()
        self.names: list[str] = []
        self.start, self.stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self.itemsize = tensor.element_size()
        count = storage.nbytes() // self.itemsize
        self.readable = np.zeros(count, bool)
        self.required = np.zeros(count, bool)
        self.is_output = False
        self.in_place = False  # an input and an output
        self.writer = np.full(count, NOBODY)
        self.reader = np.full(count, NOBODY)

    def add(self, name: str, tensor: Tensor, outputs: Sequence[str]) -> None:
        is_output = name in outputs
        self.in_place |= bool(self.names) and self.is_output != is_output
        self.in_place |= any(isinstance(x, Updated) for x in outputs if x == name)
        self.names.append(name)
        self.is_output |= is_output
        elements = np.array(tensor.storage_offset())
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            elements = elements[..., None] + np.arange(length) * stride
        if not is_output:
            self.readable[elements] = True
        elif not any(isinstance(x, Updated) for x in outputs if x == name):
            self.required[elements] = True


class _Launch:
    """Follows one launch; keeps the first fault."""

    def __init__(self, arguments: dict, outputs: Sequence[str]):
        memories: dict[int, _Memory] = {}
        for name, value in arguments.items():
            value = value.base if isinstance(value, TensorDescriptor) else value
            if isinstance(value, Tensor):
                key = value.untyped_storage().data_ptr()
                memories.setdefault(key, _Memory(value)).add(name, value, outputs)
        self.memories = sorted(memories.values(), key=lambda memory: memory.start)
        self.fault: str | None = None

    def report(self, fault: str) -> None:
        if self.fault is None:
            x, y, z = interpreter_builder.grid_idx
            self.fault = f"program ({x}, {y}, {z}) {fault}"

    def access(self, pointers: TensorHandle, mask: TensorHandle, verb: str) -> TensorHandle:
        """Checks an access; returns the mask without what lies outside of every tensor."""
        addresses = np.asarray(pointers.data).astype(np.int64)
        inside = np.zeros(addresses.shape, bool)
        active = np.broadcast_to(np.asarray(mask.data).astype(bool), addresses.shape)
        for memory in self.memories:
            here = (addresses >= memory.start) & (addresses < memory.stop)
            inside |= here
            if (here & active).any():
                self.check(memory, (addresses[here & active] - memory.start), verb)
        if (active & ~inside).any():
            self.report(f"{verb}s out of bounds, at address {addresses[active & ~inside][0]:#x}")
        return TensorHandle(active & inside, tl.int1)

    def check(self, memory: _Memory, offsets: np.ndarray, verb: str) -> None:
        elements = offsets // memory.itemsize
        x, y, z = interpreter_builder.grid_idx
        width, height, _ = interpreter_builder.grid_dim
        program = x + width * (y + height * z)

        def expect(fine: np.ndarray, fault: str) -> None:
            if not fine.all():
                self.report(f"{fault} {'/'.join(memory.names)}, element {elements[~fine][0]}")

        writer, reader = memory.writer[elements], memory.reader[elements]
        if verb == "load" and memory.is_output:
            if not memory.in_place:
                expect(writer != NOBODY, "loads, before any store,")
            mine = (writer == program) | (writer == NOBODY)
            expect(mine, "races: it loads what another program stores:")
            memory.reader[elements] = program
        elif verb == "load":
            expect(memory.readable[elements], "loads out of bounds of the view:")
        else:
            if not memory.is_output:
                self.report(f"stores to {'/'.join(memory.names)}, which is no output")
            expect((writer == NOBODY) | (writer == program), "races: two programs store to")
            expect((reader == NOBODY) | (reader == program), "races: another program loads")
            expect(writer != program, "stores twice to")
            if len(np.unique(elements)) != len(elements):
                self.report(f"stores twice to {'/'.join(memory.names)} in one instruction")
            memory.writer[elements] = program

    def finish(self) -> None:
        for memory in self.memories:
            missing = memory.required & (memory.writer == NOBODY)
            if self.fault is None and missing.any():
                self.fault = (
                    f"no program stores to {'/'.join(memory.names)}, "
                    f"{missing.sum()} elements from {int(missing.argmax())}"
                )
        if self.fault:
            raise MemoryFault(self.fault)


class Launch(NamedTuple):
    kernel: str
    arguments: dict


@contextlib.contextmanager
def checked(
    outputs: Mapping[InterpretedFunction, Sequence[str]]
) -> Iterator[list[Launch]]:
    """Checks every launch of these kernels inside the block; yields the list of launches.

    `outputs`: of each kernel, the arguments that it has to fill.
    """
    launches: list[Launch] = []
    current: list[_Launch] = []
    run = InterpretedFunction.run
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_run(self, *args, grid, warmup, **kwargs):
        if self not in outputs:
            current.clear()
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)
        signature = inspect.signature(self.fn)
        named = {k: v for k, v in kwargs.items() if k in signature.parameters}
        arguments = signature.bind(*args, **named).arguments
        launches.append(Launch(self.fn.__name__, arguments))
        current[:] = [_Launch(arguments, outputs[self])]
        run(self, *args, grid=grid, warmup=warmup, **kwargs)
        current[0].finish()

    def checked_load(self, pointers, mask, *rest, **options):
        if current:
            mask = current[0].access(pointers, mask, "load")
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self, pointers, value, mask, *rest, **options):
        if current:
            mask = current[0].access(pointers, mask, "store")
        return store(self, pointers, value, mask, *rest, **options)

    def refuse(self, *args, **kwargs):
        current[0].report("uses an atomic, whose order is not fixed")
        raise MemoryFault(current[0].fault)

    with (
        mock.patch.object(InterpretedFunction, "run", checked_run),
        mock.patch.multiple(
            InterpreterBuilder, create_masked_load=checked_load, create_masked_store=checked_store,
            create_atomic_rmw=refuse, create_atomic_cas=refuse,
        ),
    ):
        yield launches
