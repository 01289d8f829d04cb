"""tilewise.nearest_code: every backend returns the reference's indices, whatever the data."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilewise as tw
from tests.common.codebook_cases import CASES
from tests.common.compilers import compilers, once
from tests.common.contrastive_cases import DEVICE
from tilewise.reference.nearest_code import NearestCode, _distance

BACKENDS = ["cpu", "triton"] if DEVICE == "cpu" else ["triton"]
OPERATORS = {"cpu": torch.ops.tilewise, "triton": torch.ops.tilewise_triton}
METRICS = ["l2", "cosine", "dot"]
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with tw.backend(request.param):
        yield request.param


def assert_same(ours, exact):
    """Equal indices; distances equal to the last bit, NaN where the reference has NaN."""
    wrong = (ours.index != exact.index).sum()
    assert wrong == 0, f"{wrong} of {exact.index.numel()} indices differ"
    torch.testing.assert_close(ours.distance, exact.distance, rtol=0, atol=0, equal_nan=True)


def check(x, codebook, *args, **kwargs):
    assert_same(
        tw.nearest_code(x, codebook, *args, **kwargs),
        tw.reference.nearest_code(x, codebook, *args, **kwargs),
    )


def searches(names, *options, always=()):
    """Every backend, case and combination of options, of which most are slow where programs are
    interpreted: there each case has one, in turn, and those in `always` have all."""
    combinations, found = list(itertools.product(*options)), []
    for backend, (i, name) in itertools.product(BACKENDS, enumerate(names)):
        turn = combinations[5 * i % len(combinations)]
        for values in combinations:
            quick = backend == "cpu" or DEVICE != "cpu" or name in always or values == turn
            marks = [] if quick else [pytest.mark.slow]
            found.append(pytest.param(backend, name, *values, marks=marks))
    return found


@pytest.mark.parametrize("backend, name, metric", searches(
    BY_NAME, METRICS, always=["near", "common_offset", "zeros", "infinities"]
), indirect=["backend"])
def test_same_as_reference(backend, name, metric):
    check(*BY_NAME[name].tensors(), metric)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend, name, dtype", searches(
    ["normal-100x129x33", "near", "common_offset", "scales", "zeros"], HALVES
), indirect=["backend"])
def test_half_precision_is_exact_on_its_own_values(backend, name, dtype):
    case = BY_NAME[name]
    check(*case.tensors(dtype))
    check(*case.tensors(torch.float32, dtype))  # rows and codes of different dtypes
    check(*case.tensors(dtype, torch.float32))


@pytest.mark.parametrize("backend, name, metric, k", searches(
    ["near", "duplicates", "integers", "nan_codes", "no_finite_code"], METRICS, [5, 2, 16, 1]
), indirect=["backend"])
def test_the_k_nearest_in_order(backend, name, k, metric):
    check(*BY_NAME[name].tensors(), metric, k)


@given(
    n=st.integers(0, 40), k=st.integers(1, 80), d=st.integers(1, 20), seed=st.integers(0, 2**20),
    metric=st.sampled_from(METRICS), case=st.sampled_from(CASES),
    dtype=st.sampled_from([torch.float32, *HALVES]),
)
def test_random_problems(n, k, d, seed, metric, case, dtype):
    torch.manual_seed(seed)
    x, codebook = (t.to(DEVICE, dtype) for t in case.make(max(n, 1), k, d))
    check(x[:n], codebook, metric, min(k, 1 + seed % 16))


def test_reference_is_a_plain_argmin():
    x, codebook = BY_NAME["normal-100x129x33"].tensors(torch.float64)
    distance = (x[:, None] - codebook).square().sum(-1)
    ours = tw.reference.nearest_code(x, codebook)
    assert torch.equal(ours.index, distance.argmin(-1))
    torch.testing.assert_close(ours.distance, distance.amin(-1).float())
    cosine = 1 - torch.nn.functional.cosine_similarity(x[:, None], codebook, dim=-1)
    ours = tw.reference.nearest_code(x, codebook, "cosine")
    assert torch.equal(ours.index, cosine.argmin(-1))
    dots = tw.reference.nearest_code(x, codebook, "dot")
    assert torch.equal(dots.index, (x @ codebook.T).argmax(-1))


def layouts(x):
    """The same values with other strides and offsets."""
    wide = torch.full((len(x) + 2, 2 * x.shape[1] + 3), float("nan"), dtype=x.dtype)
    wide[1:-1, 3::2] = x
    yield wide[1:-1, 3::2]
    wide = torch.full((x.shape[1], len(x) + 1), float("nan"), dtype=x.dtype)
    wide[:, 1:] = x.T
    yield wide[:, 1:].T
    wide = torch.full((len(x), x.shape[1] + 5), float("nan"), dtype=x.dtype)
    wide[:, 5:] = x
    yield wide[:, 5:]


def test_any_strides(backend):
    x, codebook = BY_NAME["normal-100x129x33"].tensors()
    expected = tw.nearest_code(x, codebook)
    for rows in layouts(x):
        for codes in layouts(codebook):
            assert_same(tw.nearest_code(rows, codes), expected)
    one_row = x[:1].expand(30, -1)
    assert_same(tw.nearest_code(one_row, codebook), tw.nearest_code(one_row.clone(), codebook))
    check(x, codebook[:1].expand(70, -1))


@pytest.mark.parametrize("backend, k", [
    *(("cpu", k) for k in (None, 3) if "cpu" in BACKENDS), ("triton", 3),
], indirect=["backend"])
def test_any_leading_shape(backend, k):
    x, codebook = BY_NAME["normal-100x129x33"].tensors()
    flat = tw.nearest_code(x, codebook, k=k)
    for shape in ((10, 10), (2, 5, 10), (100,), (1, 100)):
        ours = tw.nearest_code(x.reshape(*shape, 33), codebook, k=k)
        assert ours.index.shape == shape if k is None else (*shape, k)
        assert torch.equal(ours.index.flatten(), flat.index.flatten())
    assert tw.nearest_code(x[0], codebook).index.shape == ()
    assert tw.nearest_code(x[:0].reshape(0, 4, 33), codebook).index.shape == (0, 4)


@pytest.mark.parametrize("metric", METRICS)
def test_heads(backend, metric):
    x, codebook = torch.randn(3, 4, 5, 9), torch.randn(3, 21, 9)
    ours = tw.nearest_code(x, codebook, metric, k=2)
    for head in range(3):
        expected = tw.reference.nearest_code(x[head], codebook[head], metric, k=2)
        assert_same(NearestCode(ours.index[head], ours.distance[head]), expected)
    assert_same(ours, tw.reference.nearest_code(x, codebook, metric, k=2))


@pytest.mark.parametrize("k", [None, 2])
def test_masked_rows(backend, k):
    x, codebook = torch.randn(6, 7, 9), torch.randn(40, 9)
    mask = torch.rand(6, 7) < 0.5
    x[~mask] = float("nan")
    check(x, codebook, "l2", k, mask)
    ours = tw.nearest_code(x, codebook, k=k, mask=mask)
    assert (ours.index[~mask] == -1).all() and (ours.distance[~mask] == 0).all()
    assert (ours.index[mask] >= 0).all()
    check(x, codebook, "l2", k, mask[:, :1])  # broadcasts
    nothing = tw.nearest_code(x, codebook, mask=torch.zeros(6, 7, dtype=torch.bool))
    assert (nothing.index == -1).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [None, 3])
def test_gradients_of_the_distance(backend, metric, k):
    x, codebook = torch.randn(12, 5), torch.randn(9, 5)
    x[0], codebook[3] = 0.0, 0.0  # a norm of 0 has no direction
    mask = torch.arange(12) != 4
    results = []
    for function in (tw.nearest_code, tw.reference.nearest_code):
        a, b = x.clone().requires_grad_(), codebook.clone().requires_grad_()
        distance = function(a, b, metric, k, mask).distance
        weights = torch.arange(distance.numel(), dtype=torch.float32).view_as(distance)
        first = torch.autograd.grad((distance * weights).sum(), (a, b), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (a, b))
        results.append([*first, *second])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def test_only_the_gradients_asked_for(backend):
    x, codebook = torch.randn(12, 5), torch.randn(9, 5, requires_grad=True)
    distance = tw.nearest_code(x, codebook).distance
    distance.sum().backward()
    assert codebook.grad is not None and x.grad is None
    assert not tw.nearest_code(x, codebook).index.requires_grad
    with torch.no_grad():
        assert not tw.nearest_code(x, codebook).distance.requires_grad


def test_gradcheck_of_the_reference():
    x, codebook = torch.randn(4, 3).double(), torch.randn(5, 3).double()
    for metric in METRICS:  # in float64 to the end: the public result is rounded to float32
        def distance(a, b, metric=metric):
            index = tw.reference.nearest_code(a.detach(), b.detach(), metric).index
            chosen = b[index]
            return _distance(a, chosen, metric)

        assert torch.autograd.gradcheck(distance, (x.requires_grad_(), codebook.requires_grad_()))


def test_prepared_codebook(backend):
    x, codebook = BY_NAME["near"].tensors()
    for metric in METRICS:
        prepared = tw.prepare_codebook(codebook, metric)
        for rows in (x, x[:1], x[:0]):
            assert_same(tw.nearest_code(rows, prepared, metric),
                        tw.nearest_code(rows, codebook, metric))
    with pytest.raises(ValueError, match="metric.*'dot'.*'l2'"):
        tw.nearest_code(x, prepared, "l2")
    heads = torch.stack([codebook, codebook.flip(0)])
    ours = tw.nearest_code(torch.stack([x, x]), tw.prepare_codebook(heads))
    assert_same(ours, tw.nearest_code(torch.stack([x, x]), heads))
    codebook.add_(1.0)
    with pytest.raises(RuntimeError, match="modified after"):
        tw.nearest_code(x, prepared, "dot")


def through_a_file(x):
    file = io.BytesIO()
    torch.save(x, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [
    copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), through_a_file,
], ids=["copy", "deepcopy", "pickle", "torch.save"])
def test_copies_of_a_prepared_codebook(backend, copied):
    x, codebook = torch.randn(9, 8), torch.randn(30, 8).mul_(2)
    prepared = tw.prepare_codebook(codebook, "cosine")
    mine = copied(prepared)
    assert_same(tw.nearest_code(x, mine, "cosine"), tw.nearest_code(x, codebook, "cosine"))
    mine.codebook.neg_()
    with pytest.raises(RuntimeError, match="modified after"):
        tw.nearest_code(x, mine, "cosine")


def test_prepared_inside_of_what_is_compiled():
    def search(x, codebook):
        return tw.nearest_code(x, tw.prepare_codebook(codebook)).index

    x, codebook = torch.randn(9, 8, device=DEVICE), torch.randn(30, 8, device=DEVICE)
    compiled = torch.compile(search, fullgraph=True, backend="eager")
    # As large as its codes differ: torch 2.9 wants to be told that this may be.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert torch.equal(compiled(x, codebook), search(x, codebook))


def test_prepared_codebooks_of_inference_mode(backend):
    x, codebook = torch.randn(9, 8), torch.randn(30, 8)
    with torch.inference_mode():
        inside = 1 * codebook
        for codes in (codebook, codebook[:], inside):
            prepared = tw.prepare_codebook(codes)
            assert_same(tw.nearest_code(x, prepared), tw.nearest_code(x, codebook))
    for ready in (prepared, tw.prepare_codebook(inside), copy.deepcopy(prepared)):
        assert_same(tw.nearest_code(x, ready), tw.nearest_code(x, codebook))


@compilers()
def test_compiled(backend, compiler):
    torch._dynamo.reset()

    def step(x, codebook):
        index, distance = tw.nearest_code(x, codebook, k=2)
        return codebook[index], distance.mean()

    compiled = torch.compile(step, fullgraph=True, backend=compiler, dynamic=once(compiler))
    codebook = torch.randn(30, 8, requires_grad=True)
    for count in (16, 16, 19):
        x = torch.randn(count, 8, requires_grad=True)
        for ours, eager in zip(compiled(x, codebook), step(x, codebook), strict=True):
            torch.testing.assert_close(ours, eager)
        gradients = [
            torch.autograd.grad(f(x, codebook)[1], (x, codebook)) for f in (compiled, step)
        ]
        for ours, eager in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, eager)
