"""What each unit of a network sees of its input: size, stride, start and centre, layer by layer.

    result = tw.receptive_field(model, 224)
    print(result)

On the command line: `python -m tilewise.receptive_field timm:resnet18 --input 224`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from tilewise.receptive_field._result import ReceptiveField



def receptive_field(
    model: nn.Module, input_size: int | Sequence[int], *, top: str | None = None
) -> "ReceptiveField":
    r"""What each unit of each layer of a network sees of the input.

    Two ways, which have to agree, or this raises. From the picture up, by the closed form

        size_L = 1 + sum_l (ksize_l - 1) jump_{l-1},   jump_L = prod_l stride_l,
        start_L = -sum_l padding_l jump_{l-1},         centre_L = start_L + (size_L - 1) / 2

    with the layers l up to L, and from a unit down, by the recursion

        N_{l-1} = (N_l - 1) stride_l + ksize_l,        N_L = 1, and N_0 is the size

    where N_l is the number of units of layer l that the unit sees. Branches that join see the
    union. After an upsampling the field differs from unit to unit, periodically: both ways follow
    that in integers. Normalisations count element by element, as they do after training: the mean
    over all positions that a group norm takes is left out.

    Args:
        model: any module that takes one tensor; it is run once, in evaluation mode, on zeros.
        input_size: (batch, channels, ...) with one to three dimensions after these, or an int: a
            square picture with the channels that the model's first convolution takes.
        top: the module from which N_RF is counted in the table; None is the last one whose field
            has an end.

    Returns:
        layers, and methods: `field` the pixels of a unit, `measure` the same by gradients,
        `effective` how much each counts, `plot` both over a picture. `result["layer3"]` is the
        layer at a module's output. Sizes are of the smallest interval with all that is seen:
        dilated convolutions leave holes in it. Layers that read all positions (attention,
        squeeze-and-excitation, a linear layer over positions) and calls that are not known have
        no end, and `why` says so.

    Raises:
        ValueError: an input without dimensions to see, or a name in `top` that is no module.
        TypeError: the model is no module.

    Cost:
        One forward pass without arithmetic, and L^2 additions of integers for L layers.

    Paper:
        Araujo, Norris, Sim, "Computing Receptive Fields of Convolutional Neural Networks",
        Distill, 2019.
    """
    from tilewise.receptive_field import _compute  # when it is used: `import tilewise` is fast

    return _compute.receptive_field(model, input_size, top)
