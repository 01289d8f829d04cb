"""The Triton backend of hard_negatives, in the interpreter: what no other op promises."""

import pytest
import torch

import tilewise as tw
from tests.backends.contrast_adapters import NEGATIVES, features, perturbed
from tests.backends.contrast_adapters import check_negatives as check
from tests.common.contrastive_cases import Case, related
from tests.triton_tools.checker import MemoryFault, checked
from tilewise.kernels import _contrast
from tilewise.kernels import hard_negatives as kernels

INF, NAN = float("inf"), float("nan")


def run(case: Case, image, text, row_offset=0):
    return NEGATIVES.run(case, {"image": image, "text": text}, row_offset=row_offset)


@pytest.fixture
def small_chunks(monkeypatch):
    """Small problems have many chunks, and tiles two pieces."""
    for name, value in NEGATIVES.small.items():
        monkeypatch.setattr(kernels, name, value)
    for kind in ("half", "ieee"):
        tile = kernels.TILES["interpreter", kind]._replace(pieces=2)
        monkeypatch.setitem(kernels.TILES, ("interpreter", kind), tile)


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


def test_equal_values_go_to_the_lowest_index(small_chunks):
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


def test_checker_sees_parts_without_room_for_whole_tiles(monkeypatch):
    def exact(self, chunk, *, dtype):
        return torch.empty(self.grid(chunk)[1], len(chunk.image), dtype=dtype)

    monkeypatch.setattr(_contrast.Launch, "row_parts", exact)
    case = NEGATIVES.make(33, 40, 16)
    with pytest.raises(MemoryFault), checked(NEGATIVES.outputs):
        NEGATIVES.run(case, features(case, torch.bfloat16))


def test_operator():
    """The function is the operator's, with its arguments in their order."""
    image, text = Case("operator", related(50, 60, 16)).features(torch.float32)
    arguments = torch.tensor(5.0), 0, None, None, torch.tensor(123), 9
    ours = torch.ops.tilewise_triton.hard_negatives(image, text, *arguments)
    theirs = tw.reference.hard_negatives(image, text, 5.0, seed=123, row_offset=9)
    assert all(map(torch.equal, ours, theirs))
