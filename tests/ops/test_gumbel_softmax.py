"""tilewise.gumbel_softmax: every backend against float64, within the error of the eager op."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilewise as tw
from tests.common import random_cases as cases
from tests.common.budget import ROUNDINGS, assert_within_budget
from tests.common.contrastive_cases import DEVICE
from tests.common.random_cases import (
    BY_NAME,
    CASES,
    INF,
    Case,
    backends,
    kernels,
    masked,
    normal,
    served,
)
from tilewise.reference import _philox
from tilewise.reference.gumbel_softmax import _softmax

backend = pytest.fixture(cases.serve)
F32 = torch.float32


def outputs(function, logits, tau, grad, **options):
    """Sample and gradients of (sample * grad).sum(), in the dtypes in which a user gets them."""
    logits = logits.detach().requires_grad_()
    tau = tau.detach().requires_grad_()
    y = function(logits, tau, **options)
    d_logits, d_tau = torch.autograd.grad(y, (logits, tau), grad.to(y.dtype))
    return {"y": y.detach(), "d_logits": d_logits, "d_tau": d_tau}


def magnitudes(truth, z, tau, grad, dim, kept):
    """Size of each output, for the error budget.

    A rounding of a perturbed logit z changes y by |z| / tau roundings, and a sum over a row
    inherits those of all its terms. d_tau is float32, but made of the y that was `kept`, and has a
    rounding of each in that dtype.
    """
    y, grad = truth["y"], grad.abs()
    moves = torch.where(y > 0, 1 + 2 * (z / tau).abs(), 0)  # what roundings do to log y
    log_y = torch.where(y > 0, y.log(), 0).abs()
    inner = y * (grad + (y * grad).sum(dim, keepdim=True))

    def moved(moves):
        """What roundings do to inner: its own ones, and those of the sum in it."""
        terms = torch.where(y > 0, y * moves, 0)
        return torch.where(y > 0, inner * moves, 0) + y * (terms * grad).sum(dim, keepdim=True)

    coarse = ROUNDINGS[kept] * torch.finfo(kept).eps / (ROUNDINGS[F32] * torch.finfo(F32).eps)
    rough = moves + coarse if coarse > 1 else moves
    d_tau = moved(rough) * log_y + torch.where(y > 0, inner * rough, 0)
    return {
        "y": cases.largest(torch.where(y > 0, y * moves, 0)),
        "d_logits": cases.largest(moved(moves) / tau),
        "d_tau": float((d_tau / tau).nan_to_num(0, 0, 0).sum()),
    }


def sound(results, rows, dim):
    """The results without the rows that hold NaN, in y and d_logits; d_tau holds them all."""
    keep = {n: x.movedim(dim, -1)[rows] if n != "d_tau" else x for n, x in results.items()}
    if not rows.all():
        del keep["d_tau"]
    return keep


def check(case: Case, dtype, hard=False, noise=None):
    """The backend's results of a case against the reference in float64."""
    logits, exact = case.logits(dtype), case.logits(dtype).double()
    noise = cases.gumbel(logits, **case.sampling) if noise is None else noise
    grad = normal(*logits.shape, seed=3).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tau = torch.tensor(case.tau, dtype=wide)
    ours = outputs(tw.gumbel_softmax, logits, tau, grad, hard=hard, **case.sampling)
    assert ours["y"].dtype == ours["d_logits"].dtype == dtype and ours["d_tau"].dtype == wide
    z = exact + noise

    def truly(x, tau, dim):
        return _softmax((x + noise).movedim(dim, -1), tau).movedim(-1, dim)

    dim = case.dim
    eager = outputs(cases.eager_gumbel_softmax, logits, tau, grad, noise=noise, dim=dim)
    if logits.numel():
        truth = outputs(truly, exact, tau.double(), grad.double(), dim=dim)
    else:
        truth = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in eager.items()}
    kept = wide if hard else dtype  # with hard, y is made again, in float32
    size = magnitudes(truth, z, tau.double(), grad.double(), dim, kept)
    if hard:
        check_one_hot(ours["y"], z, dim)
        ours["y"] = eager["y"] = truth["y"]
    rows = truth["y"].isfinite().movedim(dim, -1).all(-1)
    assert torch.equal(ours["y"].isnan().movedim(dim, -1).any(-1), ~rows)
    ours, eager, truth = (sound(results, rows, dim) for results in (ours, eager, truth))
    assert_within_budget(ours, eager, truth, {name: size[name] for name in truth})


def check_one_hot(y, z, dim):
    """Exactly one 1 in each row, at the largest perturbed logit or one just as good."""
    y, z = y.movedim(dim, -1).double(), z.movedim(dim, -1)
    if z.shape[-1] == 0:
        return
    sound = ~y.isnan().any(-1)
    y, z = y[sound], z[sound]
    assert (((y == 0) | (y == 1)).all() and (y.sum(-1) == 1).all())
    chosen = torch.where(y == 1, z, 0).sum(-1)
    assert (chosen >= z.amax(-1) - 2e-6 * (1 + z.amax(-1).abs())).all()


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@served
def test_within_error_budget(backend, dtype, case, hard):
    check(case, dtype, hard)


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4), dim=st.integers(0, 3),
    spread=st.floats(0, 100), tau=st.floats(0.01, 100), mask=st.booleans(), hard=st.booleans(),
    dtype=st.sampled_from(cases.DTYPES), seed=st.integers(-(2**63), 2**63 - 1),
)
def test_random_problems(shape, dim, spread, tau, mask, hard, dtype, seed):
    def make():
        x = spread * normal(*shape, seed=seed % 1000)
        return torch.where(normal(*shape, seed=1) < -0.7, -INF, x) if mask else x

    case = Case("random", make, tau, dim % len(shape), row_offset=seed)
    check(case, dtype, hard)


@cases.cpu_backends
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float64(backend, case, hard):
    """Exact to float64 for the noise of the backend, which is the reference's but for ulps."""
    logits = case.logits(torch.float64)
    noise, expected = (f(logits, **case.sampling) for f in (cases.backend_gumbel, cases.gumbel))
    expected = expected.double()
    shift = (noise - expected).mean(case.dim, keepdim=True)
    torch.testing.assert_close(noise - shift, expected, rtol=3e-7, atol=3e-7)
    check(case, torch.float64, hard, noise)


@backends
@pytest.mark.parametrize("dtype", cases.HALVES, ids=str)
def test_half_precision_has_float32_noise(backend, dtype):
    """Rounded once, at the end."""
    x = normal(4, 33).to(dtype)
    expected = tw.gumbel_softmax(x.float(), 0.7, seed=5).to(dtype)
    assert torch.equal(tw.gumbel_softmax(x, 0.7, seed=5), expected)


@backends
@pytest.mark.parametrize("name", ["typical", "masked", "4d-dim1", "ties", "peaked"])
def test_hard_agrees_with_argmax(backend, name):
    case = BY_NAME[name]
    x = case.logits(torch.float32)
    index = tw.gumbel_argmax(x, **case.sampling)
    hard = tw.gumbel_softmax(x, hard=True, **case.sampling)
    expected = torch.zeros_like(x).scatter(case.dim, index.unsqueeze(case.dim), 1.0)
    assert torch.equal(hard, expected)
    for tau in (0.0, 1e-40, 1e-20, 3.0, 1e20):  # the one-hot vector does not depend on tau
        assert torch.equal(tw.gumbel_softmax(x, tau, True, **case.sampling), expected)


@backends
@pytest.mark.parametrize("tau", [0.0, 1e-40, 1e-30])
def test_cold_limit_is_the_one_hot_vector(backend, tau):
    x = masked(5, 33).float().requires_grad_()
    scale = torch.tensor(tau, requires_grad=True)
    y = tw.gumbel_softmax(x, scale, seed=3)
    assert torch.equal(y, tw.gumbel_softmax(x, hard=True, seed=3))
    y.square().sum().backward()
    assert not x.grad.any() and scale.grad == 0


@backends
@pytest.mark.parametrize("hard", [False, True])
def test_infinite_temperature_is_uniform(backend, hard):
    x = masked(5, 33).float().requires_grad_()
    y = tw.gumbel_softmax(x, INF, hard, seed=3)
    if not hard:
        allowed = (x > -INF).float()
        torch.testing.assert_close(y, allowed / allowed.sum(-1, keepdim=True))
    (y * normal(5, 33).float()).sum().backward()
    assert not x.grad.any()


@backends
@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_logits_near_the_largest_float(backend, tau):
    x = 3e38 * torch.tensor([[1.0, -1.0, 1.0, 0.0, -INF], [-1.0, -1.0, -1.1, -INF, -INF]])
    y = tw.gumbel_softmax(x, tau, seed=1)
    assert y.isfinite().all() and not y[:, 3:].any()
    torch.testing.assert_close(y.sum(-1), torch.ones(2))


@backends
@pytest.mark.parametrize("hard", [False, True])
def test_masks_are_exactly_zero(backend, hard):
    x = masked(5, 33).float().requires_grad_()
    y = tw.gumbel_softmax(x, 2.0, hard, seed=4)
    y.backward(normal(5, 33).float())
    assert not y[x == -INF].any() and not x.grad[x == -INF].any()
    assert (y[-1, 0] == 1) and x.grad.isfinite().all()
    if not hard:
        assert (y[x > -INF] > 0).all()


@backends
@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("hard", [False, True])
def test_nan_rows(backend, hard, tau):
    """Only -inf, a NaN or +inf: the whole row is NaN, and no other."""
    y = tw.gumbel_softmax(cases.not_finite(7, 19).float(), tau, hard, seed=5)
    assert y[:5].isnan().all() and y[5:].isfinite().all()


@pytest.mark.parametrize("backend, name",
                         cases.in_backends("typical", "masked", "4d-dim1", "4d-strided"),
                         indirect=["backend"])
@pytest.mark.parametrize("start", [0, 2**32 - 2, -3])
def test_parts_of_a_batch_are_the_whole(backend, name, start):
    """Bit for bit, values and gradients, rows being numbered along all dimensions but dim."""
    case = BY_NAME[name]
    x = case.logits(torch.float32).requires_grad_()
    whole = tw.gumbel_softmax(x, dim=case.dim, seed=9, row_offset=start)
    grad, = torch.autograd.grad((whole * whole).sum(), x)
    rows = x.movedim(case.dim, -1).flatten(0, -2).detach()  # (rows, K)
    for size in (1, 2):
        parts, grads = [], []
        for i, part in enumerate(rows.split(size)):
            part.requires_grad_()
            parts.append(tw.gumbel_softmax(part, seed=9, row_offset=start + size * i))
            grads += torch.autograd.grad((parts[-1] * parts[-1]).sum(), part)
        shape = x.movedim(case.dim, -1).shape
        for ours, theirs in ((parts, whole), (grads, grad)):
            assert torch.equal(torch.cat(ours).view(shape).movedim(-1, case.dim), theirs)


@backends
def test_far_rows_are_other_rows(backend):
    x = normal(2, 9).float()
    samples = [tw.gumbel_softmax(x, seed=1, row_offset=i) for i in (0, 2**32, 2**40, -1, -2**63)]
    for i, y in enumerate(samples):
        assert not any(torch.allclose(y, other) for other in samples[:i])


@backends
def test_the_largest_word_has_a_finite_variate(backend):
    """Column 24 of this row draws 0xfffffff7, whose share of 2^32 rounds to 1: no -inf of it."""
    y = tw.gumbel_softmax(torch.zeros(1, 32, device=DEVICE), seed=0, row_offset=1260597)
    g = _philox.gumbel(torch.tensor(0), 1, 32, 1260597).to(DEVICE)
    assert g[0, 24] == g.min() and -2.82 < g.min() < -2.80
    torch.testing.assert_close(y, g.softmax(1), rtol=1e-5, atol=0)


@backends
def test_seeds(backend):
    x = normal(3, 9).float()
    first = tw.gumbel_softmax(x, seed=7)
    for seed in (torch.tensor(7), torch.tensor([7]), 7):
        assert torch.equal(tw.gumbel_softmax(x, seed=seed), first)
    others = [tw.gumbel_softmax(x, seed=s) for s in (8, -7, 7 + 2**32, 2**63 - 1, -(2**63))]
    for i, y in enumerate(others):
        assert not any(torch.allclose(y, other) for other in [first, *others[:i]])
    assert torch.equal(others[-1], tw.gumbel_softmax(x, seed=torch.tensor(-(2**63))))


@backends
def test_manual_seed_governs_where_no_seed_is_given(backend):
    x = normal(3, 9).float()
    torch.manual_seed(3)
    first, second = tw.gumbel_softmax(x), tw.gumbel_softmax(x)
    torch.manual_seed(3)
    assert torch.equal(tw.gumbel_softmax(x), first) and torch.equal(tw.gumbel_softmax(x), second)
    assert not torch.allclose(first, second)


@backends
def test_tau_of_any_kind(backend):
    x = normal(3, 9).float().requires_grad_()
    plain = tw.gumbel_softmax(x, 0.5, seed=2)
    assert torch.equal(tw.gumbel_softmax(x, tau=torch.tensor(0.5).double(), seed=2), plain)
    assert torch.equal(tw.gumbel_softmax(x, 1, seed=2), tw.gumbel_softmax(x, 1.0, seed=2))
    for shape in ((), (1,), (1, 1)):
        tau = torch.full(shape, 0.5, requires_grad=True)
        y = tw.gumbel_softmax(x, tau, seed=2)
        assert torch.equal(y, plain)
        y.square().sum().backward()
        assert tau.grad.shape == shape and tau.grad.abs() > 0


@backends
@pytest.mark.parametrize("hard", [False, True])
def test_only_the_gradients_asked_for(backend, hard):
    x, tau = normal(3, 9).float(), torch.tensor(0.7, requires_grad=True)
    tw.gumbel_softmax(x, tau, hard, seed=2).square().sum().backward()
    assert x.grad is None and tau.grad is not None
    leaf = x.clone().requires_grad_()
    tw.gumbel_softmax(leaf, tau.detach(), hard, seed=2).square().sum().backward()
    assert leaf.grad.any()
    with torch.no_grad():
        assert not tw.gumbel_softmax(leaf, tau, hard, seed=2).requires_grad
    assert not tw.gumbel_softmax(x, 0.7, hard, seed=2).requires_grad


@backends
def test_a_single_number_and_a_vector(backend):
    assert tw.gumbel_softmax(torch.tensor(3.0), seed=1).equal(torch.tensor(1.0))
    x = normal(9).float()
    assert torch.equal(tw.gumbel_softmax(x, seed=1), tw.gumbel_softmax(x[None], seed=1)[0])


@backends
def test_inputs_are_left_alone(backend):
    x = BY_NAME["4d-permuted"].logits(torch.float32)
    copy, seed, tau = x.clone(), torch.tensor(3), torch.tensor(0.5)
    tw.gumbel_softmax(x, tau, dim=1, seed=seed).add_(1)
    assert torch.equal(x, copy) and seed == 3 and tau == 0.5


@kernels
@pytest.mark.parametrize("hard", [False, True])
def test_backward_keeps_no_matrix_of_its_own(backend, hard):
    """The relaxed sample keeps itself, the one-hot one the logits: nothing beyond them."""
    x = normal(40, 33).float().requires_grad_()
    saved = cases.Saved()
    with saved:
        y = tw.gumbel_softmax(x, hard=hard, seed=2)
    assert saved.tensors and saved.bytes_beyond(x if hard else y) <= 64


@backends
def test_eps_has_no_effect_and_says_so(backend):
    x = normal(3, 9).float()
    with pytest.warns(UserWarning, match="eps has no effect"):
        assert torch.equal(tw.gumbel_softmax(x, eps=1e-5, seed=1), tw.gumbel_softmax(x, seed=1))


def test_reference_is_the_published_equation():
    x, g = normal(4, 9), cases.gumbel(normal(4, 9), -1, 3, 0).double()
    y = tw.reference.gumbel_softmax(x, 0.5, seed=3)
    torch.testing.assert_close(y, torch.softmax((x + g) / 0.5, -1), rtol=1e-12, atol=1e-15)
    assert torch.equal(tw.reference.gumbel_softmax(x, 0.5, True, seed=3).argmax(-1),
                       (x + g).argmax(-1))


@backends
def test_any_peak_keeps_the_sum_one(backend):
    for height in (0.0, 10.0, 100.0, 1e4, 1e30):
        y = tw.gumbel_softmax(cases.peaked(3, 33, height=height).float(), 0.3, seed=6)
        torch.testing.assert_close(y.sum(-1), torch.ones(3), rtol=0, atol=1e-6)
