"""What every op's registration promises torch: its own checks, and results that share no memory.

And that C++ and Python make the same formula of one description.
"""

import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.common import random_cases as cases
from tests.common.contrastive_cases import DEVICE
from tests.common.random_cases import OPERATORS, kernels
from tilewise.ops import _register

backend = pytest.fixture(cases.serve)

IDS = torch.arange(9, device=DEVICE)
FLAGS = (True,) * 4
SCALE = torch.tensor([5.0], device=DEVICE, requires_grad=True)
PAIRS = [(1, None, None), (None, IDS[:4] % 3, IDS[:5] % 4)]


def operands() -> list[tuple[str, tuple]]:
    """Arguments of the dispatcher's operators."""
    x, y = (cases.normal(n, 6).float().requires_grad_() for n in (4, 5))
    fixed, seed = x.detach(), torch.tensor(3, device=DEVICE)
    bias, tau = (torch.tensor(v, device=DEVICE, requires_grad=True) for v in (-2.0, 0.5))
    codes = cases.normal(2, 9, 6).float().requires_grad_()
    heads = cases.normal(2, 4, 6).float().requires_grad_()
    found = [
        *((op, (x, y, SCALE, *pairs, 0.1, *FLAGS[:3]))
          for op in ("clip_loss", "info_nce") for pairs in PAIRS),
        *(("sigmoid_loss", (x, y, SCALE, b, *pairs, *FLAGS[:3], b is not None))
          for pairs in PAIRS for b in (bias, None)),
        *(("hard_negatives", (x, y, SCALE, *pairs, seed, -2)) for pairs in (*PAIRS, (None,) * 3)),
        *(("itc_loss", (x, y, SCALE, queue, teacher, tau.detach(), fixed, IDS[:4], *FLAGS[:2]))
          for queue, teacher in ((fixed, fixed), (None, fixed), (fixed, None))),
        ("code_sums", (heads, (IDS[:8] % 3).view(2, 4), 5)),
        *(("nearest_code", (heads, codes, metric, 2, IDS[:8].view(2, 4) > 2, None))
          for metric in ("l2", "cosine", "dot")),
        *(("gumbel_argmax", (heads, seed, 2, 1, 2, flag)) for flag in (False, True)),
        *(("gumbel_softmax", (heads, tau, seed, 2, 1, hard)) for hard in (False, True)),
        *(("gumbel_softmax_backward",
           (fixed, fixed.softmax(1), tau.detach(), seed, 2, 1, hard, flag))
          for hard in (False, True) for flag in (False, True)),
        *(("gaussian_sample", (x, x, seed, 2, *bounds)) for bounds in ((-9.0, 9.0), (-1.0, 0.5))),
        *(("gaussian_sample_backward", (d_z, d_kl, fixed, fixed, seed, 2, -9.0, 9.0))
          for d_z, d_kl in ((fixed, fixed[:, 0]), (None, fixed[:, 0]), (fixed, None))),
    ]  # fmt: skip
    return found


# Its fourth test adds a float to the sum of the first output, which these have of integers;
# compiling does what it does.
OF_INTEGERS = {"code_sums", "gumbel_argmax", "hard_negatives", "nearest_code"}
WITHOUT_SUM = ("test_schema", "test_autograd_registration", "test_faketensor")


@kernels
@pytest.mark.parametrize("number", range(len(operands())))
def test_opcheck(backend, number):
    op, arguments = operands()[number]
    some = {"test_utils": WITHOUT_SUM} if op in OF_INTEGERS else {}
    torch.library.opcheck(getattr(OPERATORS[backend], op).default, arguments, **some)


LOSSES = [
    number for number, (op, _) in enumerate(operands())
    if op in ("sigmoid_loss", "clip_loss", "info_nce", "itc_loss")
]


@pytest.mark.parametrize("number", LOSSES)
def test_traced_losses_are_what_losses_are(number):
    """Of half precision features too, whose loss and gradients are float32."""
    op, arguments = operands()[number]
    operator = getattr(torch.ops.tilewise, op).default
    features = ("image_features", "text_features", "query", "keys", "queue", "teacher_query")
    halves = [
        x.bfloat16() if a.name in features and x is not None else x
        for a, x in zip(operator._schema.arguments, arguments, strict=True)
    ]
    with FakeTensorMode() as mode:
        traced = operator(
            *(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in halves)
        )
    for fake, real in zip(traced, operator(*halves), strict=True):
        assert fake.dtype == real.dtype and fake.shape == real.shape


def storages(tensors) -> list[int]:
    return [x.untyped_storage()._cdata for x in tensors if isinstance(x, torch.Tensor)]


@kernels
@pytest.mark.parametrize("number", range(len(operands())))
def test_outputs_share_no_memory(backend, number):
    """Neither with inputs nor with each other, be they empty: torch will make that an error."""
    op, arguments = operands()[number]
    operator = getattr(OPERATORS[backend], op).default
    flags = [i for i, x in enumerate(operator._schema.arguments) if x.name.startswith("need_")]
    for needs in itertools.product((False, True), repeat=len(flags)):
        inputs = list(arguments)
        for i, need in zip(flags, needs, strict=True):
            inputs[i] = need and arguments[i]
        outputs = operator(*inputs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        used = storages(outputs)
        assert len(set(used)) == len(used) and set(used).isdisjoint(storages(inputs)), needs


@pytest.fixture(scope="module")
def in_python():
    """The ops as they are registered where there is no extension, over this device's kernels."""
    with torch.library._scoped_library("tilewise_in_python", "DEF") as library:
        for op in [*_register.formulas, "gaussian_sample_backward", "gumbel_softmax_backward"]:
            kernel = getattr(torch.ops.tilewise, op).default
            library.define(str(kernel._schema).removeprefix("tilewise::"))
            library.impl(op, kernel, "CompositeExplicitAutograd")
            if op in _register.formulas:
                _register._register_autograd(library, op)
        yield torch.ops.tilewise_in_python


def derivatives(operator, arguments: tuple, twice: bool) -> list[torch.Tensor | None]:
    """Gradients by all inputs; their own gradients too, by inputs and incoming gradients."""
    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    outputs = operator(*arguments)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    ends = [x for x in outputs if x.requires_grad and x.numel()]
    if not ends:
        return []
    grads = [cases.normal(*x.shape).to(x.dtype).requires_grad_(twice) for x in ends]
    first = torch.autograd.grad(ends, leaves, grads, create_graph=twice, allow_unused=True)
    assert all(x is None or x.dtype == leaf.dtype for x, leaf in zip(first, leaves, strict=True))
    if not twice:
        return [*first]
    ends = [x for x in first if x is not None and x.requires_grad]
    again = [cases.normal(*x.shape, seed=1).to(x.dtype) for x in ends]
    return [*first, *torch.autograd.grad(ends, [*leaves, *grads], again, allow_unused=True)]


WITH_FORMULA = [i for i, (op, _) in enumerate(operands()) if op in _register.formulas]


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("number", WITH_FORMULA)
def test_formulas_of_both_languages_agree(in_python, number, twice):
    op, arguments = operands()[number]
    both = [getattr(ops, op).default for ops in (torch.ops.tilewise, in_python)]
    if twice and both[0]._schema.returns[0].name == "loss":
        for operator in both:
            with pytest.raises(RuntimeError, match="second derivatives.*'reference'"):
                derivatives(operator, arguments, twice)
        return
    of_cpp, of_python = (derivatives(operator, arguments, twice) for operator in both)
    for ours, theirs in zip(of_cpp, of_python, strict=True):
        assert ours is theirs if ours is None else torch.equal(ours, theirs)


@pytest.mark.parametrize("number", WITH_FORMULA)
def test_formulas_are_of_different_languages(in_python, number):
    op, arguments = operands()[number]
    for ops, kind in ((torch.ops.tilewise, "CppNode"), (in_python, "GeneratedBackward")):
        outputs = getattr(ops, op).default(*arguments)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        nodes = {x.grad_fn.name() for x in outputs if x.requires_grad}
        assert len(nodes) == 1 and kind in nodes.pop()


@pytest.mark.parametrize("number", WITH_FORMULA)
def test_formulas_serve_every_device(number):
    """No kernel is known to them: on the meta device gradients have shapes alone."""
    op, arguments = operands()[number]
    there = [
        x.detach().to("meta").requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for x in arguments
    ]
    operator = getattr(torch.ops.tilewise, op).default
    outputs = operator(*there)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    assert any("CppNode" in x.grad_fn.name() for x in outputs if x.requires_grad)
    leaves = [x for x in there if isinstance(x, torch.Tensor) and x.requires_grad]
    ends = [x for x in outputs if x.requires_grad and x.numel()]
    if ends:
        ones = [torch.ones_like(x) for x in ends]
        found = torch.autograd.grad(ends, leaves, ones, allow_unused=True)
        pairs = [(x, grad) for x, grad in zip(leaves, found, strict=True) if grad is not None]
        assert pairs
        for x, grad in pairs:
            assert (grad.shape, grad.device, grad.dtype) == (x.shape, x.device, x.dtype)


@pytest.mark.parametrize("wide, narrow", [
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16), (torch.float64, torch.float64),
], ids=str)
@pytest.mark.parametrize("rows", [3, 4000])
def test_gradients_are_scaled_alike_in_both_languages(rows, wide, narrow):
    """Small tensors in a loop of our own, large ones and those with gaps by torch."""
    matrix, number = cases.normal(rows, 5).to(wide), cases.normal(seed=1).to(wide)
    gradients = [matrix, number, cases.normal(5, rows).to(wide).T]
    shapes = [(rows, 5), (1,), (rows, 5)]
    inputs = [torch.zeros(shape, dtype=narrow) for shape in shapes]
    grad = torch.tensor(-3.7, dtype=wide)
    ours = torch.ops.tilewise.scale_gradients(grad, gradients, inputs)
    theirs = _register._scale_gradients(grad, gradients, inputs)
    for x, y, z in zip(ours, theirs, inputs, strict=True):
        assert torch.equal(x, y) and (x.shape, x.dtype) == (z.shape, z.dtype)
    assert torch.equal(ours[0], (-3.7 * matrix).to(narrow))
