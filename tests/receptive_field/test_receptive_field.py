"""Every kind of layer: known sizes, the field by gradients, and honesty where there is no end."""

import importlib.util
import math
import sys
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewise as tw
from tests.common import small_nets
from tilewise.receptive_field import _rules
from tilewise.receptive_field.__main__ import main

pytestmark = pytest.mark.usefixtures("one_thread")


class Function(nn.Module):
    """A convolution, a function, another convolution: the function stands inside a network."""

    def __init__(self, function, channels=4, count=2):
        super().__init__()
        conv = getattr(nn, f"Conv{count}d")
        self.first, self.function = conv(1, 4, 3, padding=1), function
        self.last = conv(channels, 4, 3, padding=1)

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def check_units(result, layer=None, count=3):
    """field and measure agree at corners, in the middle, and where phases differ."""
    sizes = result[layer].units if layer else result.layers[result.top].units
    units = {tuple(min(i, n - 1) for n in sizes) for i in range(count)}
    units |= {tuple(n - 1 for n in sizes), tuple(n // 2 for n in sizes)}
    for unit in units:
        assert result.field(layer, unit) == result.measure(layer, unit), unit


FUNCTIONS = {
    "pointwise": (lambda x: F.gelu(x) * 2 + x.sigmoid(), 4),
    "in_place": (lambda x: x.relu_().add_(1), 4),
    "max_pool": (lambda x: F.max_pool2d(x, 3, 2, 1), 4),
    "max_pool_ceil": (lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True), 4),
    "avg_pool": (lambda x: F.avg_pool2d(x, (3, 2)), 4),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (5, 4)), 4),
    "adaptive_max": (lambda x: F.adaptive_max_pool2d(x, 5), 4),
    "lp_pool": (lambda x: F.lp_pool2d(x, 1, 2), 4),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), 4),
    "nearest_exact": (lambda x: F.interpolate(x, size=(20, 9), mode="nearest-exact"), 4),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), 4),
    "bilinear_odd": (lambda x: F.interpolate(x, size=(17, 23), mode="bilinear"), 4),
    "corners": (lambda x: F.interpolate(x, size=(20, 7), mode="bilinear", align_corners=True), 4),
    "nearest_scale": (lambda x: F.interpolate(x, scale_factor=(1.3, 0.6)), 4),
    "nearest_exact_scale": (lambda x: F.interpolate(
        x, scale_factor=(1.3, 0.6), mode="nearest-exact"), 4),
    "bilinear_scale": (lambda x: F.interpolate(x, scale_factor=(1.3, 0.6), mode="bilinear"), 4),
    "bicubic_scale": (lambda x: F.interpolate(x, scale_factor=(1.3, 1.7), mode="bicubic"), 4),
    "corners_scale": (lambda x: F.interpolate(
        x, scale_factor=(1.3, 0.6), mode="bilinear", align_corners=True), 4),
    "root_scale": (lambda x: F.interpolate(x, scale_factor=2**0.5, mode="bilinear"), 4),
    "scales": (lambda x: torch.ops.aten.upsample_nearest2d(x, [18, 9], 1.3, 0.6), 4),
    "shuffle": (lambda x: F.pixel_shuffle(x, 2), 1),
    "unshuffle": (lambda x: F.pixel_unshuffle(x, 2), 16),
    "pad": (lambda x: F.pad(x, (2, 0, -1, 3)), 4),
    "reflect": (lambda x: F.pad(x, (2, 2, 1, 1), mode="reflect"), 4),
    "replicate": (lambda x: F.pad(x, (2, 2, 1, 1), mode="replicate"), 4),
    "circular": (lambda x: F.pad(x, (2, 2, 1, 0), mode="circular"), 4),
    "permute": (lambda x: x.permute(0, 2, 3, 1).clone().permute(0, 3, 1, 2), 4),
    "tokens": (lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).reshape(x.shape), 4),
    "heads": (lambda x: x.reshape(1, 2, 2, *x.shape[2:]).sum(2), 2),
    "focus": (lambda x: torch.cat([x[..., ::2, ::2], x[..., 1::2, 1::2]], 1), 8),
    "crop": (lambda x: x[:, :, 2:-1, 1:], 4),
    "chunk": (lambda x: x.chunk(2, 1)[1], 2),
    "halves": (lambda x: x.chunk(2, 2)[1], 4),
    "split": (lambda x: x.split([3, x.shape[3] - 3], 3)[1], 4),
    "tensor_split": (lambda x: x[:, :, 1:].tensor_split(2, 2)[1], 4),
    "stack": (lambda x: torch.stack([x, F.avg_pool2d(x, 3, 1, 1)], 1).flatten(1, 2), 8),
    "channel_mean": (lambda x: x.mean(1, keepdim=True), 1),
    "channel_attention": (lambda x: x * F.softmax(x, 1), 4),
    "linear": (lambda x: F.linear(x.movedim(1, -1), torch.ones(2, 4, dtype=x.dtype)).movedim(
        -1, 1), 2),
    "matmul": (lambda x: (torch.ones(3, 4, dtype=x.dtype) @ x.flatten(2)).reshape(
        1, 3, *x.shape[2:]), 3),
    "layer_norm": (lambda x: F.layer_norm(x.movedim(1, -1), (4,)).movedim(-1, 1), 4),
    "group_norm": (lambda x: F.group_norm(x, 2), 4),
    "gaps": (lambda x: F.conv_transpose2d(x, torch.ones(4, 1, 1, 1, dtype=x.dtype), stride=2), 1),
    "transposed": (lambda x: F.conv_transpose2d(
        x, torch.ones(4, 1, 3, 4, dtype=x.dtype), stride=(2, 3), padding=1, output_padding=1), 1),
    "grouped": (lambda x: F.conv2d(x, torch.ones(4, 1, 3, 3, dtype=x.dtype), groups=4,
                                   padding="same", dilation=2), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name):
    function, channels = FUNCTIONS[name]
    result = tw.receptive_field(Function(function, channels), (1, 1, 14, 16))
    assert not [layer.why for layer in result.layers if math.inf in layer.size]
    check_units(result, "")


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic"])
@pytest.mark.parametrize("scale", [0.6, 0.75, 1.25, 1.7, 3**0.5, 7])
def test_no_field_of_a_scaled_picture_is_too_small(mode, scale):
    """Of every unit along a row. Bicubic, a place right on a pixel has no weight beside it."""
    net = nn.Upsample(scale_factor=scale, mode=mode)
    result = tw.receptive_field(net, (1, 1, 2, 16))
    for unit in range(result[""].units[1]):
        field, measured = (f("", (0, unit)) for f in (result.field, result.measure))
        assert field.first[1] <= measured.first[1] and field.last[1] >= measured.last[1], unit
        assert field == measured or mode == "bicubic" and measured.size[1] == 1, unit


ALONE = {
    "layer_norm": (lambda x: F.layer_norm(x, x.shape[1:]), True),
    "rms_norm": (lambda x: F.rms_norm(x, x.shape[1:]), True),
    "group_norm": (lambda x: F.group_norm(x, 2), True),
    "instance_norm": (F.instance_norm, True),
    "batch_norm": (nn.BatchNorm2d(4, track_running_stats=False).double().eval(), True),
    "stored": (nn.BatchNorm2d(4).double().eval(), False),
    "rms_norm_of_channels": (lambda x: F.rms_norm(x.movedim(1, -1), (4,)).movedim(-1, 1), False),
}


@pytest.mark.parametrize("name", ALONE)
def test_means_over_positions_that_norms_take_have_a_row(name):
    function, alone = ALONE[name]
    result = tw.receptive_field(Function(function).double(), (1, 1, 8, 9))
    assert [layer.op.endswith("norm, alone") for layer in result.layers] == (
        [False, False, True, False] if alone else [False] * 3)  # fmt: skip
    check_units(result, "")


def test_scalar_parameters():
    """A temperature, say: also that is measured."""

    class Scaled(nn.Conv2d):
        def __init__(self):
            super().__init__(1, 1, 3)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return super().forward(x) * self.scale

    check_units(tw.receptive_field(Scaled(), 8), "")


GLOBAL = {
    "squeeze_excite": (lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(), "mean"),
    "global_pool": (lambda x: x + F.adaptive_avg_pool2d(x, 1), "global pooling"),
    "attention": (lambda x: F.scaled_dot_product_attention(*[x.flatten(2).mT] * 3).mT.reshape(
        x.shape), "attention"),
    "own_attention": (lambda x: ((t := x.flatten(2).mT) @ t.mT @ t).mT.reshape(x.shape), "matmul"),
    "spatial_softmax": (lambda x: F.softmax(x.flatten(2), -1).reshape(x.shape), "softmax"),
    "fourier": (lambda x: torch.fft.fft2(x).real, "fft"),
    "mixer": (lambda x: F.linear(x, torch.ones(x.shape[3], x.shape[3], dtype=x.dtype)), "linear"),
    "flip": (lambda x: x.flip(2), "flip"),
    "windows": (lambda x: x.reshape(1, 4, 5, 2, 5, 2).mean((3, 5)), "regroups"),
}


@pytest.mark.parametrize("name", GLOBAL)
def test_layers_without_an_end_say_so(name):
    function, why = GLOBAL[name]
    result = tw.receptive_field(Function(function), (1, 1, 10, 10))
    assert math.inf in result[""].size and why in result[""].why
    assert result["first"].size == (3, 3)
    assert "all: no end, since" in str(result) and result["last"].why in str(result)


def test_axes_stay_apart():
    """Attention along rows only, and a mean over columns only."""

    def rows(x):
        t = x.permute(0, 2, 3, 1)  # each row is a sequence
        return F.scaled_dot_product_attention(t, t, t).permute(0, 3, 1, 2)

    for function in (rows, lambda x: x + x.mean(3, keepdim=True)):
        result = tw.receptive_field(Function(function), (1, 1, 8, 9))
        assert result[""].size == (5, math.inf)
        assert result.field("", (4, 4)) == ((2, 0), (6, 8))


@pytest.mark.parametrize("write", ["base", "constant"])
def test_writing_through_a_view_is_not_missed(write):
    def function(x):
        y = x.clone() if write == "base" else torch.zeros_like(x)
        y[:, :, 1:] = F.avg_pool2d(x, 5, 1, 2)[:, :, 1:]
        return y

    result = tw.receptive_field(Function(function), (1, 1, 8, 8))
    assert math.inf in result[""].size and "written_through_a_view" in result[""].why


NETS = {
    "patch_gan": (small_nets.patch_gan, (1, 3, 96, 80), 70, 8),
    "unet": (small_nets.UNet, (1, 3, 64, 64), 44, 1),
    "unet_nearest": (lambda: small_nets.UNet("nearest"), (1, 3, 64, 64), 44, 1),
    "unet_bilinear": (lambda: small_nets.UNet("bilinear"), (1, 3, 64, 64), 52, 1),
    "wavenet": (small_nets.WaveNet, (1, 1, 50), 32, 1),
    "dilated": (small_nets.dilated, (1, 3, 128, 120), 83, 4),
    "volumes": (small_nets.volumes, (1, 1, 12, 30, 30), (6, 19, 17), 2),
    "data_dependent": (small_nets.DataDependent, (1, 1, 12, 12), 5, 1),
}


@pytest.mark.parametrize("name", NETS)
def test_network(name):
    make, shape, size, jump = NETS[name]
    result = tw.receptive_field(make(), shape)
    layer, axes = result.layers[result.top], len(shape) - 2
    assert layer.size == (size if isinstance(size, tuple) else (size,) * axes)
    assert layer.jump == (jump,) * axes
    check_units(result, count=5)


def test_odd_sizes_have_no_jump_and_still_fields():
    """A skip of 25 beside 12 enlarged to 25: the branches drift apart."""
    result = tw.receptive_field(small_nets.UNet("bilinear"), (1, 3, 50, 61))
    top = result.layers[result.top]
    assert all(map(math.isnan, top.jump)) and "jumps differ" in top.why
    check_units(result, "head", count=6)


def test_table_says_what_the_recursion_needs():
    """VGG-11's features, whose figures are known; each row's N_RF follows from the next row."""
    layers, width = [], 3
    for convolutions in (1, 1, 2, 2, 2):
        for _ in range(convolutions):
            layers += [nn.Conv2d(width, 8, 3, padding=1), nn.ReLU()]
            width = 8
        layers.append(nn.MaxPool2d(2))
    result = tw.receptive_field(nn.Sequential(*layers), 224)
    last = result.layers[-1]
    assert (last.size, last.jump, last.start) == ((150, 150), (32, 32), (-59, -59))
    assert last.centre == (15.5, 15.5) and last.seen == (1, 1)
    for row, after in zip(result.layers, result.layers[1:], strict=False):
        n, ksize, stride = after.seen[0], after.ksize[0], after.stride[0]
        assert row.seen[0] == (n - 1) * stride + ksize
    lines = str(result).splitlines()
    assert lines[0].split() == ["layer", "op", "units", "ksize", "stride", "N_RF", "size", "jump",
                                "start", "centre"]  # fmt: skip
    assert lines[2].split() == ["input", "input", "224x224", "1", "1", "150", "1", "1", "0", "0"]
    assert lines[-5].split()[-5:] == ["1", "150", "32", "-59", "15.5"]


def test_upsampling_has_a_fraction_for_its_jump():
    net = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(1, 1, 4))
    result = tw.receptive_field(net, (1, 1, 8, 8))
    assert result["0"].jump == (Fraction(1, 2),) * 2 and result["0"].ksize == (2, 2)
    assert result["1"].jump == (Fraction(1, 2),) * 2 and result["1"].size == (4, 4)
    assert [result.field("1", i).size[0] for i in (4, 5)] == [4, 3]  # in turn


def test_top_and_names():
    net = small_nets.patch_gan()
    result = tw.receptive_field(net, 64, top="3")
    assert result.layers[result.top].name == "3" and result["3"].seen == (1, 1)
    assert result.field().size == (10, 10) and result["0"].seen == (4, 4)
    assert result[""].size == (70, 70)
    assert result.names()[0] == "0" and result.names()[-1] == ""
    assert result.field(unit=0).slices() == (slice(0, 7), slice(0, 7))


def test_model_is_left_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5))
    net[1].eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    tw.receptive_field(net, 16).measure("2")
    assert net.training and not net[1].training and net[2].training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not torch.nn.modules.module._global_forward_hooks


def test_effective_field_lies_in_the_field(tmp_path):
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)])
    result = tw.receptive_field(net, 32)
    x = torch.rand(1, 3, 32, 32)
    effective = result.effective(x, "3", (5, 16))
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[result.field("3", (5, 16)).slices()] = True
    assert effective.shape == (32, 32) and effective.max() == 1
    assert (effective[inside] > 0).all() and (effective[~inside] == 0).all()
    figure = result.plot(x, "3", (5, 16), path=tmp_path / "field.png")
    assert (tmp_path / "field.png").stat().st_size > 5000
    frames = [patch for axes in figure.axes for patch in axes.patches]
    assert {(*f.get_xy(), f.get_width(), f.get_height()) for f in frames} == {(11.5, 0.5, 9, 9)}
    with pytest.raises(ValueError, match="x: expected the shape"):
        result.effective(x[:, :, :30])


def test_what_cannot_be_asked():
    net = nn.Conv2d(3, 3, 3)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got function"):
        tw.receptive_field(lambda x: x, 8)
    with pytest.raises(ValueError, match="input_size: expected"):
        tw.receptive_field(net, (3, 8))
    with pytest.raises(ValueError, match="top: expected a module"):
        tw.receptive_field(net, 8, top="conv")
    with pytest.raises(RuntimeError, match="channels"):  # torch's own words
        tw.receptive_field(net, (1, 4, 8, 8))
    result = tw.receptive_field(net, 8)
    with pytest.raises(KeyError, match="no module 'conv'"):
        result["conv"]
    with pytest.raises(IndexError, match="unit: expected a place in an output of"):
        result.field("", (6, 0))


def test_two_ways_that_disagree_raise(monkeypatch):
    from tilewise.receptive_field import _compute

    monkeypatch.setattr(_compute._directions, "recursion", lambda *a: {0: (0, 9)})
    with pytest.raises(RuntimeError, match="by the closed form and .* by the recursion"):
        tw.receptive_field(nn.Conv2d(3, 3, 3), 8)


def test_graph_is_torch_fx():
    graph = tw.receptive_field(small_nets.UNet(), (1, 3, 16, 16)).graph
    assert isinstance(graph, torch.fx.Graph)
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.aten.convolution.default) == 13
    assert all(_rules.known(target) for target in targets)


def test_command_line(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pil = pytest.importorskip("PIL.Image")
    pil.new("RGB", (90, 70), "red").save(tmp_path / "red.png")
    main(["tests.common.small_nets:patch_gan", "--input", "1,3,96,96", "--check", "--unit", "5,5",
          "--picture", str(tmp_path / "red.png"), "--out", str(tmp_path / "out.png")])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("unit (5, 5): 17 to 86 x 17 to 86")
    assert lines[-2].startswith("by gradients: 17 to 86 x 17 to 86")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="model: expected"):
        main(["resnet18"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install timm"):
        main(["timm:resnet18"])


def test_import_brings_no_part(monkeypatch):
    """`import tilewise` costs what it did."""
    for name in [name for name in sys.modules if name.startswith("tilewise.receptive_field")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(tw, "receptive_field", tw.receptive_field)  # the import binds the package
    importlib.import_module("tilewise.receptive_field")
    assert not [name for name in sys.modules if name.startswith("tilewise.receptive_field.")]
