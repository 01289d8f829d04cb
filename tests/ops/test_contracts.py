"""What every op promises: errors that name the argument, tracing, torch.func, autocast."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise as tw
from tests.common import random_cases as cases
from tests.common.contrastive_cases import DEVICE
from tests.common.random_cases import NAN, backends, kernels
from tilewise import _backend

backend = pytest.fixture(cases.serve)

X, Y, Z = (torch.zeros(rows, 4, device=DEVICE) for rows in (3, 5, 6))
IDS = torch.arange(9, device=DEVICE)
FEATURES = dict(image_features=X, text_features=Y, logit_scale=1.0)
ITC = dict(query=X, keys=Y, logit_scale=1.0)
VALID = {
    "clip_loss": FEATURES,
    "code_sums": dict(x=X, index=IDS[:3], num_codes=5),
    "gaussian_sample": dict(mean=X, logvar=X),
    "gumbel_argmax": dict(logits=X),
    "gumbel_softmax": dict(logits=X),
    "hard_negatives": FEATURES,
    "info_nce": ITC,
    "itc_loss": ITC,
    "nearest_code": dict(x=X, codebook=Y),
    "sigmoid_loss": FEATURES,
}
OF_FEATURES = [
    (dict(image_features=X[0]), ValueError, r"image_features: .*\(rows, D\).*\(4,\)"),
    (dict(text_features=Y[None]), ValueError, r"text_features: .*\(1, 5, 4\)"),
    (dict(text_features=Y[:, :3]), ValueError, r"text_features: .*4, got 3"),
    (dict(text_features=Y.repeat(1, 2)), ValueError, r"text_features: expected.*4, got 8"),
    (dict(text_features=Y.double()), TypeError, r"text_features: .*float32.*float64"),
    (dict(image_features=X.int()), TypeError, r"image_features: .*int32"),
    (dict(image_features=[[0.0]]), TypeError, r"image_features: .*list"),
    (dict(text_features=None), TypeError, r"text_features: .*NoneType"),
    (dict(text_features=Y.to("meta")), ValueError, r"text_features: .*got meta"),
    (dict(logit_scale=torch.ones(2)), ValueError, r"logit_scale: .*\(2,\)"),
    (dict(logit_scale=torch.tensor(1j)), ValueError, r"logit_scale: .*complex64"),
    (dict(logit_scale="10"), TypeError, r"logit_scale: .*str"),
    (dict(logit_scale=True), TypeError, r"logit_scale: .*bool"),
    (dict(positives=1.5), TypeError, r"positives: .*float"),
    (dict(positives=True), TypeError, r"positives: .*bool"),
    (dict(positives=(X[:, 0], Y[:, 0])), TypeError, r"positives: .*int64.*float32"),
    (dict(positives=(IDS[:9], IDS[:5])), ValueError, r"positives: .*3 ids.*\(9,\)"),
    (dict(positives=(IDS[:3],)), ValueError, r"positives: .*pair.*1 element"),
]
OF_STREAM = [
    (dict(seed=1.5), TypeError, "seed: .*float"),
    (dict(seed=True), TypeError, "seed: .*bool"),
    (dict(seed=2**64), ValueError, "seed: .*18446744073709551616"),
    (dict(seed=-(2**63) - 1), ValueError, "seed: .*-9223372036854775809"),
    (dict(seed=torch.tensor(1.0)), TypeError, "seed: .*float32"),
    (dict(seed=torch.tensor([1, 2])), TypeError, r"seed: .*\(2,\)"),
    (dict(row_offset=0.5), TypeError, "row_offset: .*float"),
    (dict(row_offset=None), TypeError, "row_offset: .*NoneType"),
    (dict(row_offset=2**63), ValueError, "row_offset: .*9223372036854775808"),
]
OF_LOGITS = [
    (dict(logits=[[0.0]]), TypeError, "logits: .*list"),
    (dict(logits=X.int()), TypeError, "logits: .*int32"),
    (dict(logits=X.cfloat()), TypeError, "logits: .*complex64"),
    (dict(logits=X.to(torch.float8_e5m2)), TypeError, "logits: .*float8"),
    (dict(dim=2), ValueError, r"dim: .*-2 to 1.*2"),
    (dict(dim=-3), ValueError, r"dim: .*-2 to 1.*-3"),
    (dict(dim=0.0), TypeError, "dim: .*float"),
    (dict(dim=None), TypeError, "dim: .*NoneType"),
]
OF_QUERIES = [
    (dict(query=[[0.0]]), TypeError, r"query: .*list"),
    (dict(query=X[0]), ValueError, r"query: .*\(rows, D\).*\(4,\)"),
    (dict(keys=None), TypeError, r"keys: .*NoneType"),
    (dict(keys=Y.double()), TypeError, r"keys: .*float32.*float64"),
    (dict(logit_scale=torch.ones(2)), ValueError, r"logit_scale: .*\(2,\)"),
    (dict(logit_scale="1"), TypeError, r"logit_scale: .*str"),
]
BAD = {
    "sigmoid_loss": [
        *OF_FEATURES,
        (dict(logit_bias=torch.ones(2)), ValueError, r"logit_bias: .*\(2,\)"),
        (dict(logit_bias=True), TypeError, r"logit_bias: .*bool"),
    ],
    "clip_loss": [
        *OF_FEATURES,
        (dict(label_smoothing=1.5), ValueError, r"label_smoothing: .*1\.5"),
        (dict(label_smoothing="a"), TypeError, r"label_smoothing: .*str"),
    ],
    "hard_negatives": [*OF_FEATURES, *OF_STREAM],
    "info_nce": [
        *OF_QUERIES,
        (dict(positives=(IDS[:3], IDS[:3])), ValueError, r"positives: .*5 ids.*\(3,\)"),
        (dict(label_smoothing=-1), ValueError, r"label_smoothing: .*-1"),
        (dict(label_smoothing=None), TypeError, r"label_smoothing: .*None"),
    ],
    "itc_loss": [
        *OF_QUERIES,
        (dict(queue=Z[:, :3]), ValueError, r"queue: .*4.*3"),
        (dict(queue=Z.half()), TypeError, r"queue: .*float32.*float16"),
        (dict(teacher_query=X[0]), ValueError, r"teacher_query: .*\(rows, D\)"),
        (dict(teacher_query=X[:2]), ValueError, r"teacher_query: .*3 rows.*2"),
        (dict(alpha=1.5), ValueError, r"alpha: .*1\.5"),
        (dict(alpha=NAN), ValueError, r"alpha: .*nan"),
        (dict(alpha="a"), TypeError, r"alpha: .*str"),
        (dict(alpha=None), TypeError, r"alpha: .*None"),
        (dict(alpha=torch.ones(2)), ValueError, r"alpha: .*\(2,\)"),
        (dict(positives=1.5), TypeError, r"positives: .*float"),
        (dict(queue=Z, positives=(IDS[:3], IDS[:5])), ValueError,
         r"positives: .*11 ids.*\(5,\)"),
        (dict(positives=(IDS[:3], Y[:, 0])), TypeError, r"positives: .*int64.*float32"),
        *((dict([(name, x.clone().requires_grad_())]), ValueError, f"{name}: .*detached.*True")
          for name, x in (("keys", Y), ("queue", Z), ("teacher_query", X))),
    ],
    "nearest_code": [
        (dict(x=[[0.0]]), TypeError, r"x: .*list"),
        (dict(x=X.int()), TypeError, r"x: .*int32"),
        (dict(codebook=Y.long()), TypeError, r"codebook: .*int64"),
        (dict(codebook=Y[0]), ValueError, r"codebook: .*\(4,\)"),
        (dict(codebook=Y[:0]), ValueError, r"codebook: .*at least one.*\(0, 4\)"),
        (dict(x=X[:, :3]), ValueError, r"x: .*\(5, 4\).*\(3, 3\)"),
        (dict(codebook=torch.zeros(2, 5, 4)), ValueError, r"x: .*2 heads.*\(3, 4\)"),
        (dict(metric="euclid"), ValueError, r"metric: .*l2.*euclid"),
        (dict(k=6), ValueError, r"k: .*5 codes.*6"),
        (dict(k=0), ValueError, r"k: .*at least 1.*0"),
        (dict(codebook=torch.zeros(50, 4), k=17), ValueError, r"k: .*16.*17"),
        (dict(k=1.5), TypeError, r"k: .*float"),
        (dict(k=True), TypeError, r"k: .*bool"),
        (dict(mask=X[:, 0]), TypeError, r"mask: .*bool.*float32"),
        (dict(mask=X[:2, 0] == 0), ValueError, r"mask: .*\(3,\).*\(2,\)"),
        (dict(x=X.to("meta")), ValueError, r"codebook: .*meta.*got"),
    ],
    "code_sums": [
        (dict(x=X.int()), TypeError, r"x: .*int32"),
        (dict(index=X[:, 0]), TypeError, r"index: .*integers.*float32"),
        (dict(index=X[:, 0] == 0), TypeError, r"index: .*integers.*bool"),
        (dict(index=IDS[:2]), ValueError, r"index: .*\(3,\).*\(2,\)"),
        (dict(num_codes=-1), ValueError, r"num_codes: .*at least 0.*-1"),
        (dict(num_codes=2.5), TypeError, r"num_codes: .*float"),
        (dict(index=IDS[:3].to("meta")), ValueError, r"index: .*got meta"),
    ],
    "gumbel_softmax": [
        *OF_LOGITS, *OF_STREAM,
        (dict(tau=-0.1), ValueError, r"tau: .*at least 0.*-0\.1"),
        (dict(tau=NAN), ValueError, "tau: .*at least 0.*nan"),
        (dict(tau=torch.ones(2)), ValueError, r"tau: .*one.*\(2,\)"),
        (dict(tau="1"), TypeError, "tau: .*str"),
        (dict(tau=None), TypeError, "tau: .*NoneType"),
    ],
    "gumbel_argmax": [
        *OF_LOGITS, *OF_STREAM,
        (dict(logits=torch.tensor(1.0)), ValueError, r"logits: .*one dimension.*\(\)"),
        (dict(k=0), ValueError, "k: .*at least 1.*0"),
        (dict(k=5), ValueError, "k: .*4 categories.*5"),
        (dict(k=4, dim=0), ValueError, "k: .*3 categories.*4"),
        (dict(k=1.0), TypeError, "k: .*float"),
        (dict(logits=X[:, :0]), ValueError, r"logits: .*one category.*\(3, 0\)"),
        (dict(logits=X[:, :0], k=1), ValueError, "k: .*0 categories.*1"),
        (dict(logits=X[:0, :0]), ValueError, r"logits: .*one category.*\(0, 0\)"),
    ],
    "gaussian_sample": [
        *OF_STREAM,
        (dict(mean=[[0.0]]), TypeError, "mean: .*list"),
        (dict(mean=X.int()), TypeError, "mean: .*int32"),
        (dict(mean=torch.tensor(1.0)), ValueError, r"mean: .*\(B, \.\.\.\).*\(\)"),
        (dict(logvar=0.0), TypeError, "logvar: .*float"),
        (dict(logvar=X.double()), TypeError, "logvar: .*float32.*float64"),
        (dict(logvar=X.to("meta")), ValueError, "logvar: .*meta"),
        (dict(logvar=torch.zeros(5)), ValueError, r"logvar: .*\(3, 4\).*\(5,\)"),
        (dict(logvar_range=(1.0, 0.0)), ValueError, r"logvar_range: .*\(1\.0, 0\.0\)"),
        (dict(logvar_range=(NAN, 0.0)), ValueError, "logvar_range: .*nan"),
        (dict(logvar_range=3.0), TypeError, "logvar_range: .*two floats"),
        (dict(logvar_range=(1.0,)), TypeError, "logvar_range: .*two floats"),
        (dict(logvar_range=("a", "b")), TypeError, "logvar_range: .*two floats"),
    ],
}  # fmt: skip


def test_every_op_is_here():
    assert sorted(VALID) == sorted(BAD) == _backend.ops() == sorted(SCALARS)
    for op, arguments in VALID.items():
        getattr(tw, op)(**arguments)


@pytest.mark.parametrize("op, number", [(op, i) for op in BAD for i in range(len(BAD[op]))])
def test_bad_arguments_are_named(op, number):
    arguments, error, message = BAD[op][number]
    for name in cases.EXACT:
        with tw.backend(name), pytest.raises(error, match=f"^{message}"):
            getattr(tw, op)(**{**VALID[op], **arguments})


# A number out of each op, as a function of its first argument (4, 6).
SCALARS: dict[str, Callable] = {
    "clip_loss": lambda x: tw.clip_loss(x, x.detach(), 2.0),
    "code_sums": lambda x: tw.code_sums(x, IDS[:4] % 3, 5).sums.square().sum(),
    "gaussian_sample": lambda x: sum(part.sum() for part in tw.gaussian_sample(x, x, seed=1)),
    "gumbel_argmax": lambda x: tw.gumbel_argmax(x, seed=1, log_prob=True).log_prob.sum(),
    "gumbel_softmax": lambda x: tw.gumbel_softmax(x, seed=1).square().sum(),
    "hard_negatives": lambda x: x[tw.hard_negatives(x, x, 1.0, seed=1).text_index].sum(),
    "info_nce": lambda x: tw.info_nce(x, x.detach(), 2.0),
    "itc_loss": lambda x: tw.itc_loss(x, x.detach(), 2.0),
    "nearest_code": lambda x: tw.nearest_code(x, x.detach().roll(1, 0) + 1).distance.sum(),
    "sigmoid_loss": lambda x: tw.sigmoid_loss(x, x.detach(), 2.0),
}
by_op = pytest.mark.parametrize("op", SCALARS)


def leaf() -> torch.Tensor:
    return cases.normal(4, 6).float().requires_grad_()


@kernels
@by_op
def test_torch_func_is_refused(backend, op):
    for run in (torch.func.grad(SCALARS[op]), lambda x: torch.vmap(SCALARS[op])(x[None])):
        with pytest.raises(RuntimeError, match=f"tilewise.{op}.*torch.func.*'reference'"):
            run(leaf().detach())


class Called(TorchDispatchMode):
    """Collects the flags `need_…` that a loss was called with, below autograd."""

    def __init__(self):
        super().__init__()
        self.flags: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("tilewise"):
            names = [a.name for a in func._schema.arguments]
            self.flags += [x for x, n in zip(args, names, strict=False) if n.startswith("need_")]
        return func(*args, **(kwargs or {}))


@kernels
@pytest.mark.parametrize("op", [op for op in SCALARS if op.endswith("_loss")])
def test_gradients_are_computed_where_they_are_needed(backend, op):
    """Of one argument; under no_grad, where nothing could tell but the time, of none."""
    for enabled in (True, False):
        with Called() as called, torch.set_grad_enabled(enabled):
            SCALARS[op](leaf())
        assert called.flags and sum(called.flags) == enabled


@by_op
def test_torch_func_through_the_reference(op):
    """What the message recommends."""
    with tw.backend("reference"):
        x = leaf()
        expected, = torch.autograd.grad(SCALARS[op](x), x)
        assert torch.equal(torch.func.grad(SCALARS[op])(x.detach()), expected)


@backends
@by_op
def test_inputs_are_left_alone(backend, op):
    x = leaf()
    before = x.detach().clone()
    SCALARS[op](x).backward()
    assert torch.equal(x, before) and x.grad.isfinite().all()


@backends
@pytest.mark.parametrize("op", ["code_sums", "gaussian_sample", "gumbel_argmax", "gumbel_softmax",
                                "nearest_code"])
def test_autocast_changes_nothing(backend, op):
    results = []
    for enabled in (False, True):
        x = leaf()
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
            value = SCALARS[op](x)
        value.backward()
        results.append((value, x.grad))
    assert results[1][0].dtype == torch.float32
    assert all(map(torch.equal, *results))


CONTRASTIVE = {
    "clip_loss": tw.clip_loss,
    "hard_negatives": lambda *x: torch.cat(tw.hard_negatives(*x, seed=1)),
    "info_nce": tw.info_nce,
    "itc_loss": tw.itc_loss,
    "itc_loss with all": lambda x, y, scale: tw.itc_loss(
        x, y, scale, queue=y, teacher_query=x.detach()
    ),
    "sigmoid_loss": tw.sigmoid_loss,
}


@backends
@pytest.mark.parametrize("op", CONTRASTIVE)
@pytest.mark.parametrize("halves", [(False, False), (True, False), (False, True)], ids=str)
def test_autocast_casts_the_features_only(backend, op, halves):
    """First, so that they may come in two dtypes: a frozen tower's, and one under autocast."""
    image, text = (cases.normal(12, 8, seed=i).float() / 3 for i in (0, 1))
    scale = torch.tensor(10.037, requires_grad=True)  # not a bfloat16 number
    expected = CONTRASTIVE[op](image.bfloat16(), text.bfloat16(), scale)
    image, text = (x.bfloat16() if h else x for x, h in zip((image, text), halves, strict=True))
    image.requires_grad_(op != "hard_negatives")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        value = CONTRASTIVE[op](image, text, scale)
    assert torch.equal(value, expected)
    if op != "hard_negatives":
        assert value.dtype == torch.float32
        value.backward()
        assert image.grad.dtype == image.dtype and scale.grad.dtype == torch.float32
        with pytest.raises(TypeError, match=r"(text_features|keys): expected torch"):
            CONTRASTIVE[op](image.float(), text.bfloat16(), scale)


NUMBERS = [3, np.float32(3), np.float64(3), np.int64(3), np.array(3.0), torch.tensor(3),
           torch.tensor([[3.0]], dtype=torch.float64)]  # fmt: skip


@pytest.mark.parametrize("number", range(len(NUMBERS)))
def test_numbers_of_any_kind(number):
    """Python's, numpy's, tensors of one element."""
    value = NUMBERS[number]
    x = leaf().detach()
    calls: list[Callable] = [
        lambda n: tw.sigmoid_loss(x, x, n, n),
        lambda n: tw.clip_loss(x, x, n),
        lambda n: tw.info_nce(x, x, n),
        lambda n: tw.itc_loss(x, x, n),
        lambda n: torch.cat(tw.hard_negatives(x, x, n, seed=1)),
        lambda n: tw.gumbel_softmax(x, n, seed=1),
    ]
    if not isinstance(value, torch.Tensor):
        calls.append(lambda n: tw.clip_loss(x, x, 1.0, label_smoothing=n / 6))
        calls.append(lambda n: tw.itc_loss(x, x, 1.0, teacher_query=x, alpha=n / 6))
    for call in calls:
        assert torch.equal(call(value), call(3.0))


@pytest.mark.parametrize("same", [
    (7, np.int64(7), np.uint64(7), torch.tensor(7), torch.tensor([7], dtype=torch.int32)),
    (-1, 2**64 - 1, np.uint64(2**64 - 1), torch.tensor(-1)),
    (-(2**63), 2**63, torch.tensor(-(2**63))),
], ids=["small", "all bits", "highest bit"])
def test_seeds_of_any_kind(same):
    """Of 64 bits, with a sign or without, as torch.manual_seed takes them."""
    for backend in ("reference", *cases.KERNELS):
        with tw.backend(backend):
            first, *others = (tw.gumbel_argmax(torch.zeros(2, 50), seed=seed) for seed in same)
            assert all(torch.equal(first, other) for other in others)


def test_a_temperature_beyond_float32_is_infinite():
    x = leaf().detach()
    assert torch.equal(tw.gumbel_softmax(x, 1e39), torch.full_like(x, 1 / 6))
