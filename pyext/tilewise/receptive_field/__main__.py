"""The table of a model by its name.

    python -m tilewise.receptive_field timm:resnet18 --input 224
    python -m tilewise.receptive_field torchvision:vgg16 --top features --check
    python -m tilewise.receptive_field my_package.nets:make --picture photo.png --out field.png
"""

import argparse
import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor, nn

from tilewise.receptive_field import receptive_field
from tilewise.receptive_field._result import ReceptiveField


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tilewise.receptive_field", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("model", help="timm:NAME, torchvision:NAME or module:function")
    parser.add_argument("--input", type=_size, default=224,
                        help="224, or batch,channels,height,width")  # fmt: skip
    parser.add_argument("--top", help="the module from which N_RF is counted")
    parser.add_argument("--unit", type=_size, help="row,column; the middle one if not given")
    parser.add_argument("--check", action="store_true", help="measure the field by gradients")
    parser.add_argument("--picture", help="draw the unit's field over this picture")
    parser.add_argument("--out", default="receptive_field.png", help="where to draw it")
    options = parser.parse_args(arguments)

    result = receptive_field(load(options.model), options.input, top=options.top)
    print(result)
    unit = "middle unit" if options.unit is None else f"unit {options.unit}"
    print(f"{unit}: {_pixels(result.field(options.top, options.unit))}")
    if options.check:
        print(f"by gradients: {_pixels(result.measure(options.top, options.unit))}")
    if options.picture:
        x = _picture(options.picture, result)
        result.plot(x, options.top, options.unit, options.out)
        print(f"drawn: {options.out}")


def load(name: str) -> nn.Module:
    """A model with random weights, by the name that the command line takes."""
    place, _, what = name.partition(":")
    if not what:
        raise SystemExit(f"model: expected timm:NAME, torchvision:NAME or module:function: {name}")
    if place == "timm":
        return _timm().create_model(what)
    if place == "torchvision":
        import_torchvision()
        return importlib.import_module("torchvision.models").get_model(what, weights=None)
    sys.path.insert(0, "")
    return getattr(importlib.import_module(place), what)()


def _timm() -> Any:
    if importlib.util.find_spec("timm") is None:
        raise SystemExit("model: timm:NAME needs timm: pip install timm")
    import_torchvision()
    return importlib.import_module("timm")


_declared: list[Any] = []  # a library that is dropped takes its schemas along


def import_torchvision() -> None:
    """Imports torchvision, also one built for another torch, whose C++ operators do not load.

    It stops at the first of them that it misses, and so does what imports it, as timm does;
    declared, they are not missed until they are called, and no classifier calls them.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        for op in ("nms", "qnms"):
            _declared[-1].define(
                f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        importlib.import_module("torchvision")


def _size(text: str) -> int | tuple[int, ...]:
    numbers = tuple(int(part) for part in text.replace("x", ",").split(","))
    return numbers[0] if len(numbers) == 1 else numbers


def _pixels(field: Any) -> str:
    ends = zip(field.first, field.last, strict=True)
    return " x ".join(f"{first} to {last}" for first, last in ends) + " (first to last pixel)"


def _picture(path: str, result: ReceptiveField) -> Tensor:
    """A file as the model takes it: values from 0 to 1, cut to the middle square and scaled."""
    import numpy as np
    from PIL import Image, ImageOps

    channels, height, width = result.input_size[1:]
    with Image.open(path) as file:
        image = ImageOps.fit(file.convert("L" if channels == 1 else "RGB"), (width, height))
    pixels = torch.from_numpy(np.asarray(image).copy()).float() / 255
    return pixels.reshape(1, height, width, channels).permute(0, 3, 1, 2)


if __name__ == "__main__":
    main()
