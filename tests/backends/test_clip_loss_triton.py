"""The Triton backend of clip_loss, in the interpreter: what its shape makes worth testing."""

import inspect
import itertools

import numpy as np
import pytest
import torch

import tilewise as tw
from benchmarks.baselines import eager_clip_loss
from tests.backends.test_sigmoid_loss_triton import operands
from tests.common.budget import assert_within_budget
from tests.common.contrastive_cases import Case, ids, related, unrelated
from tests.ops.test_clip_loss import magnitudes, outputs
from tests.triton_tools import interpreter  # noqa: F401  (its corrections)
from tests.triton_tools.checker import MemoryFault, checked
from tilewise.kernels import _common, _contrast
from tilewise.kernels import clip_loss as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("loss", "d_image", "d_text", "d_scale")
OUTPUTS = {
    "clip_sums_tile": ["row_parts_ptr", "col_parts_ptr", "sums_ptr"],
    "clip_gradient_tile": ["grad_ptr", "sums_ptr"],
}


def run(case: Case, image, text, smoothing=0.0, needs=(True, True, True)):
    scale = torch.tensor(case.logit_scale)
    return kernels.clip_loss(image, text, scale, *operands(case.positives), smoothing, *needs)


def check(case: Case, dtype, smoothing=0.0):
    image, text = case.features(dtype)
    exact = [x.double() for x in (image, text)]
    truth = outputs(tw.reference.clip_loss, case, exact, torch.float64, smoothing)
    ours = dict(zip(NAMES, run(case, image, text, smoothing), strict=True))
    assert all(value.dtype == torch.float32 for value in ours.values())
    eager = outputs(eager_clip_loss, case, (image, text), dtype, smoothing)
    ours["d_image"], ours["d_text"] = ours["d_image"].to(dtype), ours["d_text"].to(dtype)
    assert_within_budget(ours, eager, truth, magnitudes(case, *exact, smoothing))


@pytest.fixture
def launches(monkeypatch):
    """Checks each launch; holds the kernel's name and the arguments of all."""
    seen, plain = [], kernels.ClipLoss.run

    def checked_run(self, kernel, *arguments):
        name = kernel.fn.__name__
        with checked(kernel, OUTPUTS[name]) as launched:
            result = plain(self, kernel, *arguments)
        seen.extend((name, launch) for launch in launched)
        return result

    monkeypatch.setattr(kernels.ClipLoss, "run", checked_run)
    return seen


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
    Case("chunks-ids", related(120, 150, 20), positives=ids(120, 150, 60)),
    Case("chunks-scale-100", unrelated(150, 130, 20), logit_scale=100.0),
    Case("chunks-scale-minus-100", unrelated(150, 130, 20), logit_scale=-100.0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CHUNKED, ids=lambda case: case.name)
def test_within_error_budget_over_chunks(small_chunks, case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("case", CHUNKED[:5], ids=lambda case: case.name)
def test_smoothing_over_chunks(small_chunks, case):
    check(case, torch.float32, 0.1)


@pytest.mark.parametrize("kind, dtype", [("half", torch.bfloat16), ("ieee", torch.float32)])
@pytest.mark.parametrize("case", CHUNKED[:2], ids=lambda case: case.name)
def test_descriptors_and_pointers_agree(monkeypatch, case, kind, dtype):
    """Whichever a tile does not use is tried here."""
    tile = kernels.TILES["interpreter", kind]
    usual = run(case, *case.features(dtype), smoothing=0.1)
    monkeypatch.setitem(kernels.TILES, ("interpreter", kind), tile._replace(tma=not tile.tma))
    assert all(map(torch.equal, usual, run(case, *case.features(dtype), smoothing=0.1)))


@pytest.mark.parametrize("pieces", [1, 4, 8])
def test_pieces_are_put_together(monkeypatch, pieces):
    tile = kernels.TILES["interpreter", "ieee"]._replace(pieces=pieces)
    monkeypatch.setitem(kernels.TILES, ("interpreter", "ieee"), tile)
    check(CHUNKED[0], torch.float32, 0.1)


@pytest.mark.parametrize("positives", [0, -40, 1000, -1000, 2**40, -(2**40)])
def test_only_existing_pairs_match(positives):
    """Tiles reach beyond the last row and column; nothing there may be taken for a match."""
    case = Case("match", related(41, 41, 8), positives=positives)
    check(case, torch.float32)
    check(case, torch.float32, 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 96, 32), (33, 65, 17), (1, 1, 1), (40, 20, 0)], ids=str)
def test_memory_accesses(launches, shape, dtype):
    image, text = Case("memory", related(*shape)).features(dtype)
    run(Case("memory", None), image, text)
    run(Case("memory", None, positives=ids(*shape[:2], 9)), image, text, smoothing=0.1)
    assert [name for name, _ in launches] == [*OUTPUTS, *OUTPUTS]


def test_memory_accesses_over_chunks(launches, small_chunks):
    case = Case("memory", related(150, 130, 20), positives=ids(150, 130, 70))
    run(case, *case.features(torch.bfloat16), smoothing=0.1)
    assert [name for name, _ in launches] == ["clip_sums_tile"] * 9 + ["clip_gradient_tile"] * 9


def test_checker_sees_a_workspace_without_room_for_whole_tiles():
    case = Case("small", related(33, 40, 16))
    image, text = case.features(torch.bfloat16)
    clip = kernels.ClipLoss(image, text, torch.ones(()), 0, None, 0.0)
    chunk, = _contrast.chunks(clip.image, clip.text, 0, None, (33, 40))
    with pytest.raises(MemoryFault), checked(
        kernels.clip_gradient_tile, OUTPUTS["clip_gradient_tile"]
    ):
        clip.gradient(chunk, torch.empty(33, 40, dtype=torch.bfloat16))


def test_workspace_does_not_grow_with_the_batch(monkeypatch, launches):
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1 << 15)
    for n in (128, 256, 300):
        case = Case("memory", related(n, n, 4))
        run(case, *case.features(torch.float16))
    sizes = [
        launch[name].untyped_storage().nbytes()
        for _, launch in launches for name in ("grad_ptr", "row_parts_ptr") if name in launch
    ]
    assert max(sizes) <= 1 << 15


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_offsets_beyond_31_bits(tmp_path, dtype):
    """Rows so far apart that the last one starts after 2^31 elements, in sparse files."""
    stride, rows = 2**27, 20
    case = Case("far", related(rows, rows, 16))
    near, far = case.features(dtype), []
    for i, x in enumerate(near):
        shape = (stride * (rows - 1) + 16,)
        file = np.memmap(tmp_path / f"sparse{i}", x.numpy().dtype, "w+", shape=shape)
        far.append(torch.from_numpy(file).as_strided((rows, 16), (stride, 1)).copy_(x))
    assert all(map(torch.equal, run(case, *far), run(case, *near)))


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_the_gradients_asked_for(launches, flags):
    case = Case("flags", related(33, 20, 5))
    image, text = case.features(torch.bfloat16)
    everything = run(case, image, text)
    launches.clear()
    loss, *gradients = run(case, image, text, needs=flags)
    assert len(launches) == 1 + any(flags)  # the loss alone takes one pass
    assert torch.equal(loss, everything[0]) and loss.shape == ()
    for flag, gradient, full in zip(flags, gradients, everything[1:], strict=True):
        assert torch.equal(gradient, full) if flag else gradient.shape == (0,)
    storages = [x.untyped_storage() for x in (loss, *gradients)]
    pointers = [storage.data_ptr() for storage in storages if storage.nbytes()]
    assert len(set(pointers)) == len(pointers)


def test_runs_below_autograd_and_autocast():
    inputs = (*Case("a", related(20, 20, 8)).features(torch.float32), torch.tensor(7.0))
    rest = 0, None, None, 0.1, True, True, True
    plain = kernels.clip_loss(*inputs, *rest)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaves = [x.clone().requires_grad_() for x in inputs]
        values = kernels.clip_loss(*leaves, *rest)
    assert all(map(torch.equal, plain, values)) and not any(x.requires_grad for x in values)


def test_a_well_separated_pair_keeps_its_digits():
    """1 - p is 4e-5 of a p of 1: it needs the logits' differences, not logits of size 100."""
    case, image, text = Case("", None, 100.5), torch.tensor([[1.0, 0.9], [0.9, 1.0]]), torch.eye(2)
    truth = outputs(tw.reference.clip_loss, case, (image.double(), text.double()), torch.float64)
    _, d_image, *_ = run(case, image, text)
    assert (d_image / truth["d_image"] - 1).abs().max() < 5e-3


def test_float16_gradients_of_large_batches_do_not_flush_to_zero():
    """Each is below 1 / B of a probability of e-14: far below float16's range."""
    case = Case("tiny", related(96, 96, 16, noise=0.0), logit_scale=14.0)
    image, text = case.features(torch.float16)
    truth = outputs(tw.reference.clip_loss, case, (image.double(), text.double()), torch.float64)
    got = run(case, image, text)[1].double()
    assert (got - truth["d_image"]).norm() < 1e-3 * truth["d_image"].norm()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_follows_torchs_precision_setting(monkeypatch, precision):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    case = Case("precision", unrelated(64, 64, 64), logit_scale=10.0)
    image, text = case.features(torch.float32)
    truth = outputs(tw.reference.clip_loss, case, (image.double(), text.double()), torch.float64)
    got = run(case, image, text)[1].double()
    error = ((got - truth["d_image"]).norm() / truth["d_image"].norm()).item()
    low, high = {"highest": (0, 2e-6), "high": (0, 5e-6), "medium": (1e-4, 1e-2)}[precision]
    assert low <= error < high


def test_same_bits_on_every_run(small_chunks):
    case = Case("bits", related(70, 90, 24))
    image, text = case.features(torch.bfloat16)
    assert all(map(torch.equal, run(case, image, text, 0.1), run(case, image, text, 0.1)))


def test_float64_is_refused():
    x = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match="image_features.*float64"):
        run(Case("", None), x, x)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_130", "gfx942", "gfx1100"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_architecture_has_a_tile(arch, dtype):
    kind = _common.product_kind(dtype, arch)
    tile = _common.choose_tile(kernels.TILES, _contrast.DEFAULT_TILES, arch, kind)
    assert tile.cols % tile.pieces == 0 and tile.depth % 16 == 0


def test_takes_the_operators_arguments():
    operator = torch.ops.tilewise.clip_loss.default._schema.arguments
    assert [a.name for a in operator] == list(inspect.signature(kernels.clip_loss).parameters)
