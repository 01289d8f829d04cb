"""The Triton backend of hard_negatives, in the interpreter: what its shape makes worth testing."""

import inspect

import numpy as np
import pytest
import torch

import tilewise as tw
from tests.backends.test_sigmoid_loss_triton import operands
from tests.common.contrastive_cases import Case, ids, related, unrelated
from tests.triton_tools import interpreter  # noqa: F401  (its corrections)
from tests.triton_tools.checker import MemoryFault, checked
from tilewise.kernels import _common, _contrast
from tilewise.kernels import hard_negatives as kernels
from tilewise.reference import _philox
from tilewise.reference._matches import matches

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUTPUTS = ["row_value_ptr", "row_index_ptr", "col_value_ptr", "col_index_ptr"]


def run(case: Case, image, text, row_offset=0, seed=-5):
    scale = torch.tensor(case.logit_scale)
    return kernels.hard_negatives(
        image, text, scale, *operands(case.positives), torch.tensor(seed), row_offset
    )


def perturbed(case: Case, image, text, row_offset, seed=-5):
    """What the largest is sought of: (B, N) float64 for the texts, (N, B) for the images."""
    z = image.double() @ text.double().T * case.logit_scale
    z = z.masked_fill(matches(image, text, case.positives) | z.isnan(), -INF)
    texts, images = (
        z + _philox.gumbel(torch.tensor(seed), *z.shape, row_offset, op=op)
        for op in (_philox.NEGATIVE_TEXTS, _philox.NEGATIVE_IMAGES)
    )
    return texts, images.T


def check(case: Case, dtype, row_offset=0):
    """The largest in float64; only what float32 can't tell apart may be swapped."""
    image, text = case.features(dtype)
    found = run(case, image, text, row_offset)
    for index, values in zip(found, perturbed(case, image, text, row_offset), strict=True):
        assert index.dtype == torch.int64 and index.shape == values.shape[:1]
        best = values.amax(1)
        assert torch.equal(index == -1, best == -INF)
        index, best, values = (x[best > -INF] for x in (index, best, values))
        deficit = best - values.gather(1, index[:, None])[:, 0]
        assert (deficit <= 1e-5 * (1 + best.abs())).all(), deficit.max()
        assert (deficit > 0).sum() <= 1  # the test's problems have few near ties
    return found


@pytest.fixture
def launches():
    """Checks each launch; holds the arguments of all."""
    with checked(kernels.negatives_tile, OUTPUTS) as launched:
        yield launched


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of two tiles by one and a half, so that small problems have many."""
    monkeypatch.setattr(kernels, "CHUNK_ROWS", 128)
    monkeypatch.setattr(kernels, "CHUNK_COLS", 96)


@pytest.fixture
def pieces(monkeypatch, request):
    """Tiles of so many pieces."""
    for kind in ("half", "ieee"):
        tile = kernels.TILES["interpreter", kind]._replace(pieces=request.param)
        monkeypatch.setitem(kernels.TILES, ("interpreter", kind), tile)


CHUNKED = [
    Case("chunks", related(150, 130, 20)),
    Case("chunks-aligned", related(128, 192, 16)),
    Case("chunks-offset", related(130, 140, 20), positives=37),
    Case("chunks-negative-offset", related(140, 100, 20), positives=-51),
    Case("chunks-nothing-matches", related(70, 130, 20), positives=None),
    Case("chunks-ids", related(135, 150, 20), positives=ids(135, 150, 60)),
    Case("chunks-two-ids", related(130, 70, 20), positives=ids(130, 70, 2)),
    Case("chunks-scale-100", unrelated(150, 130, 20), logit_scale=100.0),
    Case("chunks-scale-minus-100", unrelated(150, 130, 20), logit_scale=-100.0),
]
CHUNKED_DTYPES = [(case, DTYPES[i % 3]) for i, case in enumerate(CHUNKED)]
CHUNKED_DTYPES += [(CHUNKED[0], dtype) for dtype in DTYPES[1:]]


@pytest.mark.parametrize("case, dtype", CHUNKED_DTYPES, ids=lambda x: getattr(x, "name", str(x)))
def test_finds_the_largest_over_chunks(small_chunks, case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("kind, dtype", [("half", torch.bfloat16), ("ieee", torch.float32)])
@pytest.mark.parametrize("shape", [(70, 50), (64, 128)], ids=str)
def test_descriptors_and_pointers_agree(monkeypatch, shape, kind, dtype):
    """Whichever a tile does not use is tried here."""
    case = Case("both", related(*shape, 20))
    tile = kernels.TILES["interpreter", kind]
    usual = run(case, *case.features(dtype))
    monkeypatch.setitem(kernels.TILES, ("interpreter", kind), tile._replace(tma=not tile.tma))
    assert all(map(torch.equal, usual, run(case, *case.features(dtype))))


@pytest.mark.parametrize("pieces", [2, 4, 16], indirect=True)
def test_pieces_are_put_together(pieces):
    check(Case("pieces", related(60, 70, 20)), torch.float32)


@pytest.mark.parametrize("positives", [-40, 1000, -1000, 2**63 - 1, -(2**63)])
def test_only_existing_pairs_match(positives):
    """Tiles reach beyond the last row and column, and offsets beyond 32 bits."""
    check(Case("match", related(41, 41, 8), positives=positives), torch.float32)


@pytest.mark.parametrize("row_offset", [2**32 - 70, -70, 2**63 - 70, -(2**63)])
def test_rows_have_numbers_of_64_bits(small_chunks, row_offset):
    """The number passes what 32 bits hold, 0 or the last one inside of a tile."""
    check(Case("offset", related(90, 60, 8), positives=3), torch.float32, row_offset)


def test_parts_of_the_images_are_the_whole(small_chunks):
    case = Case("parts", related(100, 70, 16), positives=5)
    image, text = case.features(torch.bfloat16)
    whole, _ = run(case, image, text, 2**32 - 50)
    for part in (slice(0, 33), slice(33, 70), slice(70, 100)):
        start = part.start
        case = Case("part", None, positives=5 + start)
        ours, _ = run(case, image[part], text, 2**32 - 50 + start)
        assert torch.equal(ours, whole[part])


@pytest.mark.parametrize("pieces", [2], indirect=True)
def test_equal_values_go_to_the_lowest_index(small_chunks, pieces):
    """Noise is lost beside such logits: all are equal, over pieces, tiles and chunks."""
    shape = 130, 100
    ones = [torch.ones(n, 1) for n in shape]
    texts, images = run(Case("ties", None, logit_scale=2.0**40), *ones)
    for index in (texts, images):
        assert index[0] == 1 and (index[1:] == 0).all()
    first = 99, 70  # the first that do not match the other side's first ones
    same = [(torch.arange(n) < k).long() for n, k in zip(shape, first, strict=True)]
    case = Case("late", None, logit_scale=2.0**40, positives=(same[0], same[1]))
    texts, images = run(case, *ones)
    assert (texts[:99] == 70).all() and (texts[99:] == 0).all()
    assert (images[:70] == 99).all() and (images[70:] == 0).all()


def test_infinities_and_nan():
    """The first +inf wins, NaN and -inf never do."""
    image, text = torch.randn(90, 1), torch.ones(70, 1)
    image[[20, 50, 80]], image[[3, 70]], image[[0, 40]] = INF, NAN, -INF
    text[10:30], text[[5, 65]] = -1, NAN
    case = Case("infinite", None, positives=None)
    texts, images = run(case, image, text)
    assert (texts[[20, 50, 80]] == 0).all() and (texts[[0, 40]] == 10).all()
    assert (texts[[3, 70]] == -1).all() and (images[[5, 65]] == -1).all()
    assert (images[:5] == 20).all() and (images[10:30] == 0).all()
    for index, values in zip((texts, images), perturbed(case, image, text, 0), strict=True):
        assert torch.equal(index == -1, values.amax(1) == -INF)
    for scale in (NAN, 0.0):  # a scale of 0 makes NaN of infinities
        texts, images = run(Case("", None, logit_scale=scale, positives=None), image, text)
        assert (texts == -1).sum() == (90 if scale != scale else 7)
        assert (images == -1).sum() == (70 if scale != scale else 2)


@pytest.mark.parametrize("rows, cols", [(40, 35), (64, 128), (0, 5), (5, 0), (0, 0)])
def test_nothing_to_choose_from(rows, cols):
    """All match, have a logit of -inf, or do not exist."""
    same = torch.full((rows,), 7), torch.full((cols,), 7)
    ones = torch.ones(rows, 1), torch.ones(cols, 1)
    for case in (Case("match", None, positives=same), Case("low", None, logit_scale=-INF)):
        texts, images = run(case, *ones)
        assert texts.tolist() == [-1] * rows and images.tolist() == [-1] * cols


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 128, 32), (33, 65, 17), (1, 1, 1), (40, 20, 0)], ids=str)
def test_memory_accesses(launches, shape, dtype):
    check(Case("memory", related(*shape)), dtype)
    check(Case("memory", related(*shape), positives=ids(*shape[:2], 9)), dtype, 2**40)
    assert len(launches) == 2


@pytest.mark.parametrize("pieces", [2], indirect=True)
def test_memory_accesses_over_chunks(launches, small_chunks, pieces):
    check(Case("memory", related(150, 130, 20), positives=ids(150, 130, 70)), torch.bfloat16)
    assert len(launches) == 4
    for launch in launches:
        sizes = [launch[name].untyped_storage().nbytes() for name in OUTPUTS]
        assert sum(sizes) <= 8 * 2 * (128 + 128)  # of a chunk, whatever the batch


def test_checker_sees_parts_without_room_for_whole_tiles(monkeypatch, launches):
    def exact(self, count, size, tile):
        return torch.empty(count, size), torch.empty(count, size, dtype=torch.int32)

    monkeypatch.setattr(kernels.HardNegatives, "new_parts", exact)
    case = Case("small", related(33, 40, 16))
    with pytest.raises(MemoryFault):
        run(case, *case.features(torch.bfloat16))


def test_offsets_beyond_31_bits(tmp_path):
    """Rows so far apart that the last one starts after 2^31 elements, in sparse files."""
    stride, rows = 2**27, 20
    case = Case("far", related(rows, rows, 16))
    near, far = case.features(torch.float32), []
    for i, x in enumerate(near):
        shape = (stride * (rows - 1) + 16,)
        file = np.memmap(tmp_path / f"sparse{i}", np.float32, "w+", shape=shape)
        far.append(torch.from_numpy(file).as_strided((rows, 16), (stride, 1)).copy_(x))
    assert all(map(torch.equal, run(case, *far), run(case, *near)))


def test_runs_below_autograd_and_autocast():
    image, text = Case("a", related(20, 20, 8)).features(torch.float32)
    rest = torch.tensor(7.0), 0, None, None, torch.tensor(3), 0
    plain = kernels.hard_negatives(image, text, *rest)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image.requires_grad_()
        assert all(map(torch.equal, plain, kernels.hard_negatives(image, text, *rest)))


def test_operator():
    """The function is the operator's, with its arguments in their order."""
    image, text = Case("operator", related(50, 60, 16)).features(torch.float32)
    arguments = torch.tensor(5.0), 0, None, None, torch.tensor(123), 9
    ours = torch.ops.tilewise_triton.hard_negatives(image, text, *arguments)
    theirs = tw.reference.hard_negatives(image, text, 5.0, seed=123, row_offset=9)
    assert all(map(torch.equal, ours, theirs))


def test_float64_is_refused():
    x = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match="image_features.*float64"):
        run(Case("", None), x, x)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_130", "gfx942", "gfx1100"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_architecture_has_a_tile(arch, dtype):
    kind = _common.product_kind(dtype, arch)
    tile = _common.choose_tile(kernels.TILES, _contrast.DEFAULT_TILES, arch, kind)
    assert tile.cols % (4 * tile.pieces) == 0 and kernels.CHUNK_COLS % 4 == 0


def test_takes_the_operators_arguments():
    operator = torch.ops.tilewise.hard_negatives.default._schema.arguments
    assert [a.name for a in operator] == list(inspect.signature(kernels.hard_negatives).parameters)
