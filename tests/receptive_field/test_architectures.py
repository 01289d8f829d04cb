"""Networks of timm: the field equals the one that gradients show, and figures that are published.

Weights are random, and sizes long and narrow: along the height the whole field fits into it.
"""

import importlib
import math

import pytest

import tilewise as tw
from tilewise.receptive_field.__main__ import load

pytestmark = pytest.mark.usefixtures("one_thread")

# name: module, height, size and jump
QUICK = {
    "resnet18": ("layer4", 512, 435, 32),
    "mobilenetv2_050": ("blocks", 544, 491, 32),
    "efficientnet_b0": ("blocks.0.0.bn1", 64, 7, 2),
    "convnext_atto": ("stages.1", 192, 152, 8),
    "inception_v3": ("Mixed_6a", 224, 159, 16),
}
SLOW = {
    "densenet121": ("features.denseblock2", 288, 255, 8),
    "vgg11": ("features", 192, 150, 32),
    "resnet50": ("layer4", 480, 427, 32),
    "resnet26d": ("layer3", 448, 103, 16),
    "seresnet50": ("layer1.0.conv3", 64, 19, 4),
    "wide_resnet50_2": ("layer2", 192, 91, 8),
    "resnext50_32x4d": ("layer3", 352, 267, 16),
    "res2net50_26w_4s": ("layer2", 416, 219, 8),
    "mobilenetv3_small_050": ("conv_stem", 64, 3, 2),
    "mnasnet_050": ("blocks.3", 224, 267, 16),
    "efficientnet_lite0": ("blocks", 896, 851, 32),
    "mixnet_s": ("blocks.0", 64, 7, 2),
    "ghostnet_050": ("blocks.1", 64, 27, 4),
    "regnetx_002": ("s3", 352, 127, 16),
    "dla34": ("level4", 448, 399, 16),
    "hrnet_w18_small": ("stage2", 352, 87, 4),
    "darknet53": ("stages.3", 352, 437, 16),
    "cspresnet50": ("stages.1", 256, 91, 8),
    "repvgg_a0": ("stages.2", 352, 503, 16),
    "xception41": ("blocks.3", 256, 187, 16),
    "inception_v4": ("features.9", 352, 183, 8),
    "convnextv2_atto": ("stages.0.blocks.0.conv_dw", 64, 28, 4),
}


def check(name, module, height, size, jump):
    width = 96 if "inception" in name else 64  # less ends before the last layer
    result = tw.receptive_field(load(f"timm:{name}"), (1, 3, height, width), top=module)
    layer = result[module]
    assert layer.size == (size, size)
    assert layer.jump == (jump, jump)
    rows = layer.units[0]
    for unit in ((rows // 2, 0), (rows - 1, layer.units[1] - 1)):
        assert result.field(module, unit) == result.measure(module, unit)
    if size < height:
        assert result.field(module).size[0] == size
    return result


@pytest.mark.parametrize("name", QUICK)
def test_network(name):
    result = check(name, *QUICK[name])
    assert math.inf in result[""].size  # the mean over the picture before the classifier


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_networks(name):
    check(name, *SLOW[name])


@pytest.mark.slow
@pytest.mark.parametrize("output_stride", [16, 8])
def test_dilated_networks(output_stride):
    """Strides that became dilations: a finer grid, and a field of the same size."""
    load("timm:resnet18")  # makes timm importable, also beside a torchvision for another torch
    net = importlib.import_module("timm").create_model("resnet50", output_stride=output_stride)
    result = tw.receptive_field(net, (1, 3, 544, 64), top="layer4")
    assert result["layer4"].jump == (output_stride,) * 2
    assert result["layer4"].size == (427, 427)
    assert result.field() == result.measure() and result.field().size[0] == 427


def test_what_sees_everything_says_why():
    """Squeeze-and-excitation: a mean over all positions in every block."""
    result = tw.receptive_field(load("timm:efficientnet_b0"), 64)
    assert result["blocks.0.0.bn1"].size == (7, 7)
    assert result["blocks.0.0"].size == (math.inf, math.inf)
    assert "all: no end, since blocks.0.0.se: mean over positions" in str(result)


@pytest.mark.slow
@pytest.mark.parametrize("name, module, why", [
    ("vit_tiny_patch16_224", "blocks.0", "joins positions"),
    ("mixer_s32_224", "blocks.0", "linear"),
    ("convnextv2_atto", "stages.0.blocks.0", "norm"),
    ("swin_tiny_patch4_window7_224", "layers.0.blocks.0", "regroups"),
])
def test_transformers_see_everything(name, module, why):
    result = tw.receptive_field(load(f"timm:{name}"), 224)
    assert math.inf in result[module].size and why in result[module].why
