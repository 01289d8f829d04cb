"""What `receptive_field` returns: a table of layers, and the field of any unit."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from tilewise.receptive_field import _directions, _table
from tilewise.receptive_field._steps import Step


class Layer(NamedTuple):
    """A layer's field along each dimension of the input, in pixels, which are counted from 0."""

    name: str  # of the module that calls it
    op: str
    units: tuple[int, ...]  # of its output
    ksize: tuple[float, ...]  # its own window, in units of the layer below; inf: all
    stride: tuple[float | Fraction, ...]
    size: tuple[float, ...]  # of the largest field, if it differs from unit to unit; inf: no end
    jump: tuple[float | Fraction, ...]  # pixels from a unit to the next; nan: differs
    start: tuple[float, ...]  # the first pixel that unit 0 sees: negative in the padding
    centre: tuple[float, ...]  # the middle of what unit 0 sees
    seen: tuple[float, ...]  # N_RF: how many of its units one unit of `ReceptiveField.top` sees
    why: str  # there is no end, or no jump


class Field(NamedTuple):
    """The pixels that a unit sees: `picture[..., *field.slices()]` is the smallest box of them."""

    first: tuple[int, ...]
    last: tuple[int, ...]

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(b - a + 1 for a, b in zip(self.first, self.last, strict=True))

    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, b + 1) for a, b in zip(self.first, self.last, strict=True))


@dataclass(frozen=True)
class ReceptiveField:
    """Of every layer of a model what its units see of the input; printed, it is a table."""

    model: nn.Module
    input_size: tuple[int, ...]
    layers: tuple[Layer, ...]
    top: int  # the layer from which N_RF is counted
    graph: fx.Graph
    _steps: tuple[Step, ...]
    _modules: dict[str, fx.Node]

    def __str__(self) -> str:
        return _table.text(self)

    def __getitem__(self, name: str) -> Layer:
        """The layer whose output the module of this name returns; "" is the model."""
        return self.layers[self._place(name)]

    def field(self, layer: str | None = None, unit: Sequence[int] | int | None = None) -> Field:
        """The pixels that one unit sees, exactly, with borders: padding is no pixel.

        Args:
            layer: a module's name, "layer3.1.conv2" or "layer3"; None is the table's top layer.
            unit: its place in the layer's output, as many numbers as the input has dimensions; an
                int along all of them; None is the middle.

        Returns:
            first and last pixel along each dimension; last < first where it sees none.

        Raises:
            KeyError: no module of this name depends on the input.
            IndexError: a unit outside the output.
        """
        place = self._place(layer)
        units = self._unit(self._steps[place].sizes, unit)
        seen = _directions.within(self._steps, place, units)
        box = seen.get(0, ((0, -1),) * len(units))
        return Field(tuple(a for a, _ in box), tuple(b for _, b in box))

    def measure(self, layer: str | None = None, unit: Sequence[int] | int | None = None) -> Field:
        """The same by gradients: the pixels with a gradient when all weights are positive.

        A copy of the model, in float64, whose weights are averages, whose activations are the
        identity and whose maxima are means, so that no two paths cancel. Slow, and independent of
        everything else here: the tests compare the two.

        Args:
            layer, unit: as `field` has them; the layer has to be a module.
        """
        from tilewise.receptive_field import _gradients

        return Field(*_gradients.measure(self, *self._module(layer, unit)))

    def effective(self, x: Tensor, layer: str | None = None,
                  unit: Sequence[int] | int | None = None) -> Tensor:  # fmt: skip
        r"""How much each pixel counts for a unit of the model as it is: its effective field.

            e(pixel) = sum over colours of |d (sum over channels of the unit) / d pixel|

        Args:
            x: (1, channels, ...), of the size that the fields were computed for.
            layer, unit: as `field` has them; the layer has to be a module.

        Returns:
            the input's size without batch and channels. Its largest element is 1.

        Paper:
            Luo, Li, Urtasun, Zemel, "Understanding the Effective Receptive Field in Deep
            Convolutional Neural Networks", 2016.
        """
        from tilewise.receptive_field import _gradients

        return _gradients.effective(self, x, *self._module(layer, unit))

    def plot(self, x: Tensor, layer: str | None = None, unit: Sequence[int] | int | None = None,
             path: str | Path | None = None) -> Any:  # fmt: skip
        """Draws a unit's field as a frame on the picture, and beside it the effective one.

        Args:
            x: (1, channels, height, width), a picture as the model takes it.
            layer, unit: as `field` has them; the layer has to be a module.
            path: where to save the picture; None leaves that to the caller.

        Returns:
            matplotlib's figure. Nothing else here needs matplotlib.
        """
        from tilewise.receptive_field import _picture

        return _picture.draw(self, x, *self._module(layer, unit), path)

    def _place(self, name: str | None) -> int:
        if name is None:
            return self.top
        if name not in self._modules:
            raise KeyError(f"layer: no module {name!r} that depends on the input; see .names()")
        return self._modules[name].meta["step"]

    def names(self) -> list[str]:
        """The modules that `field` and its like take, in the order in which they end."""
        return list(self._modules)

    def _module(self, layer: str | None, unit: Any) -> tuple[str, tuple[int, ...]]:
        """A module's name, whose output is the layer asked for, and the unit."""
        if layer is None:
            ends = [n for n, node in self._modules.items() if node.meta["step"] == self.top]
            if not ends:
                raise KeyError("layer: the top layer is no module's output; choose of .names()")
            layer = ends[0]
        place = self._place(layer)
        return layer, self._unit(self._steps[place].sizes, unit)

    def _unit(self, sizes: tuple[int, ...], unit: Any) -> tuple[int, ...]:
        if unit is None:
            return tuple(size // 2 for size in sizes)
        units = (unit,) * len(sizes) if isinstance(unit, int) else tuple(unit)
        if len(units) != len(sizes) or any(
            not -n <= i < n for i, n in zip(units, sizes, strict=True)
        ):
            raise IndexError(f"unit: expected a place in an output of {sizes}, got {unit}")
        return tuple(i % n for i, n in zip(units, sizes, strict=True))
