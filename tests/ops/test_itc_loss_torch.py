"""tilewise.itc_loss and PyTorch: compiling, autocast, errors, memory, threads."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import tilewise as tw
from tests.common.concurrency import assert_same_bits
from tests.common.contrastive_cases import Case, ids, related
from tests.common.fresh import peak_bytes_each
from tests.ops.test_itc_loss import Problem


def problem(b=20, k=20, q=50, d=8, dtype=torch.float32, **options):
    """Query, keys, queue and teacher's query; the query asks for a gradient."""
    tensors = Problem(Case("f", related(b, k, d)), q, **options).tensors(dtype)
    tensors["query"].requires_grad_()
    return tensors


def gradients(loss, tensors, scale, alpha=0.4, positives=0):
    value = loss(**tensors, logit_scale=scale, alpha=alpha, positives=positives)
    return value.detach(), *torch.autograd.grad(value, [tensors["query"], scale])


def operands(b, k, q, count=1, **options):
    """What the operator takes, as the public function hands it over, without the flags."""
    tensors = problem(b, k, q, **options)
    matched = torch.nn.functional.normalize(torch.randn(b, 8), dim=1)
    return [
        tensors["query"], tensors["keys"], torch.tensor([5.0], requires_grad=True),
        tensors["queue"], tensors["teacher_query"], torch.tensor(0.4), matched,
        torch.full((b,), count),
    ]  # fmt: skip


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("flags", [(False, True), (True, False), (False, False)])
def test_only_the_gradients_asked_for(flags, teacher):
    arguments = operands(20, 20, 50, teacher=teacher)
    loss, *found = torch.ops.tilewise.itc_loss(*arguments, *flags)
    full = torch.ops.tilewise.itc_loss(*arguments, True, True)
    torch.testing.assert_close(loss, full[0], rtol=1e-6, atol=0)
    for flag, gradient, whole in zip(flags, found, full[1:], strict=True):
        if flag:
            torch.testing.assert_close(gradient, whole, rtol=1e-5, atol=1e-7)
        else:
            assert gradient.shape == (0,)


@pytest.mark.parametrize("compiler, with_ids", [("inductor", True), ("aot_eager", False)])
def test_compiled_training_step(compiler, with_ids):
    """Alpha changes from step to step, as in a warm-up: a float or, with ids, a tensor."""
    torch._dynamo.reset()
    compiled = torch.compile(tw.itc_loss, fullgraph=True, backend=compiler, dynamic=True)
    for step, queue in enumerate((50, 61)):
        tensors, scale = problem(16, 16, queue), torch.tensor(10.0, requires_grad=True)
        alpha: float | torch.Tensor = 0.1 + 0.1 * step
        positives: int | tuple = 0
        if with_ids:
            names = torch.arange(16 + queue) % 15
            alpha, positives = torch.tensor(alpha), (names[:16], names)
        ours, theirs = (
            gradients(f, tensors, scale, alpha, positives) for f in (compiled, tw.itc_loss)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_ids", [False, True])
def test_new_sizes_need_no_new_graph(with_ids):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(tw.itc_loss, fullgraph=True, backend=counter, dynamic=True)
    for step, count in enumerate((16, 19, 23)):
        tensors, scale = problem(count, count, 50 + step), torch.tensor(10.0, requires_grad=True)
        names = torch.arange(50 + step + count) % 15
        positives = (names[:count], names) if with_ids else 0
        ours, theirs = (
            gradients(f, tensors, scale, 0.1 + 0.1 * step, positives)
            for f in (compiled, tw.itc_loss)
        )
        assert all(map(torch.equal, ours, theirs))
    assert counter.frame_count == 1


def test_second_derivatives_only_in_the_reference():
    tensors = problem(dtype=torch.float64)
    query, keys = tensors["query"], tensors["keys"]

    def first_derivative():
        loss = tw.itc_loss(**tensors, logit_scale=10.0)
        return torch.autograd.grad(loss, query, create_graph=True)[0]

    with pytest.raises(RuntimeError, match="reference"):
        first_derivative().sum().backward()
    with tw.backend("reference"):
        gradient = first_derivative()
    gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match="itc_loss.*torch.func"):
        torch.func.grad(lambda x: tw.itc_loss(x, keys, 1.0))(query.detach())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_targets_may_ask_for_gradients_where_nothing_does(backend):
    tensors = {name: x.requires_grad_() for name, x in problem().items()}
    with tw.backend(backend), torch.no_grad():
        loss = tw.itc_loss(**tensors, logit_scale=5.0)
    assert loss.isfinite() and not loss.requires_grad


def test_backward_accumulates_and_scales():
    tensors, scale = problem(), torch.tensor(9.0, requires_grad=True)
    _, *once = gradients(tw.itc_loss, tensors, scale)
    for factor in (1.0, 2.0):
        loss = tw.itc_loss(**tensors, logit_scale=scale)
        (factor * loss).backward()
    for leaf, gradient in zip((tensors["query"], scale), once, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * gradient)


@pytest.mark.parametrize("options", [dict(), dict(teacher=False)], ids=["teacher", "no-teacher"])
def test_same_bits_for_every_thread_count(threads, options):
    tensors = problem(300, 300, 5000, 24, **options)
    arguments = tensors, torch.tensor(20.0, requires_grad=True), 0.4, ids(300, 5300, 40)
    assert_same_bits(threads, lambda: gradients(tw.itc_loss, *arguments))


def test_several_tiles_are_one_problem():
    """More rows and columns than a tile of the C++ backend has."""
    tensors = problem(4200, 1100, 1500, 4)
    exact = {name: x.detach().double() for name, x in tensors.items()}
    exact["query"].requires_grad_()
    scale = torch.tensor(30.0, requires_grad=True)
    ours = gradients(tw.itc_loss, tensors, scale)
    truth = gradients(tw.reference.itc_loss, exact, scale.detach().double().requires_grad_())
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-6, atol=0)
    for a, b in zip(ours[1:], truth[1:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6 * float(b.abs().max()) + 1e-9)


def test_far_apart_rows_at_scale_100():
    """One row's largest logit is 200 above another's; the queue's are between."""
    query = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    keys, queue = torch.tensor([[1.0, 0.0], [1.0, 1e-3]]), torch.tensor([[0.0, 1.0], [0.6, 0.8]])
    tensors = {"query": query, "keys": keys, "queue": queue, "teacher_query": query.flip(0)}
    results = []
    for loss, dtype in ((tw.itc_loss, torch.float32), (tw.reference.itc_loss, torch.float64)):
        mine = {name: x.to(dtype) for name, x in tensors.items()}
        mine["query"].requires_grad_()
        scale = torch.tensor(100.0, dtype=dtype, requires_grad=True)
        results.append([x.double() for x in gradients(loss, mine, scale)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("b, k, q", [(0, 5, 6), (3, 0, 0), (3, 0, None), (0, 0, None), (3, 0, 6)])
def test_empties(backend, b, k, q):
    with tw.backend(backend):
        tensors, scale = problem(b, k, q), torch.tensor(5.0, requires_grad=True)
        loss, d_query, d_scale = gradients(tw.itc_loss, tensors, scale)
    assert d_query.shape == (b, 8)
    assert loss.isfinite() and d_query.isfinite().all() and d_scale.isfinite()
    if not b or not k + (q or 0):
        assert loss == 0 and d_scale == 0 and (d_query == 0).all()


def prepare(rows: int, queue: int, dtype: str = "float32"):
    sizes = rows, rows, rows, queue
    query, keys, teacher, old = (torch.randn(n, 64).to(getattr(torch, dtype)) for n in sizes)
    query.requires_grad_()
    scale = torch.tensor(10.0, requires_grad=True)

    def call():
        loss = tw.itc_loss(query, keys, scale, queue=old, teacher_query=teacher)
        return torch.autograd.grad(loss, [query, scale])

    return call


@pytest.mark.alone
def test_memory_is_flat_in_the_queue_and_grows_with_the_rows_alone():
    """A matrix of 512 x 80,000 takes 164 MB, one of 4096 x 20,000 takes 328 MB."""
    sizes = (512, 20_000), (512, 80_000), (4096, 20_000)
    cases = [dict(rows=b, queue=q) for b, q in sizes]
    cases.append(dict(rows=512, queue=80_000, dtype="bfloat16"))
    base, long, many, half = peak_bytes_each(prepare, cases)
    assert base < 60e6 and long - base < 8e6 and many - base < 30e6 and half - base < 8e6


def test_no_softmax_without_a_finite_logit():
    query = torch.full((2, 4), 1e30, requires_grad=True)
    loss = tw.itc_loss(query, torch.full((2, 4), -1e30), 1.0)
    loss.backward()
    assert loss.isnan() and query.grad.isnan().all()


@pytest.mark.filterwarnings("error")
def test_strided_ids():
    tensors, wide = problem(6, 6, 3), torch.arange(18)

    def loss(query_ids, candidate_ids):
        positives = query_ids, candidate_ids
        return tw.itc_loss(
            tensors["query"], tensors["keys"], 5.0, queue=tensors["queue"], positives=positives
        )

    assert torch.equal(loss(wide[:12:2], wide[::2]), loss(wide[:12:2].clone(), wide[::2].clone()))
