"""The Triton backend of sigmoid_loss, in the interpreter: what its shape makes worth testing."""

import inspect
import itertools

import numpy as np
import pytest
import torch

import tilewise as tw
from benchmarks.baselines import eager_sigmoid_loss
from tests.common.budget import assert_within_budget
from tests.common.contrastive_cases import Case, related
from tests.ops.test_sigmoid_loss import magnitudes, outputs
from tests.triton_tools import interpreter  # noqa: F401  (its corrections)
from tests.triton_tools.checker import MemoryFault, checked
from tilewise.kernels import _common
from tilewise.kernels import sigmoid_loss as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("loss", "d_image", "d_text", "d_scale", "d_bias")


def operands(positives):
    """The op's three arguments that say what matches."""
    return (None, *positives) if isinstance(positives, tuple) else (positives, None, None)


def triton_outputs(case: Case, image, text) -> dict[str, torch.Tensor]:
    scale = torch.tensor(case.logit_scale)
    bias = None if case.logit_bias is None else torch.tensor(case.logit_bias)
    values = kernels.sigmoid_loss(
        image, text, scale, bias, *operands(case.positives), True, True, True, bias is not None
    )
    values = dict(zip(NAMES, values, strict=True))
    if bias is None:
        assert values.pop("d_bias").shape == (0,)
    return values


def check(case: Case, dtype):
    image, text = case.features(dtype)
    exact = [x.double() for x in (image, text)]
    truth = outputs(tw.reference.sigmoid_loss, case, exact, torch.float64)
    ours = triton_outputs(case, image, text)
    assert all(value.dtype == torch.float32 for value in ours.values())
    eager = ours if len(image) == 0 else outputs(
        eager_sigmoid_loss, case, (image, text), torch.float32
    )
    ours["d_image"], ours["d_text"] = ours["d_image"].to(dtype), ours["d_text"].to(dtype)
    assert_within_budget(ours, eager, truth, magnitudes(case, *exact, truth))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of two tiles by one and a half, so that small problems have many."""
    monkeypatch.setattr(kernels, "CHUNK_COLS", 48)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 64 * 64 * 2)


CHUNKED = [
    Case("chunks", related(150, 130, 20)),
    Case("chunks-aligned", related(128, 96, 16)),
    Case("chunks-offset", related(100, 140, 20), positives=37),
    Case("chunks-negative-offset", related(140, 100, 20), positives=-51),
    Case("chunks-no-positives", related(70, 70, 4), positives=None),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CHUNKED, ids=lambda case: case.name)
def test_within_error_budget_over_chunks(small_chunks, case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("kind, dtype", [("half", torch.bfloat16), ("ieee", torch.float32)])
@pytest.mark.parametrize("case", CHUNKED[:2], ids=lambda case: case.name)
def test_descriptors_and_pointers_agree(monkeypatch, case, kind, dtype):
    """Whichever a tile does not use is tried here."""
    tile = kernels.TILES["interpreter", kind]
    usual = triton_outputs(case, *case.features(dtype))
    monkeypatch.setitem(kernels.TILES, ("interpreter", kind), tile._replace(tma=not tile.tma))
    other = triton_outputs(case, *case.features(dtype))
    assert all(torch.equal(usual[name], other[name]) for name in usual)


@pytest.mark.parametrize("positives", [0, -40, 1000, -1000, 2**40, -(2**40), None])
def test_only_existing_pairs_match(positives):
    """Tiles reach beyond the last row and column; nothing there may be taken for a match."""
    check(Case("match", related(41, 41, 8), logit_bias=3.0, positives=positives), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needed", [True, False], ids=["gradients", "loss"])
@pytest.mark.parametrize("shape", [(64, 96, 32), (33, 65, 17), (1, 1, 1), (40, 20, 0)], ids=str)
def test_memory_accesses(shape, needed, dtype):
    image, text = Case("memory", related(*shape)).features(dtype)
    scale, bias = torch.tensor(5.0), torch.tensor(-3.0)
    with checked(kernels.sigmoid_tile, outputs=["grad_ptr", "sums_ptr"]) as launches:
        kernels.sigmoid_loss(image, text, scale, bias, 0, None, None, *[needed] * 4)
    assert len(launches) == 1


def test_memory_accesses_over_chunks(small_chunks):
    image, text = Case("memory", related(150, 130, 20)).features(torch.bfloat16)
    scale = torch.tensor(5.0)
    with checked(kernels.sigmoid_tile, outputs=["grad_ptr", "sums_ptr"]) as launches:
        kernels.sigmoid_loss(image, text, scale, None, 0, None, None, *[True] * 4)
    assert len(launches) == 9


def test_checker_sees_a_workspace_without_room_for_whole_tiles():
    image, text = Case("small", related(33, 40, 16)).features(torch.bfloat16)
    one = torch.ones(())
    grad = torch.empty(33, 40, dtype=torch.bfloat16)
    with pytest.raises(MemoryFault), checked(kernels.sigmoid_tile, ["grad_ptr", "sums_ptr"]):
        kernels.launch(image, text, grad, one, one, 0, "interpreter", "half")


def test_workspace_does_not_grow_with_the_batch(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1 << 15)
    sizes = []
    for n in (128, 256, 300):
        image, text = Case("memory", related(n, n, 4)).features(torch.float16)
        with checked(kernels.sigmoid_tile, outputs=["grad_ptr", "sums_ptr"]) as launches:
            kernels.sigmoid_loss(image, text, torch.ones(()), None, 0, None, None, *[True] * 4)
        sizes += [launch["grad_ptr"].untyped_storage().nbytes() for launch in launches]
    assert max(sizes) <= 1 << 15


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_offsets_beyond_31_bits(tmp_path, dtype):
    """Rows so far apart that the last one starts after 2^31 elements, in sparse files."""
    stride, rows = 2**27, 20
    near = Case("far", related(rows, rows, 16)).features(dtype)
    far = []
    for i, x in enumerate(near):
        shape = (stride * (rows - 1) + 16,)
        file = np.memmap(tmp_path / f"sparse{i}", x.numpy().dtype, "w+", shape=shape)
        far.append(torch.from_numpy(file).as_strided((rows, 16), (stride, 1)).copy_(x))
    scale = torch.tensor(9.0)
    expected = kernels.sigmoid_loss(*near, scale, None, 0, None, None, *[True] * 4)
    values = kernels.sigmoid_loss(*far, scale, None, 0, None, None, *[True] * 4)
    assert all(map(torch.equal, values, expected))


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_the_gradients_asked_for(flags):
    image, text = Case("flags", related(33, 20, 5)).features(torch.bfloat16)
    scale, bias = torch.tensor([5.0]), torch.tensor([-2.0])
    everything = kernels.sigmoid_loss(image, text, scale, bias, 0, None, None, *[True] * 4)
    loss, *gradients = kernels.sigmoid_loss(image, text, scale, bias, 0, None, None, *flags)
    assert torch.equal(loss, everything[0]) and loss.shape == ()
    for flag, gradient, full in zip(flags, gradients, everything[1:], strict=True):
        assert torch.equal(gradient, full) if flag else gradient.shape == (0,)
    storages = [x.untyped_storage() for x in (loss, *gradients)]
    pointers = [storage.data_ptr() for storage in storages if storage.nbytes()]
    assert len(set(pointers)) == len(pointers)


def test_runs_below_autograd_and_autocast():
    inputs = (*Case("a", related(20, 20, 8)).features(torch.float32), torch.tensor(7.0))
    plain = kernels.sigmoid_loss(*inputs, None, 0, None, None, *[True] * 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaves = [x.clone().requires_grad_() for x in inputs]
        values = kernels.sigmoid_loss(*leaves, None, 0, None, None, *[True] * 4)
    assert all(map(torch.equal, plain, values)) and not any(x.requires_grad for x in values)


@pytest.mark.parametrize("z", [1.0, 20.0, 60.0])
def test_a_well_separated_pair_keeps_its_digits(z):
    """softplus(z) - z would be 0 or rounding noise from z = 17 on."""
    one = torch.ones(1, 1)
    loss, d_image, *_ = kernels.sigmoid_loss(
        one, one, torch.tensor(z), None, 0, None, None, *[True] * 4
    )
    exact = torch.nn.functional.softplus(torch.tensor(-z, dtype=torch.float64))
    tiny = torch.sigmoid(torch.tensor(-z, dtype=torch.float64))
    assert abs(loss / exact - 1) < 2e-5 and abs(d_image / (-z * tiny) - 1) < 2e-5


def test_float16_negatives_do_not_flush_to_zero():
    """sigmoid(-16) / B is far below float16's range, and all that these gradients consist of."""
    case = Case("negatives", related(64, 64, 16), logit_scale=1.0, logit_bias=-16.0, positives=None)
    image, text = case.features(torch.float16)
    truth = outputs(tw.reference.sigmoid_loss, case, (image.double(), text.double()), torch.float64)
    got = triton_outputs(case, image, text)["d_image"].double()
    assert (got - truth["d_image"]).norm() < 1e-3 * truth["d_image"].norm()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_follows_torchs_precision_setting(monkeypatch, precision):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    case = Case("precision", related(64, 64, 64), logit_scale=30.0)
    image, text = case.features(torch.float32)
    truth = outputs(tw.reference.sigmoid_loss, case, (image.double(), text.double()), torch.float64)
    got = triton_outputs(case, image, text)["d_image"].double()
    error = ((got - truth["d_image"]).norm() / truth["d_image"].norm()).item()
    low, high = {"highest": (0, 2e-6), "high": (0, 5e-6), "medium": (1e-4, 1e-2)}[precision]
    assert low <= error < high


def test_same_bits_on_every_run():
    image, text = Case("bits", related(70, 90, 24)).features(torch.bfloat16)
    runs = [kernels.sigmoid_loss(image, text, torch.tensor(9.0), None, 0, None, None, *[True] * 4)
            for _ in range(2)]
    assert all(map(torch.equal, *runs))


def test_float64_is_refused():
    x = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match="image_features.*float64"):
        kernels.sigmoid_loss(x, x, torch.ones(()), None, 0, None, None, *[True] * 4)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_130", "gfx942", "gfx1100"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_architecture_has_a_tile(arch, dtype):
    kind = _common.product_kind(dtype, arch)
    tile = _common.choose_tile(kernels.TILES, kernels.DEFAULT_TILES, arch, kind)
    assert tile.cols % tile.pieces == 0 and tile.depth % 16 == 0


def test_takes_the_operators_arguments():
    operator = torch.ops.tilewise.sigmoid_loss.default._schema.arguments
    assert [a.name for a in operator] == list(inspect.signature(kernels.sigmoid_loss).parameters)
