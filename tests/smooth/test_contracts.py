"""What all smooth functions promise: limits, rates, gradients, dtypes, masks, messages."""

import math

import pytest
import torch

import tilewise as tw
from tests.common.contrastive_cases import DEVICE
from tests.smooth.cases import CASES, LABELS, POSITIVE, REFERENCES, matrix

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="its tensors were made on the CPU")
ALL = pytest.mark.parametrize("name", CASES)
X = torch.zeros(4, 6)


def test_every_function_has_a_case():
    assert set(CASES) == {name for name in vars(tw.smooth) if callable(getattr(tw.smooth, name))}
    for name in CASES:
        for part in ("Args:", "Returns:", "Rate:", "Cost:", "Raises:"):
            assert part in getattr(tw.smooth, name).__doc__, f"{name}: docstring lacks {part}"


@ALL
@pytest.mark.parametrize("seed", range(2))
def test_converges_at_the_stated_rate(name, seed):
    case, x = CASES[name], matrix(seed)
    hard = case.call(x, 0)
    for tau in (2.0, 1.0, 0.3, 0.1, 0.03, 0.01):
        error = (case.call(x, tau) - hard).abs()
        assert (error <= case.bound(x, tau) + 1e-12).all(), (tau, error)
    assert error.max() < 0.03
    if case.exponent:
        gap = case.exponent(x)
        larger, smaller = ((case.call(x, gap / n) - hard).abs().max() for n in (10, 22))
        assert (larger / smaller).log().item() == pytest.approx(12, abs=0.6)


@ALL
@pytest.mark.parametrize("tau", [1.0, 0.2])
def test_gradients(name, tau):
    """By x and by a temperature that learns."""
    x, scale = matrix(1).requires_grad_(), torch.tensor(tau).double().requires_grad_()
    assert torch.autograd.gradcheck(CASES[name].call, (x, scale), fast_mode=True)
    assert torch.autograd.gradgradcheck(CASES[name].call, (x, scale), fast_mode=True)


@ALL
def test_a_float_and_a_tensor_are_the_same_temperature(name):
    call, x = CASES[name].call, matrix().float()
    assert torch.equal(call(x, 0.3), call(x, torch.tensor(0.3)))
    assert torch.equal(call(x, 1), call(x, 1.0))


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_half_precision_is_computed_in_float32(name, dtype):
    case, x = CASES[name], matrix().to(dtype)
    expected = case.call(x.float(), 0.5)
    found = case.call(x.requires_grad_(), 0.5)
    assert found.dtype == (dtype if case.values else torch.float32)
    assert torch.equal(found, expected.to(found.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.call(x, 0.5), found)
    found.sum().backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()


@ALL
@pytest.mark.parametrize("scale, tau", [
    (1e30, 1.0), (1e36, 1e-3), (1.0, 1e-30), (1.0, 1e-44), (1e-30, 1e30), (0.0, 1e-30)
])  # fmt: skip
def test_extremes_give_no_nan(name, scale, tau):
    """Beside gaps that are large to the temperature, the hard value; beside small ones, even."""
    call = CASES[name].call
    x = (scale * matrix().float()).requires_grad_()
    found = call(x, tau)
    assert found.isfinite().all()
    if found.requires_grad:
        found.sum().backward()
        assert x.grad.isfinite().all()
    if tau <= 1:
        torch.testing.assert_close(found, call(x, 0), rtol=1e-6, atol=1e-20)


@ALL
def test_the_limit_has_no_gradient_but_where_it_is_a_value(name):
    x = matrix().requires_grad_()
    assert CASES[name].call(x, 0).requires_grad == (name in ("maximum", "sort"))


@ALL
@pytest.mark.parametrize("tau", [0, 0.5])
def test_leading_dimensions_are_problems_of_their_own(name, tau):
    many, call = torch.stack([matrix(0), matrix(1), matrix(2)]), CASES[name].call
    smooth, labels, more = tw.smooth, LABELS.expand(3, -1), {}
    if name == "auc":
        batched = smooth.auc(many, POSITIVE.expand_as(many), tau)
    elif name == "bleu":
        batched = smooth.bleu(many[:, None], REFERENCES.expand(3, 1, 2, 5), tau, max_n=2)
    elif name in ("accuracy", "f1", "topk_accuracy"):
        more = {"f1": {"average": None}, "topk_accuracy": {"k": 2}}.get(name, {})
        batched = getattr(smooth, name)(many, labels, tau=tau, **more)
    else:
        batched = call(many, tau)
        moved = call(many.movedim(-1, 0), tau, dim=0)
        torch.testing.assert_close(moved.movedim(0, -1) if moved.dim() == 3 else moved, batched)
    torch.testing.assert_close(batched, torch.stack([call(x, tau) for x in many]).view_as(batched))


VALUES = "maximum", "onehot_argmax", "argmax", "topk", "rank", "sort"


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("tau", [0, 0.5])
def test_masked_elements_are_as_if_not_there(name, tau):
    """By a mask or by -inf, whatever stands in their place, in rows of different lengths."""
    call = CASES[name].call
    x, kept = matrix(), torch.tensor([[1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1],
                                      [1, 1, 0, 0, 1, 1]]).bool()  # fmt: skip
    gone = x.masked_fill(~kept, math.nan)
    found = call(gone, tau, mask=kept)
    assert torch.equal(found, call(x.masked_fill(~kept, -math.inf), tau))
    for row, there, got in zip(x, kept, found, strict=True):
        alone = call(row[there], tau)
        if name == "argmax":  # indices are those of the whole row
            place = there.nonzero().flatten().double()
            alone = (tw.smooth.onehot_argmax(row[there], tau) * place).sum()
        if name in ("onehot_argmax", "topk", "rank"):
            assert not got[~there].any()
            got = got[there]
        if name == "sort":
            assert not got[there.sum() :].any()
            got = got[: there.sum()]
        torch.testing.assert_close(got, alone)


@pytest.mark.parametrize("name", VALUES)
def test_masked_elements_get_no_gradient_and_no_nan(name):
    x = matrix().masked_fill(torch.eye(4, 6).bool(), -math.inf)
    x[3] = -math.inf
    x, tau = x.requires_grad_(), torch.tensor(0.5).double().requires_grad_()
    CASES[name].call(x, tau)[:3].square().sum().backward()
    assert x.grad.isfinite().all() and not x.grad[x == -math.inf].any()
    assert x.grad[:3].any() and (tau.grad.isfinite() or name in ("onehot_argmax", "argmax"))


def test_rows_where_nothing_counts():
    x = torch.full((2, 3), -math.inf)
    assert tw.smooth.maximum(x, 0.5).tolist() == [-math.inf] * 2
    assert tw.smooth.onehot_argmax(x, 0.5).isnan().all() and tw.smooth.argmax(x, 0).isnan().all()
    for found in (tw.smooth.topk(x, 2, 0.5), tw.smooth.rank(x), tw.smooth.sort(x)):
        assert not found.any()


@pytest.mark.parametrize("name", VALUES)
def test_ties_share_at_every_temperature(name):
    x = torch.tensor([[3.0, 1.0, 3.0, 1.0, 1.0, 0.0]])
    expected = {
        "maximum": [3.0], "argmax": [1.0], "onehot_argmax": [[0.5, 0, 0.5, 0, 0, 0]],
        "topk": [[1, 0, 1, 0, 0, 0]], "rank": [[5.5, 3, 5.5, 3, 3, 1]],
        "sort": [[0, 1, 1, 1, 3, 3]],
    }[name]  # fmt: skip
    expected = torch.tensor(expected).float()
    assert torch.equal(CASES[name].call(x, 0), expected)
    torch.testing.assert_close(CASES[name].call(x, 0.02), expected, atol=0.02, rtol=0)
    third = tw.smooth.topk(x, 3, 0)
    torch.testing.assert_close(third, torch.tensor([[1, 1 / 3, 1, 1 / 3, 1 / 3, 0]]))
    torch.testing.assert_close(tw.smooth.topk(x, 3, 0.02), third)


@pytest.mark.parametrize("name", ["topk", "rank", "f1", "bleu"])
def test_it_is_traced_without_a_break(name):
    x = matrix().float()
    compiled = torch.compile(CASES[name].call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, 0.5), CASES[name].call(x, 0.5))


@pytest.mark.parametrize("call, error, message", [
    (lambda: tw.smooth.maximum(X.long()), TypeError, "x: expected float16"),
    (lambda: tw.smooth.maximum(X[0, 0]), ValueError, "x: expected at least one dimension"),
    (lambda: tw.smooth.maximum(X[:, :0]), ValueError, "x: expected at least one element"),
    (lambda: tw.smooth.argmax(X, -1.0), ValueError, "tau: expected at least 0, got -1"),
    (lambda: tw.smooth.argmax(X, math.nan), ValueError, "tau: expected at least 0"),
    (lambda: tw.smooth.argmax(X, "1"), TypeError, "tau: expected a float, got str"),
    (lambda: tw.smooth.argmax(X, torch.ones(2)), ValueError, "tau: expected one real element"),
    (lambda: tw.smooth.argmax(X, 1.0, 2), ValueError, "dim: expected from -2 to 1"),
    (lambda: tw.smooth.sort(X, mask=X), TypeError, "mask: expected a bool tensor"),
    (lambda: tw.smooth.rank(X, mask=X[:, :2] > 0), ValueError, "mask: expected to broadcast"),
    (lambda: tw.smooth.topk(X, 7), ValueError, "k: expected at most the 6 elements, got 7"),
    (lambda: tw.smooth.topk(X, 0), ValueError, "k: expected at least 1"),
    (lambda: tw.smooth.topk_accuracy(X, LABELS, 7), ValueError, "k: expected at most"),
    (lambda: tw.smooth.accuracy(X[0], LABELS), ValueError, r"logits: expected \(..., N, K\)"),
    (lambda: tw.smooth.accuracy(X, LABELS[:3]), ValueError, r"labels: expected \(4,\)"),
    (lambda: tw.smooth.accuracy(X, X > 0), TypeError, "labels: expected an int64 tensor"),
    (lambda: tw.smooth.f1(X, LABELS, average="mean"), ValueError, "average: expected"),
    (lambda: tw.smooth.f1(X, X[0] > 0), ValueError, r"labels: expected \(4, 6\)"),
    (lambda: tw.smooth.auc(X, LABELS), TypeError, "labels: expected a bool tensor"),
    (lambda: tw.smooth.auc(X[0, 0], X[0, 0] > 0), ValueError, "scores: expected"),
    (lambda: tw.smooth.bleu(X, LABELS), ValueError, "logits: expected"),
    (lambda: tw.smooth.bleu(X.int(), LABELS), TypeError, "logits: expected float16"),
    (lambda: tw.smooth.bleu(X[None], X[None]), TypeError, "references: expected an int64"),
    (lambda: tw.smooth.bleu(X[None], LABELS[:, None]), ValueError, "references: expected"),
    (lambda: tw.smooth.bleu(X[None], LABELS[None], max_n=0), ValueError, "max_n"),
    (lambda: tw.smooth.bleu(X[None], LABELS[None], smoothing=-1), ValueError, "smoothing"),
])
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
