"""ItcLoss against the published loss and queues, step by step, and as a module of torch."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import tilewise as tw
from tests.common import fresh
from tests.common.contrastive_cases import DEVICE
from tests.common.quantizer_cases import NoHostReads, rows

B, D, Q = 6, 8, 20
QUEUES = ("image_queue", "text_queue", "id_queue", "queue_pointer")


def module(dim=D, queue_size=Q, **settings):
    torch.manual_seed(0)
    return tw.nn.ItcLoss(dim, queue_size, **settings)


def features(b=B, d=D, seed=0, dtype=torch.float32):
    """Of the student, which want a gradient, and of the teacher, which are like them."""
    student = [rows(b, d, seed=2 * seed + i).double() for i in range(2)]
    teacher = [x + 0.3 * rows(b, d, seed=100 + seed) for x in student]
    unit = [F.normalize(x, dim=1).to(dtype) for x in (*student, *teacher)]
    return [x.requires_grad_() for x in unit[:2]] + unit[2:]


def ids(b=B, names=4, seed=0):
    return (rows(b, seed=seed).abs() * names).long()


class Published:
    """The loss and the queues of BLIP's and ALBEF's papers and code, with every matrix stored."""

    def __init__(self, ours):
        self.queue = {name: getattr(ours, name).clone() for name in QUEUES}
        self.temperature = ours.temperature.detach().clone().requires_grad_()

    def __call__(self, image, text, image_m, text_m, ids=None, alpha=0.4):
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)
        match = torch.eye(len(image), len(image) + len(self.queue["id_queue"]))
        if ids is not None:
            match = ids[:, None] == torch.cat([ids, self.queue["id_queue"]])
        match = match.to(image.dtype) / match.sum(1, keepdim=True)

        def one_way(student, teacher, keys, queue):
            candidates = torch.cat([keys, queue])  # (B + Q, D)
            with torch.no_grad():
                soft = torch.softmax(teacher @ candidates.T / self.temperature, dim=1)
                target = alpha * soft + (1 - alpha) * match
            logits = student @ candidates.T / self.temperature
            return -(target * torch.log_softmax(logits, dim=1)).sum(1).mean()

        loss = (
            one_way(image, image_m, text_m, self.queue["text_queue"])
            + one_way(text, text_m, image_m, self.queue["image_queue"])
        ) / 2
        self.enqueue(image_m, text_m, ids)
        return loss

    def enqueue(self, image, text, ids):
        """One row after the other."""
        ids = torch.full((len(image),), -100) if ids is None else ids
        self.queue = {name: x.clone() for name, x in self.queue.items()}
        for row in zip(image, text, ids, strict=True):
            place = int(self.queue["queue_pointer"])
            for name, x in zip(QUEUES, row, strict=False):
                self.queue[name][place] = x
            self.queue["queue_pointer"] = torch.tensor((place + 1) % len(self.queue["id_queue"]))


def assert_same_queues(ours, queue, **tolerance):
    for name in QUEUES:
        torch.testing.assert_close(getattr(ours, name), queue[name], **tolerance)


# Against BLIP and ALBEF


@pytest.mark.parametrize("with_ids", [False, True], ids=["pairs", "ids"])
@pytest.mark.parametrize("b, size", [(4, 20), (6, 20), (7, 5), (5, 1), (1, 3)])
def test_steps_are_published(b, size, with_ids):
    """Loss, gradients, queues and temperature of some steps, in float64: BLIP's b = 4 divides Q."""
    ours = module(queue_size=size).double()
    theirs = Published(ours)
    optimisers = [torch.optim.SGD([x.temperature], lr=0.02) for x in (ours, theirs)]
    for step in range(7):
        names = ids(b, seed=step) if with_ids else None
        alpha = 0.4 * min(1, step / 4)
        results = []
        for loss in (ours, theirs):
            leaves = features(b, seed=step, dtype=torch.float64)
            value = loss(*leaves, names, alpha=alpha)
            value.backward()
            results.append((value.detach(), leaves[0].grad, leaves[1].grad, loss.temperature.grad))
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)
        assert_same_queues(ours, theirs.queue, rtol=0, atol=0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        torch.testing.assert_close(ours.temperature, theirs.temperature, rtol=1e-9, atol=0)


# Queues


def test_beginning():
    ours = tw.nn.ItcLoss(3)
    assert ours.image_queue.shape == ours.text_queue.shape == (57600, 3)
    assert not torch.equal(ours.image_queue, ours.text_queue)
    torch.testing.assert_close(ours.image_queue.norm(dim=1), torch.ones(57600))
    assert (ours.id_queue == -100).all() and ours.queue_pointer == 0
    assert ours.temperature.item() == pytest.approx(0.07) and ours.alpha == 0.4
    assert set(ours.state_dict()) == {"temperature", *QUEUES}


def test_evaluation_enqueues_nothing():
    ours = module().eval()
    before = copy.deepcopy(ours.state_dict())
    loss = ours(*features(), ids())
    assert all(torch.equal(x, before[name]) for name, x in ours.state_dict().items())
    assert torch.equal(loss, ours.train()(*features(), ids()))  # enqueued after the loss
    assert not torch.equal(loss, ours(*features(), ids()))


def test_without_a_queue():
    ours, (image, text, image_m, text_m) = module(queue_size=0), features()
    loss = ours(image, text, image_m, text_m)
    expected = (
        tw.itc_loss(image, text_m, 1 / 0.07, teacher_query=image_m)
        + tw.itc_loss(text, image_m, 1 / 0.07, teacher_query=text_m)
    ) / 2
    torch.testing.assert_close(loss, expected)
    assert len(ours.image_queue) == 0 and ours.queue_pointer == 0
    ours(*features(), ids())


def test_enqueueing_spares_the_backward_pass():
    """Two graphs outlive the second call, which writes to the queues and the temperature."""
    leaves = [features(seed=seed) for seed in range(2)]
    twice = module()
    losses = [twice(*x) for x in leaves]
    sum(losses).backward()
    apart = module()
    for x in leaves:
        other = [y.detach().requires_grad_(y.requires_grad) for y in x]
        apart(*other).backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(x[:2], other[:2], strict=True))
    torch.testing.assert_close(twice.temperature.grad, apart.temperature.grad)


def test_no_gradient_reaches_the_teacher():
    ours = module()
    leaves = [x.detach().requires_grad_() for x in features()]
    ours(*leaves).backward()
    assert leaves[0].grad is not None and leaves[2].grad is None and leaves[3].grad is None
    assert not ours.image_queue.requires_grad


def test_ids_come_and_go():
    """A batch without ids leaves -100 in the queue, which matches no id."""
    ours = module()
    ours(*features(), ids())
    ours(*features(seed=1))
    assert torch.equal(ours.id_queue[:B], ids()) and (ours.id_queue[B:] == -100).all()


# Arguments


def test_alpha_of_a_call():
    ours = module(alpha=0.4).eval()
    for alpha in (0.0, 0.25, 1.0):
        expected = module(alpha=alpha).eval()(*features(), ids())
        for given in (alpha, torch.tensor(alpha)):
            torch.testing.assert_close(ours(*features(), ids(), alpha=given), expected)


def test_temperature_is_clamped():
    for value, kept in ((5.0, 0.5), (-1.0, 0.001), (0.2, 0.2)):
        ours = module().eval()
        with torch.no_grad():
            ours.temperature.fill_(value)
        loss = ours(*features())
        loss.backward()
        assert ours.temperature.item() == pytest.approx(kept)
        assert ours.logit_scale.item() == pytest.approx(1 / kept) and ours.temperature.grad != 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_queues_of_another_dtype(dtype):
    """Features may have another dtype than the queues, which `.to` converts."""
    exact = module().eval()(*features(dtype=torch.float64))
    tolerance = dict(rtol=1e-6, atol=1e-6) if dtype == torch.float64 else dict(rtol=0.02, atol=0.02)
    for queue in (torch.float32, dtype):
        ours = module().to(queue)
        loss = ours(*features(dtype=dtype))
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(loss.double(), exact, **tolerance)
        assert ours.image_queue.dtype == queue
        assert torch.equal(ours.image_queue[:B], features(dtype=dtype)[2].to(queue))
        assert ours.temperature.dtype == torch.promote_types(queue, torch.float32)
    # float32 features beside queues of the dtype
    assert torch.equal(module().to(dtype)(*features()), module().to(dtype).float()(*features()))


def test_autocast():
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = module()
        loss = ours(*features())
    by_hand = module().bfloat16()(*(x.bfloat16() for x in features()))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, by_hand)
    assert torch.equal(ours.image_queue[:B], features()[2])  # not rounded


def without(index, value):
    arguments = features()
    arguments[index] = value
    return arguments


@pytest.mark.parametrize("arguments, error, text", [
    (without(1, torch.zeros(B, D + 1)), ValueError, "text_features: expected as many columns"),
    (without(1, torch.zeros(B - 1, D)), ValueError, r"text_features: expected shape \(6, 8\)"),
    (without(2, torch.zeros(B + 1, D)), ValueError, "teacher_image_features: expected shape"),
    (without(3, torch.zeros(B, D).half()), TypeError, "teacher_text_features: expected torch.fl"),
    (without(0, torch.zeros(B, D).long()), TypeError, "image_features: expected float16"),
    (features(d=D - 1), ValueError, r"image_features: expected shape \(6, 8\), got \(6, 7\)"),
    ((*features(), torch.zeros(B)), TypeError, "ids: expected an int64 tensor"),
    ((*features(), torch.zeros(B + 1).long()), ValueError, "ids: expected 6 ids"),
    ((*features(), None, 1.5), ValueError, "alpha: expected from 0 to 1, got 1.5"),
])
def test_wrong_arguments(arguments, error, text):
    ours = module()
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(error, match=text):
        ours(*arguments)
    assert all(torch.equal(x, before[name]) for name, x in ours.state_dict().items())


@pytest.mark.parametrize("settings, text", [
    (dict(dim=0), "dim: expected at least 1"),
    (dict(queue_size=-1), "queue_size: expected at least 0"),
    (dict(alpha=-0.1), "alpha: expected from 0 to 1"),
    (dict(temperature=0.7), "temperature: expected from 0.001 to 0.5"),
])
def test_wrong_settings(settings, text):
    with pytest.raises(ValueError, match=text):
        module(**settings)


def test_empty_batch():
    ours = module()
    assert ours(*features(0), ids(0)) == 0
    assert ours.queue_pointer == 0


# As a module


def test_a_run_resumes():
    first = module()
    first(*features(), ids())
    fresh = tw.nn.ItcLoss(D, Q)
    fresh.load_state_dict(first.state_dict())
    others = pickle.loads(pickle.dumps(first)), copy.deepcopy(first), fresh
    for step in range(1, 4):
        loss = first(*features(seed=step), ids(seed=step))
        assert all(torch.equal(x(*features(seed=step), ids(seed=step)), loss) for x in others)


@pytest.mark.parametrize("compiler, steps", [
    pytest.param("inductor", [0, 2], marks=pytest.mark.slow),  # the op's own test has inductor too
    ("aot_eager", [0, 1, 2, 3]),
])
def test_compiled_steps(compiler, steps):
    """Two batches with ids; one without, and one in evaluation."""
    torch._dynamo.reset()
    ours = module()
    other = copy.deepcopy(ours)
    compiled = torch.compile(other, fullgraph=True, backend=compiler)
    for step in steps:
        names = None if step == 1 else ids(seed=step)
        ours.train(step != 3), other.train(step != 3)
        results = []
        for loss in (ours, compiled):
            leaves = features(seed=step)
            value = loss(*leaves, names, alpha=torch.tensor(0.1 * step))
            value.backward()
            results.append((value, leaves[0].grad, leaves[1].grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert_same_queues(other, ours.state_dict())
    torch.testing.assert_close(ours.temperature.grad, other.temperature.grad)


def test_nothing_is_read_on_the_host():
    ours, leaves = module(), features()
    with NoHostReads():
        ours(*leaves, ids(), alpha=torch.tensor(0.3)).backward()


# Two processes


def batch(step):
    return [x.detach() for x in (*features(8, seed=step), ids(8, seed=step))]


def trained(part):
    """Losses of some steps of `part` of each batch, and the state dict after each."""
    ours, losses, states = module(queue_size=10), [], []
    for step in range(3):
        losses.append(ours(*(x[part] for x in batch(step))).detach())
        states.append(copy.deepcopy(ours.state_dict()))
    return losses, states


PARTS = slice(0, 4), slice(4, 8)


def process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    results = trained(PARTS[rank])
    ours = module(queue_size=10)
    with pytest.raises(ValueError, match=r"as many rows in every process, got \[3, 2\]"):
        ours(*(x[: 3 - rank] for x in batch(0)))
    assert ours.queue_pointer == 0
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo, on CPU tensors")
def test_processes_share_their_queues(tmp_path):
    """Queues are those of one process with all rows; the losses contrast a part with them.

    Parts of unequal size are an error in both.
    """
    fresh.run_all(process, 2, str(tmp_path))
    _, alone = trained(slice(None))
    for rank, part in enumerate(PARTS):
        losses, states = torch.load(tmp_path / f"{rank}.pt")
        expected = module(queue_size=10).eval()
        for step in range(3):
            loss = expected(*(x[part] for x in batch(step))).detach()
            torch.testing.assert_close(losses[step], loss)
            assert all(torch.equal(x, alone[step][name]) for name, x in states[step].items())
            expected.load_state_dict(alone[step])


def test_torch_func_through_the_reference():
    loss = module().eval()
    image, *others = features()
    with tw.backend("reference"):
        gradient = torch.func.grad(lambda x: loss(x, *others))(image.detach())
        expected, = torch.autograd.grad(loss(image, *others), image)
    torch.testing.assert_close(gradient, expected)


def test_state_is_float32_whatever_the_default_is():
    torch.set_default_dtype(torch.float64)
    try:
        loss = tw.nn.ItcLoss(4, 6)
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.image_queue.dtype == loss.temperature.dtype == torch.float32
