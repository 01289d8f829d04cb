"""tilewise.hard_negatives: the reference's samples, up to ties that no float32 can tell apart."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import tilewise as tw
from tests.common.contrastive_cases import CASES, DEVICE, Case, ids, related, unrelated
from tests.common.random_statistics import chi_square_p
from tilewise.reference import _philox
from tilewise.reference._matches import matches

KERNELS = ["cpu", "triton"] if DEVICE == "cpu" else ["triton"]
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES, torch.float64]
NAN, INF = float("nan"), float("inf")
SEED = 2027


@pytest.fixture
def backend(request):
    with tw.backend(request.param):
        yield request.param


backends = pytest.mark.parametrize("backend", ["reference", *KERNELS], indirect=True)
FEW = [case for case in CASES if case.name in (
    "typical", "peaked-scale-100", "more-texts", "more-images", "offset-up", "ids-few", "strided",
    "nan",
)]  # fmt: skip
# More rows or columns than a block has.
MANY = [Case("many-texts", related(40, 150, 8)), Case("many-images", related(150, 40, 8))]
LARGE = [Case("large", related(1100, 300, 8), positives=ids(1100, 300, 30)),
         Case("wide", related(10, 5000, 8)), Case("tall", related(5000, 10, 8))]
PAIRS = [case for case in CASES if case.name != "one-pair"]  # which has no negative
# Programs are interpreted: half precision with a few cases only.
SERVED = [
    (backend, dtype, case) for backend in KERNELS for dtype in DTYPES
    for case in [*PAIRS, *MANY, *(LARGE if (backend, dtype) == ("cpu", torch.float32) else [])]
    if backend == "cpu" or dtype == torch.float32 or (dtype in HALVES and case in FEW)
]  # fmt: skip


def perturbed(image, text, scale, positives, seed=SEED, row_offset=0):
    """Logits (B, N) in float64 with the noise of each direction; -inf where nothing is drawn."""
    z = image.double() @ text.double().T * scale
    z = z.masked_fill(matches(image, text, positives) | z.isnan(), -INF)
    shape = (*z.shape, row_offset)
    streams = _philox.NEGATIVE_TEXTS, _philox.NEGATIVE_IMAGES
    seed = torch.tensor(seed, device=z.device)
    return [z + _philox.gumbel(seed, *shape, op=op) for op in streams]


def check_largest(index, z, size):
    """index (rows,) is the largest of z (rows, columns), -1 of nothing.

    Only what rounding can't tell apart may be swapped; `size` (rows,) is what a row's products
    are rounded relative to.
    """
    assert index.dtype == torch.int64 and index.shape == z.shape[:1]
    best = z.amax(1) if z.shape[1] else z.new_full(z.shape[:1], -INF)
    nothing = best == -INF
    assert (index[nothing] == -1).all()
    index, z, best, size = (x[~nothing] for x in (index, z, best, size))
    assert ((index >= 0) & (index < z.shape[1])).all()
    deficit = best - z.gather(1, index[:, None]).squeeze(1)
    assert (deficit <= 1e-6 * (1 + best.abs() + size)).all(), deficit.max()


def check(case: Case, dtype, row_offset=0, seed=SEED):
    image, text = case.features(dtype)
    options = dict(positives=case.positives, seed=seed, row_offset=row_offset)
    index = tw.hard_negatives(image, text, case.logit_scale, **options)
    noisy = perturbed(image, text, case.logit_scale, **options)
    sizes = (image.double().abs() @ text.double().abs().T * abs(case.logit_scale)).nan_to_num()
    for i, z, size in zip(index, (noisy[0], noisy[1].T), (sizes, sizes.T), strict=True):
        check_largest(i, z, size.amax(1) if size.shape[1] else size.sum(1))


@pytest.mark.parametrize(
    "backend, dtype, case", SERVED, indirect=["backend"],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_same_samples(backend, dtype, case):
    check(case, dtype)


@given(
    b=st.integers(0, 40), n=st.integers(0, 40), d=st.integers(0, 20), scale=st.floats(-100, 100),
    positives=st.none() | st.integers(-50, 50) | st.tuples(st.integers(1, 30)),
    dtype=st.sampled_from(DTYPES), seed=st.integers(-(2**63), 2**63 - 1),
    row_offset=st.integers(-(2**63), 2**63 - 41),
)
def test_random_problems(b, n, d, scale, positives, dtype, seed, row_offset):
    assume((b, n, positives) != (1, 1, 0))  # which has no negative
    same = ids(b, n, *positives) if isinstance(positives, tuple) else positives
    check(Case("random", related(b, n, d), scale, None, same), dtype, row_offset, seed)


@backends
def test_what_matches_is_never_drawn(backend):
    """Not even where its logit is far above all others: rows are equal to what they match."""
    names = torch.arange(36) % 9
    shuffled = names[torch.arange(36) * 7 % 36]
    image, text = (torch.eye(9)[x] for x in (names, shuffled))
    for seed in range(4):
        pairs = names, shuffled
        of_image, of_text = tw.hard_negatives(image, text, 1000.0, positives=pairs, seed=seed)
        assert (of_image >= 0).all() and (shuffled[of_image] != names).all()
        assert (of_text >= 0).all() and (names[of_text] != shuffled).all()
    for offset in (0, 5, -5):
        of_image, of_text = tw.hard_negatives(image, text, 1000.0, positives=offset, seed=1)
        rows = torch.arange(36)
        assert (of_image != rows + offset).all() and (of_text != rows - offset).all()


@given(b=st.integers(1, 20), n=st.integers(1, 20), names=st.integers(1, 4), seed=st.integers(0, 99))
def test_random_ids_are_kept_apart(b, n, names, seed):
    """-1 where all have the id, and nowhere else."""
    image, text = Case("apart", related(b, n, 4)).features(torch.float32)
    image_ids, text_ids = ids(b, n, names)
    found = tw.hard_negatives(image, text, 5.0, positives=(image_ids, text_ids), seed=seed)
    for index, own, theirs in zip(found, (image_ids, text_ids), (text_ids, image_ids), strict=True):
        assert torch.equal(index == -1, (own[:, None] == theirs).all(1))
        kept = index >= 0
        assert (theirs[index[kept]] != own[kept]).all()


@backends
def test_where_nothing_is_left(backend):
    one = torch.ones(1, 4)
    with pytest.raises(ValueError, match="image_features.*a batch of one has no negative"):
        tw.hard_negatives(one, one, 1.0, seed=1)
    same = torch.tensor([7]), torch.tensor([7])
    alone = tw.hard_negatives(one, one, 1.0, positives=same, seed=1)
    assert [x.tolist() for x in alone] == [[-1], [-1]]
    unmatched = tw.hard_negatives(one, one, 1.0, positives=None, seed=1)
    assert [x.tolist() for x in unmatched] == [[0], [0]]
    few = torch.ones(3, 4)
    of_image, of_text = tw.hard_negatives(few, few[:0], 1.0, seed=1)
    assert of_image.tolist() == [-1] * 3 and of_text.shape == (0,)
    of_image, of_text = tw.hard_negatives(few[:0], few, 1.0, seed=1)
    assert of_text.tolist() == [-1] * 3 and of_image.shape == (0,)
    of_image, of_text = tw.hard_negatives(one, few, 1.0, positives=1, seed=1)
    assert of_image.item() in (0, 2) and of_text.tolist() == [0, -1, 0]


@backends
def test_nan_never_wins(backend):
    image, text = Case("n", related(30, 6, 5)).features(torch.float32)
    image[7], text[2, 1] = NAN, NAN
    of_image, of_text = tw.hard_negatives(image, text, 3.0, positives=None, seed=1)
    assert of_image[7] == -1 and of_text[2] == -1
    others = of_image[torch.arange(30) != 7], of_text[torch.arange(6) != 2]
    assert (others[0] >= 0).all() and (others[0] != 2).all()
    assert (others[1] >= 0).all() and (others[1] != 7).all()
    for index in tw.hard_negatives(image, text, NAN, positives=None, seed=1):
        assert (index == -1).all()


@backends
def test_infinite_logits(backend):
    image, text = torch.tensor([[INF], [1.0]]), torch.tensor([[-1.0], [0.0], [2.0], [3.0]])
    of_image, of_text = tw.hard_negatives(image, text, 1.0, positives=None, seed=1)
    assert of_image[0] == 2  # the first of equals
    assert of_text.tolist() == [1, 1, 0, 0]
    assert tw.hard_negatives(image[:1], text[:2], 1.0, positives=None, seed=1)[0].tolist() == [-1]


@backends
@pytest.mark.parametrize("rows, cols", [(70, 600), (600, 70)])
def test_first_of_equals_over_blocks(backend, rows, cols):
    """Beside logits of 1e30 no noise is left."""
    found = tw.hard_negatives(torch.ones(rows, 2), torch.ones(cols, 2), 1e30, positives=None)
    assert not any(index.any() for index in found)


@backends
@pytest.mark.parametrize("start", [2**32 - 20, -20, 2**63 - 50])
def test_parts_of_a_batch_are_the_whole(backend, start):
    image, text = Case("parts", related(50, 40, 6)).features(torch.float32)
    of_image, of_text = tw.hard_negatives(image, text, 10.0, seed=9, row_offset=start)
    for first, last in ((0, 17), (17, 18), (18, 50)):
        mine, theirs = tw.hard_negatives(
            image[first:last], text, 10.0, positives=first, seed=9, row_offset=start + first
        )
        assert torch.equal(mine, of_image[first:last])
        here = (of_text >= first) & (of_text < last)
        assert torch.equal(theirs[here] + first, of_text[here])


@backends
def test_seeds(backend):
    image, text = Case("seeds", unrelated(40, 40, 4)).features(torch.float32)

    def draw(seed=None):
        return torch.cat(tw.hard_negatives(image, text, 1.0, seed=seed))

    first = draw(7)
    assert torch.equal(draw(torch.tensor([7])), first)
    for seed in (-7, 7 + 2**32, -(2**63)):
        assert (draw(seed) != first).sum() > 50
    torch.manual_seed(3)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(draw(), first) and torch.equal(draw(), second)


@backends
def test_inputs_are_left_alone(backend):
    image, text = Case("alone", related(9, 7, 5)).features(torch.float32)
    copies = image.clone(), text.clone()
    tw.hard_negatives(image, text, 3.0, seed=1)
    assert torch.equal(image, copies[0]) and torch.equal(text, copies[1])


# Statistics: the interpreter, where there is one, would take too long. By chance, one in 10,000
# sound generators is worse than LEAST_P.
LEAST_P = 1e-4
DRAWS = 20_000
counted = pytest.mark.parametrize("backend", ["reference", *KERNELS[:1]], indirect=True)


def repeated_draws(one, others, swapped, row_offset=0):
    """One row with id 0, DRAWS times, against others with ids 0, 1, ... of which three are 0."""
    own = torch.zeros(DRAWS, dtype=torch.int64)
    theirs = torch.arange(len(others))
    theirs[[3, 5, len(others) - 1]] = 0
    pair = (one.expand(DRAWS, -1), others), (own, theirs)
    if swapped:
        pair = tuple(x[::-1] for x in pair)
    features, names = pair
    options = dict(positives=names, seed=SEED, row_offset=row_offset)
    index = tw.hard_negatives(*features, 9.0, **options)[swapped]
    p = (9.0 * others.double() @ one[0].double()).masked_fill(theirs == 0, -INF).softmax(0)
    return index, p


def rows_of_one_law(swapped):
    one, others = Case("law", unrelated(1, 13, 6)).features(torch.float32)
    return repeated_draws(one, others, swapped)


def frequency_p(swapped):
    index, p = rows_of_one_law(swapped)
    return chi_square_p(torch.bincount(index, minlength=len(p)), DRAWS * p)


def neighbour_p(swapped, lag):
    """Of rows side by side: of equal law, and to be independent."""
    index, p = rows_of_one_law(swapped)
    pairs = index[: DRAWS // (2 * lag) * 2 * lag].view(-1, 2, lag)
    code = (pairs[:, 0] * len(p) + pairs[:, 1]).flatten()
    counts = torch.bincount(code, minlength=len(p) ** 2)
    return chi_square_p(counts, len(code) * torch.outer(p, p))


def joint_p(calls=600):
    """All six draws of three pairs at once, each between two: 64 cells of known probability."""
    image, text = Case("joint", unrelated(3, 3, 4)).features(torch.float32)
    codes = []
    for seed in range(calls):
        of_image, of_text = tw.hard_negatives(image, text, 1.5, seed=seed)
        own = torch.arange(3)
        second = torch.cat([(of_image - own) % 3 == 2, (of_text - own) % 3 == 2])
        codes.append(int((second * 2 ** torch.arange(6)).sum()))
    z = 1.5 * image.double() @ text.double().T
    z.fill_diagonal_(-INF)
    p = torch.cat([z.softmax(1), z.softmax(0).T])  # (6, 3)
    chance = [(p[i, (i + 1) % 3], p[i, (i + 2) % 3]) for i in range(6)]
    expected = torch.stack([
        math.prod(chance[i][code >> i & 1] for i in range(6)) for code in range(64)
    ])
    return chi_square_p(torch.bincount(torch.tensor(codes), minlength=64), calls * expected)


@counted
@pytest.mark.parametrize("swapped", [False, True], ids=["texts", "images"])
def test_frequencies_follow_the_softmax(backend, swapped):
    assert frequency_p(swapped) > LEAST_P


@counted
@pytest.mark.parametrize("swapped", [False, True], ids=["texts", "images"])
@pytest.mark.parametrize("lag", [1, 4])
def test_neighbours_are_independent(backend, swapped, lag):
    assert neighbour_p(swapped, lag) > LEAST_P


@counted
def test_both_directions_are_independent(backend):
    assert joint_p() > LEAST_P


gumbel = _philox.gumbel


def one_stream_for_both(*arguments, op):
    return gumbel(*arguments, op=_philox.NEGATIVE_TEXTS)


def colder(*arguments, op):
    return 0.9 * gumbel(*arguments, op=op)


def lowest_instead(*arguments, op):
    return -gumbel(*arguments, op=op)


def rows_in_pairs(seed, rows, cols, row_offset, op):
    return gumbel(seed, rows + 1, cols, row_offset, op)[torch.arange(rows) // 2]


def columns_in_pairs(seed, rows, cols, row_offset, op):
    return gumbel(seed, rows, cols + 1, row_offset, op)[:, torch.arange(cols) // 2]


FAULTS = [
    (one_stream_for_both, joint_p, ()),
    (rows_in_pairs, neighbour_p, (False, 1)), (rows_in_pairs, frequency_p, (True,)),
    (columns_in_pairs, neighbour_p, (True, 1)), (columns_in_pairs, frequency_p, (False,)),
    (colder, frequency_p, (False,)), (colder, frequency_p, (True,)),
    (lowest_instead, frequency_p, (False,)),
]  # fmt: skip


@pytest.mark.parametrize("fault, test, arguments", FAULTS)
def test_a_planted_fault_shows(monkeypatch, fault, test, arguments):
    monkeypatch.setattr(_philox, "gumbel", fault)
    with tw.backend("reference"):
        assert test(*arguments) < LEAST_P
