"""Imports the packages that we compare with."""

import importlib.util

import torch

_schemas = []


def open_clip():
    """open_clip, whose torchvision wheel may be built for another torch than a CPU one.

    Declaring the two operators that its import asks for is enough: nothing here calls them.
    """
    if not _schemas and importlib.util.find_spec("torchvision"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.append(library)
    import open_clip

    return open_clip
