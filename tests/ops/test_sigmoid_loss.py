"""tilewise.sigmoid_loss: every backend against float64, within the error of the eager op."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilewise as tw
from benchmarks.baselines import eager_sigmoid_loss
from tests.common.budget import assert_within_budget
from tests.common.compilers import compilers, once
from tests.common.contrastive_cases import CASES, DEVICE, Case, ids, related
from tilewise.reference._matches import matches

BACKENDS = ["cpu", "triton"] if DEVICE == "cpu" else ["triton"]
OPERATORS = {"cpu": torch.ops.tilewise, "triton": torch.ops.tilewise_triton}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
@pytest.fixture(params=BACKENDS)
def backend(request):
    with tw.backend(request.param):
        yield request.param


def outputs(loss_function, case: Case, features, dtype, factor=1.0):
    """Loss and all gradients of factor * loss, in the dtypes in which a user gets them."""
    where = {"dtype": dtype, "device": features[0].device, "requires_grad": True}
    scale = torch.tensor(case.logit_scale, **where)
    leaves = [x.detach().requires_grad_() for x in features] + [scale]
    arguments = [*leaves]
    if case.logit_bias is not None:
        leaves.append(torch.tensor(case.logit_bias, **where))
        arguments.append(leaves[-1])
    else:
        arguments.append(None)
    loss = loss_function(*arguments, positives=case.positives)
    gradients = torch.autograd.grad(loss * factor, leaves)
    names = ("d_image", "d_text", "d_scale", "d_bias")
    return {"loss": loss.detach(), **dict(zip(names, gradients, strict=False))}


def magnitudes(case: Case, image, text, truth, factor=1.0) -> dict[str, float]:
    """Size of each output of factor * loss, for the error budget.

    All are sums, so it is the (largest) sum of the terms' absolute values: each term is rounded,
    whatever is left when they cancel. And each term inherits the rounding of its logit: an error
    of one epsilon in z changes sigmoid(z) and softplus(z) by up to |z| epsilons.
    """
    dot = image @ text.T
    z = dot * case.logit_scale + (case.logit_bias or 0.0)
    dz = torch.sigmoid(z)
    dz = dz - matches(image, text, case.positives).double()
    dz = dz.abs() / max(len(image), 1)
    terms = dz * (1 + z.abs()) * factor
    scale = abs(case.logit_scale)

    def largest(x):
        return float(x.max()) if x.numel() else 0.0

    return {
        "loss": float(truth["loss"]) + float((dz * z.abs()).sum()),
        "d_image": scale * largest(terms @ text.abs()),
        "d_text": scale * largest(terms.T @ image.abs()),
        "d_scale": float((terms * dot.abs()).sum()),
        "d_bias": float(terms.sum()),
    }


def check(case: Case, dtype, factor=1.0):
    image, text = case.features(dtype)
    exact = [x.double() for x in (image, text)]
    truth = outputs(tw.reference.sigmoid_loss, case, exact, torch.float64, factor)
    scalars = torch.float64 if dtype == torch.float64 else torch.float32
    ours = outputs(tw.sigmoid_loss, case, (image, text), scalars, factor)
    assert ours["loss"].dtype == scalars
    assert ours["d_image"].dtype == ours["d_text"].dtype == dtype
    eager = ours if len(image) == 0 else outputs(
        eager_sigmoid_loss, case, (image, text), scalars, factor
    )
    size = magnitudes(case, *exact, truth, factor)
    assert_within_budget(ours, eager, truth, size)


SERVED = [(backend, dtype) for backend in BACKENDS for dtype in DTYPES
          if (backend, dtype) != ("triton", torch.float64)]


@pytest.mark.parametrize("backend, dtype", SERVED, ids=str, indirect=["backend"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_error_budget(backend, case, dtype):
    check(case, dtype)


@given(
    b=st.integers(0, 40), n=st.integers(0, 40), d=st.integers(0, 20),
    scale=st.floats(-20, 100), bias=st.none() | st.floats(-20, 20),
    positives=st.none() | st.integers(-50, 50), dtype=st.sampled_from(DTYPES),
)
def test_random_problems(b, n, d, scale, bias, positives, dtype):
    check(Case("random", related(b, n, d), scale, bias, positives), dtype)


def reference_gradcheck_inputs():
    image, text = Case("gradcheck", related(4, 5, 3)).features(torch.float64)
    scalars = [torch.tensor(v, dtype=torch.float64) for v in (3.0, -1.0)]
    return [x.requires_grad_() for x in (image, text, *scalars)]


@pytest.mark.parametrize("positives", [0, 1, None])
def test_reference_gradcheck(positives):
    def loss(*arguments):
        return tw.reference.sigmoid_loss(*arguments, positives=positives)

    assert torch.autograd.gradcheck(loss, reference_gradcheck_inputs())
    assert torch.autograd.gradgradcheck(loss, reference_gradcheck_inputs())


def test_reference_is_the_published_loss():
    """One row by hand: -log sigmoid(z) for the match, -log sigmoid(-z) for the others."""
    image = torch.tensor([[1.0, 0.0]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    z = [2.0 * dot - 0.5 for dot in (1.0, 0.0, -1.0)]
    expected = math.log1p(math.exp(-z[0])) + sum(math.log1p(math.exp(v)) for v in z[1:])
    assert tw.reference.sigmoid_loss(image, text, 2.0, -0.5).item() == pytest.approx(expected)


@pytest.mark.parametrize("needed", range(16))
def test_only_the_gradients_asked_for(backend, needed):
    values = [*Case("flags", related(6, 7, 4)).features(torch.float32),
              torch.tensor(5.0), torch.tensor(-2.0)]
    flags = [bool(needed >> i & 1) for i in range(4)]
    results = OPERATORS[backend].sigmoid_loss(*values, 0, None, None, *flags)[1:]
    for flag, value, result in zip(flags, values, results, strict=True):
        assert result.shape == (value.shape if flag else (0,))
    leaves = [v.clone().requires_grad_(flag) for v, flag in zip(values, flags, strict=True)]
    loss = tw.sigmoid_loss(*leaves)
    assert loss.requires_grad == any(flags)
    if any(flags):
        loss.backward()
    for leaf, flag, result in zip(leaves, flags, results, strict=True):
        assert (leaf.grad is not None) == flag
        if flag:
            assert torch.equal(leaf.grad, result)


def test_no_gradients_under_no_grad(backend):
    image, text = (x.requires_grad_() for x in Case("g", related(6, 6, 4)).features(torch.float32))
    with torch.no_grad():
        assert not tw.sigmoid_loss(image, text, 10.0).requires_grad
    with torch.inference_mode():
        quiet = tw.sigmoid_loss(image, text, 10.0)
    torch.testing.assert_close(quiet, tw.sigmoid_loss(image, text, 10.0).detach())


def test_floats_and_tensors_agree(backend):
    image, text = Case("f", related(6, 6, 4)).features(torch.float32)
    plain = tw.sigmoid_loss(image, text, 3, -1.5)
    for shape in ((), (1,), (1, 1)):
        scale, bias = torch.full(shape, 3.0), torch.full(shape, -1.5)
        scale.requires_grad_()
        loss = tw.sigmoid_loss(image, text, scale, bias)
        loss.backward()
        assert torch.equal(loss.detach(), plain) and scale.grad.shape == shape


def test_double_backward_raises(backend):
    image, text = Case("dd", related(6, 6, 4)).features(torch.float32)
    image.requires_grad_()
    gradient, = torch.autograd.grad(tw.sigmoid_loss(image, text, 10.0), image, create_graph=True)
    with pytest.raises(RuntimeError, match="backend\\('reference'\\)"):
        gradient.square().sum().backward()
    with tw.backend("reference"):
        loss = tw.sigmoid_loss(image, text, 10.0)
    gradient, = torch.autograd.grad(loss, image, create_graph=True)
    gradient.square().sum().backward()
    assert image.grad.abs().max() > 0


def test_backward_twice_over_a_retained_graph(backend):
    image, text = Case("r", related(6, 6, 4)).features(torch.float32)
    image.requires_grad_()
    loss = tw.sigmoid_loss(image, text, 10.0)
    loss.backward(torch.tensor(2.0), retain_graph=True)
    first = image.grad.clone()
    loss.backward(torch.tensor(2.0))
    assert torch.equal(image.grad, 2 * first)


X, Y = torch.zeros(3, 4), torch.zeros(5, 4)


def test_operator_checks_its_arguments_too():
    """torch.ops can be called without the public function."""
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"text_features: expected \(N, 4\), got \[5, 3\]"):
        torch.ops.tilewise.sigmoid_loss(X, Y[:, :3], one, None, 0, None, None, *[False] * 4)
    with pytest.raises(TypeError, match="text_features: expected Float, as image_features"):
        torch.ops.tilewise.sigmoid_loss(X, Y.double(), one, None, 0, None, None, *[False] * 4)


def towers():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"image": torch.nn.Linear(12, 8), "text": torch.nn.Linear(10, 8)})
    model.logit_scale = torch.nn.Parameter(torch.tensor(math.log(10.0)))
    model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    return model


def model_loss(model, images, texts):
    return tw.sigmoid_loss(
        torch.nn.functional.normalize(model["image"](images), dim=-1),
        torch.nn.functional.normalize(model["text"](texts), dim=-1),
        model.logit_scale.exp(), model.logit_bias,
    )


@compilers("autocast", (False, True))
def test_compiled_training_step(backend, compiler, autocast):
    torch._dynamo.reset()
    compiled_loss = torch.compile(
        model_loss, fullgraph=True, backend=compiler, dynamic=once(compiler)
    )
    plain, compiled = towers(), towers()
    torch.manual_seed(0)
    for count in (16, 16, 19):  # another batch size must not break the graph either
        images, texts = torch.randn(count, 12), torch.randn(count, 10)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
            expected = model_loss(plain, images, texts)
            loss = compiled_loss(compiled, images, texts)
        (expected + loss).backward()
        torch.testing.assert_close(loss, expected, rtol=2e-2 if autocast else 1e-5, atol=0)
        for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=5e-2, atol=5e-3 if autocast else 1e-5)


def test_ids_compile(backend):
    torch._dynamo.reset()
    image, text = Case("ic", related(12, 15, 4)).features(torch.float32)
    compiled = torch.compile(tw.sigmoid_loss, fullgraph=True, backend="aot_eager")
    same = ids(12, 15, 5)
    assert torch.equal(
        compiled(image, text, 10.0, positives=same),
        tw.sigmoid_loss(image, text, 10.0, positives=same),
    )


def test_ids_of_rows_are_the_diagonal(backend):
    features = Case("id", related(40, 40, 8)).features(torch.float32)
    rows = torch.arange(40)
    by_ids = tw.sigmoid_loss(*features, 10.0, -10.0, positives=(rows, rows))
    assert torch.equal(by_ids, tw.sigmoid_loss(*features, 10.0, -10.0))


def test_compiled_reference():
    torch._dynamo.reset()
    image, text = Case("cr", related(6, 6, 4)).features(torch.float32)
    compiled = torch.compile(tw.sigmoid_loss, fullgraph=True, backend="aot_eager")
    with tw.backend("reference"):
        assert compiled(image, text, 10.0).item() == tw.sigmoid_loss(image, text, 10.0).item()


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tw.sigmoid_loss(X.double(), Y.double(), 10.0).dtype == torch.float64


def test_same_tensor_twice(backend):
    """Gradients of both roles add up when the features are one tensor."""
    image, _ = Case("self", related(9, 9, 4)).features(torch.float32)
    image.requires_grad_()
    tw.sigmoid_loss(image, image, 5.0).backward()
    got, image.grad = image.grad, None
    tw.reference.sigmoid_loss(image, image, 5.0).backward()
    torch.testing.assert_close(got, image.grad)
