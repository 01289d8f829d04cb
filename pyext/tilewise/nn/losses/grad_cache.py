"""grad_cache: a step on a batch whose activations do not fit, with the gradients of the whole."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tilewise import _numbers

Tower = Callable[..., Any]  # usually an nn.Module
PLAIN = (type(None), bool, int, float)  # leaves of inputs that every micro-batch gets as they are


def grad_cache(
    towers: Tower | list[Tower] | tuple[Tower, ...],
    loss: Callable[..., Tensor],
    *inputs: Any,
    micro_batch: int,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """A training step's forward and backward pass, with the activations of one micro-batch.

        features = towers(inputs)                       micro-batch by micro-batch, no graph
        value = loss(features), d_features              over the whole batch, once
        towers(inputs), backward from d_features        micro-batch by micro-batch

    Leaves in `.grad` what `loss(towers(inputs)).backward()` would add to it: gradients of the
    towers, and of what else the loss uses (scale, bias). Call it where that stands, then step.

    Args:
        towers: a module or function, called as `towers(*inputs)`; or a list of them, of which each
            gets the input of its place. Returns a tensor or a list, tuple or dictionary of tensors
            of features, with a row for each row of its inputs. A tensor () among them, like the
            logit_scale that open_clip's models return, is one number for the whole batch.
        loss: gets the features of the whole batch: `loss(features)`, `loss(*features)` for a list
            or tuple or several towers, `loss(**features)` for a dictionary. Returns a tensor ().
        inputs: tensors of as many rows each, or lists, tuples and dictionaries of such, which are
            cut into micro-batches; None and numbers go to each. They may wait on another device,
            if the tower moves what it gets.
        micro_batch: rows of a micro-batch; the last one may be smaller.
        scaler: scales the loss for its backward pass, as `scaler.scale(value).backward()` does.

    Returns:
        The loss, detached and unscaled. Where gradients are disabled, nothing more is done.

    The second pass repeats the first: random numbers of torch (dropout, our samples) are the same,
    on the CPU and on CUDA devices, buffers begin as in the first (statistics of batch
    normalisation move once). Under autocast both passes are. A tower without a parameter that asks
    for a gradient runs once. DistributedDataParallel reduces once, in the last micro-batch; so
    must every parameter have a gradient there, or `find_unused_parameters`. Wrapped towers must be
    given as they are, not inside a function.

    Not the gradients of the whole: layers that mix rows, like batch normalisation, which see
    micro-batches; random numbers of numpy.

    Cost: a forward pass more than without (4/3 of the towers' time), the loss once. Memory of one
    micro-batch's pass, and O(B * D) for the features and their gradients.

    Raises:
        ValueError, TypeError: inputs of unequal lengths, or of another kind than above, or that
            ask for a gradient.

    Paper: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup,
    RepL4NLP 2021.

    Example:
        >>> value = tw.nn.grad_cache(
        ...     [image_tower, text_tower], lambda x, y: tw.sigmoid_loss(x, y, scale.exp(), bias),
        ...     images, tokens, micro_batch=256,
        ... )
        >>> optimizer.step()
    """
    size = _numbers.integer("micro_batch", micro_batch, least=1)
    caches = _caches(towers, inputs, size)
    training = torch.is_grad_enabled()
    with torch.no_grad(), _buffers_restored([cache.module for cache in caches if training]):
        features = [cache.features() for cache in caches]
    torch.clear_autocast_cache()  # weights cast there have no graph; newer torch sees to it itself

    given = features if isinstance(towers, (list, tuple)) else features[0]
    if isinstance(given, dict):
        value = loss(**given)
    else:
        value = loss(*given) if isinstance(given, (list, tuple)) else loss(given)
    if training:
        with _no_autocast(value):
            (value if scaler is None else scaler.scale(value)).backward()
        asked = [cache for cache in caches if any(x is not None for x in cache.gradients())]
        for i, cache in enumerate(asked):
            shared = any(other.module is cache.module for other in asked[i + 1 :])
            cache.backward(reduce=not shared)
    return value.detach()


def _caches(
    towers: Tower | list[Tower] | tuple[Tower, ...], inputs: tuple, size: int
) -> list["_Cache"]:
    if not isinstance(towers, (list, tuple)):
        return [_Cache(towers, _split(inputs, size))]
    if len(towers) != len(inputs):
        raise ValueError(f"inputs: expected {len(towers)}, one a tower, got {len(inputs)}")
    return [_Cache(tower, _split((x,), size)) for tower, x in zip(towers, inputs, strict=True)]


class _Cache:
    """A tower's micro-batches: what they need to be computed again, and their features."""

    def __init__(self, tower: Tower, micro_batches: list[tuple]):
        self.tower, self.micro_batches = tower, micro_batches
        self.module = tower if isinstance(tower, nn.Module) else None
        self.random: list[list[Tensor]] = []  # states of the generators before each
        self.leaves: list[Any] = []  # what comes out for the whole batch
        self.rows: list[list[int]] = []  # how much of it each micro-batch gave

    def features(self) -> Any:
        """The first pass; its results are leaves of the loss's graph."""
        parts = []
        for inputs in self.micro_batches:
            self.random.append(_random_states())
            leaves, structure = pytree.tree_flatten(self.tower(*inputs))
            parts.append(leaves)
        self.rows = [[len(x) if _has_rows(x) else 1 for x in leaves] for leaves in parts]
        self.leaves = [torch.cat(x) if _has_rows(x[0]) else x[0] for x in zip(*parts, strict=True)]
        if self.module is None or _learns(self.module):
            for i, x in enumerate(self.leaves):
                if isinstance(x, Tensor) and x.is_floating_point():
                    self.leaves[i] = x.detach().requires_grad_()
        return pytree.tree_unflatten(self.leaves, structure)

    def gradients(self) -> list[Tensor | None]:
        """Of the loss in each of the results."""
        return [x.grad if isinstance(x, Tensor) else None for x in self.leaves]

    def backward(self, reduce: bool) -> None:
        """The second pass, from the gradients of the features to those of the parameters."""
        parts = [self._parts(grad, k) for k, grad in enumerate(self.gradients())]
        last = len(self.micro_batches) - 1
        for number, inputs in enumerate(self.micro_batches):
            sync = contextlib.nullcontext() if reduce and number == last else self._no_sync()
            with sync:
                with _replayed(self.random[number]):
                    outputs = pytree.tree_leaves(self.tower(*inputs))
                ends = [
                    (x, part[number]) for x, part in zip(outputs, parts, strict=True)
                    if part[number] is not None and x.requires_grad
                ]
                if ends:
                    with _no_autocast(ends[0][0]):
                        torch.autograd.backward([x for x, _ in ends], [grad for _, grad in ends])

    def _parts(self, grad: Tensor | None, k: int) -> Sequence[Tensor | None]:
        """Each micro-batch's part of the gradient of result k; the last one's, of one number."""
        if grad is None or grad.dim() == 0:
            return [None] * (len(self.rows) - 1) + [grad]
        return grad.split([rows[k] for rows in self.rows])

    def _no_sync(self) -> contextlib.AbstractContextManager:
        """Where a wrapper for several processes adds up gradients without reducing them."""
        no_sync = getattr(self.module, "no_sync", None)
        return no_sync() if no_sync else contextlib.nullcontext()


@contextlib.contextmanager
def _buffers_restored(modules: list[nn.Module | None]) -> Iterator[None]:
    """In training a pass may move buffers; the second is to begin as the first."""
    moving = [m for m in modules if m is not None and m.training and _learns(m)]
    buffers = {id(x): x for m in moving for x in m.buffers()}
    before = {key: x.clone() for key, x in buffers.items()}
    yield
    for key, x in buffers.items():
        x.copy_(before[key])


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _has_rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0


def _split(inputs: tuple, size: int) -> list[tuple]:
    """Micro-batches of a tower's inputs."""
    leaves, structure = pytree.tree_flatten(inputs)
    for x in leaves:
        if not isinstance(x, (Tensor, *PLAIN)):
            raise TypeError(
                "inputs: expected tensors, in lists, tuples and dictionaries, got "
                f"{type(x).__name__}"
            )
        if isinstance(x, Tensor) and x.requires_grad:
            raise ValueError("inputs: expected none that asks for a gradient, got requires_grad")
    lengths = sorted({len(x) for x in leaves if _has_rows(x)})
    if len(lengths) != 1:
        raise ValueError(f"inputs: expected tensors of as many rows each, got {lengths}")
    count = max(-(-lengths[0] // size), 1)
    columns = [x.split(size) if _has_rows(x) else [x] * count for x in leaves]
    return [pytree.tree_unflatten(list(part), structure) for part in zip(*columns, strict=True)]


def _random_states() -> list[Tensor]:
    """Of the generators that torch draws from by default: the CPU's, then each CUDA device's."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if _on_cuda() else [])]


def _set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


@contextlib.contextmanager
def _replayed(states: list[Tensor]) -> Iterator[None]:
    """Random numbers as they were then; after it as they are now."""
    now = _random_states()
    _set_random_states(states)
    try:
        yield
    finally:
        _set_random_states(now)


def _on_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A backward pass computes in what its forward pass did."""
    return torch.autocast(x.device.type, enabled=False)
