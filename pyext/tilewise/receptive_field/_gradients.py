"""Fields by gradients: of a model whose paths cannot cancel, and of the model as it is."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from tilewise.receptive_field._result import ReceptiveField

IDENTITY = frozenset((
    "relu", "relu6", "hardtanh", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu",
    "mish", "softplus", "hardswish", "hardsigmoid", "sigmoid", "tanh", "batch_norm", "layer_norm",
    "group_norm", "instance_norm", "rms_norm", "dropout", "dropout2d", "dropout3d",
))  # fmt: skip


def measure(result: "ReceptiveField", name: str, unit: tuple[int, ...]
            ) -> tuple[tuple[int, ...], tuple[int, ...]]:  # fmt: skip
    """The first and last pixel with a gradient; last < first along all dimensions without any."""
    model = copy.deepcopy(result.model).double()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.fill_(0 if key.endswith("bias") else 1 / max(weight.shape[1:].numel(), 1))
    device = next(model.parameters(), torch.zeros(())).device
    x = torch.ones(result.input_size, dtype=torch.float64, device=device)
    with _Monotone():
        gradient = _gradient(model, x, name, result._modules[name], unit)
    places = gradient.flatten(0, 1).any(0).nonzero()
    if not len(places):
        return (0,) * places.shape[1], (-1,) * places.shape[1]
    return tuple(places.amin(0).tolist()), tuple(places.amax(0).tolist())


def effective(result: "ReceptiveField", x: Tensor, name: str, unit: tuple[int, ...]) -> Tensor:
    """|gradient|, summed over colours, its largest element 1."""
    if tuple(x.shape) != result.input_size:
        raise ValueError(f"x: expected the shape {result.input_size}, got {tuple(x.shape)}")
    gradient = _gradient(result.model, x.detach(), name, result._modules[name], unit)
    size = gradient.abs().sum((0, 1))
    return size / size.max().clamp_min(torch.finfo(size.dtype).tiny)


def _gradient(model: nn.Module, x: Tensor, name: str, node: fx.Node, unit: tuple[int, ...]
              ) -> Tensor:  # fmt: skip
    """Of the sum over everything that a module returns at a unit's place."""
    x = x.clone().requires_grad_()
    output = _output(model, x, name, node.meta["shape"])
    for place, dim in enumerate(node.meta["dims"]):
        at = torch.ones([size for _, size in dim], dtype=x.dtype, device=x.device)
        for i, (axis, size) in enumerate(dim):
            if axis is not None and size > 1:
                here = torch.zeros(size, dtype=x.dtype, device=x.device)
                here[unit[axis]] = 1
                at = at * here.reshape([-1 if j == i else 1 for j in range(len(dim))])
        output = output * at.reshape([-1 if i == place else 1 for i in range(output.dim())])
    return torch.autograd.grad(output.sum(), x)[0]


def _output(model: nn.Module, x: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """What a module returns on a picture, in its last call."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        found[:] = [tensor for tensor in tensors if tuple(tensor.shape) == shape]

    hook = model.get_submodule(name).register_forward_hook(keep)
    try:
        with _evaluation(model), torch.enable_grad():
            model(x)
    finally:
        hook.remove()
    return found[0]


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Monotone(TorchFunctionMode):
    """Activations and normalisations return their input, maxima means: no gradient is lost."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
                           ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if name in IDENTITY:
            return args[0] if args else kwargs["input"]
        if name.startswith("max_pool"):
            return _mean_pool(func, *args, **kwargs)
        if name.startswith("adaptive_max_pool"):
            return getattr(F, name.replace("max", "avg"))(*args[:2])
        return func(*args, **kwargs)


def _mean_pool(func: Callable, input: Tensor, kernel_size: Any, stride: Any = None,
               padding: Any = 0, dilation: Any = 1, *args: Any, **kwargs: Any
               ) -> Tensor:  # fmt: skip
    """The mean over a maximum's windows, as a convolution, which may be dilated."""
    shape = func(input, kernel_size, stride, padding, dilation, *args, **kwargs).shape
    count, channels = input.dim() - 2, input.shape[1]
    sizes = [kernel_size] * count if isinstance(kernel_size, int) else list(kernel_size)
    weight = torch.ones([channels, 1, *sizes], dtype=input.dtype, device=input.device)
    longer = F.pad(input, [0, max(sizes) * 2] * count)  # for windows that lean over, in ceil_mode
    mean = getattr(F, f"conv{count}d")(
        longer, weight / weight[0].numel(), None, stride or kernel_size, padding, dilation, channels
    )
    return mean[(..., *(slice(size) for size in shape[2:]))]
