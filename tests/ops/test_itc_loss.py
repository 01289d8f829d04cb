"""tilewise.itc_loss: every backend against float64, within the error of the eager op."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import tilewise as tw
from benchmarks.baselines import eager_itc_loss
from tests.common.budget import assert_within_budget
from tests.common.contrastive_cases import (
    CASES,
    DEVICE,
    Case,
    duplicated,
    ids,
    normal,
    related,
    unrelated,
)
from tilewise.reference._matches import matches

BACKENDS = ["cpu", "triton"] if DEVICE == "cpu" else ["triton"]
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES, torch.float64]
NAN = float("nan")


@dataclass(frozen=True)
class Problem:
    """A contrastive case with image as query and text as keys, a queue and a teacher.

    Ids of the case are those of images (B,) and of texts with the queue (K + Q,).
    """

    case: Case
    queue: int | None = 70
    teacher: bool = True
    alpha: float = 0.4
    nan: str = ""  # the tensor that has one

    @property
    def name(self) -> str:
        return self.case.name

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
        """Made in float64 and rounded; the case's layout changes the strides of all."""
        generator = torch.Generator("cpu").manual_seed(sum(map(ord, self.name)))
        query, keys = self.case.make(generator)
        made = {"query": query, "keys": keys, "queue": None, "teacher_query": None}
        if self.queue is not None:
            made["queue"] = queue_like(keys, self.queue, generator)
        if self.teacher:
            noise = F.normalize(normal(*query.shape, generator), dim=1)
            made["teacher_query"] = F.normalize(query + 0.5 * noise, dim=1)
        if self.nan:
            made[self.nan][-2, 1] = NAN
        layout = self.case.layout
        return {n: None if x is None else layout(x.to(DEVICE, dtype)) for n, x in made.items()}


def queue_like(keys, rows, generator):
    """Unit rows (rows, D); every third one is a key."""
    queue = F.normalize(normal(rows, keys.shape[1], generator), dim=1)
    if len(keys):
        repeated = torch.arange(len(queue[::3])) * 2 % len(keys)
        queue[::3] = keys[repeated]
    return queue


def of_ids(name, b, k, q, names, **options):
    return Problem(Case(name, related(b, k, 8), positives=ids(b, k + q, names)), q, **options)


def at_scale(scale: float, make=None) -> list[Case]:
    makes = {"related": related(40, 40, 24, noise=0.3), "unrelated": unrelated(40, 40, 24)}
    return [Case(f"{name}-scale-{scale}", make, scale) for name, make in makes.items()]


TYPICAL = Problem(Case("queue", related(30, 30, 16)))
WITH_IDS = of_ids("queue-ids", 30, 34, 50, 20)
PROBLEMS = [
    *(Problem(case) for case in CASES if not isinstance(case.positives, tuple)),
    *(Problem(case) for scale in (1.0, 14.3, 100.0) for case in at_scale(scale)),
    TYPICAL,
    *(Problem(Case(f"queue-{name}", related(30, 30, 16)), size)
      for name, size in (("none", None), ("empty", 0), ("of-one", 1))),
    Problem(Case("queue-long", related(5, 7, 8)), 300),
    Problem(Case("queue-alone", related(9, 0, 8)), 20),
    Problem(Case("matches-in-queue", related(20, 20, 8), positives=20), 20),
    Problem(Case("matches-across", related(20, 20, 8), positives=11), 20),
    Problem(Case("duplicated-peaked", duplicated(30, 8), 100.0), 40),
    *(Problem(Case(f"no-teacher-{scale}", related(30, 30, 16), scale), teacher=False)
      for scale in (14.3, 100.0)),
    *(Problem(Case(f"alpha-{alpha}-scale-{scale}", related(30, 30, 16), scale), alpha=alpha)
      for alpha in (0.0, 1.0) for scale in (14.3, 100.0)),
    WITH_IDS,
    of_ids("ids-few", 41, 37, 30, 3),
    of_ids("ids-one", 10, 12, 9, 1),
    of_ids("ids-apart", 12, 12, 20, 1000),  # no query has a match
    of_ids("ids-rare", 30, 30, 30, 90),  # some have none
    of_ids("ids-rare-teacher-alone", 30, 30, 30, 90, alpha=1.0),
    of_ids("ids-without-teacher", 30, 30, 30, 40, teacher=False),
    Problem(Case("unmatched-without-teacher", related(9, 12, 8), positives=None), 20, False),
    of_ids("ids-no-keys", 8, 0, 30, 6),
    of_ids("ids-no-queue", 20, 30, 0, 6),
    of_ids("ids-no-query", 0, 5, 5, 6),
    *(Problem(Case(f"nan-{name}", related(10, 12, 6)), 20, nan=name)
      for name in ("query", "keys", "queue", "teacher_query")),
]
HALF = [p for p in PROBLEMS if p.name in (
    "queue", "unrelated-scale-100.0", "no-teacher-14.3", "ids-rare",
)]  # fmt: skip
# Left to the compiled backend: each is like another one to a kernel that knows no strides.
DOUBLES = ("no-bias", "far-negatives", "far-positives", "transposed", "expanded", "odd",
           "one-column", "related-scale-1.0", "unrelated-scale-1.0", "unrelated-scale-14.3",
           "queue-of-one", "alpha-0.0-scale-14.3", "alpha-1.0-scale-14.3", "ids-one",
           "unmatched-without-teacher",
           "ids-no-keys", "nan-keys", "nan-query", "nothing", "queue-empty", "ids-few",
           "offset-huge", "offset-hugely-negative", "related-scale-14.3",
           "unrelated-scale-100", "duplicated-rows", "matches-in-queue", "offset-storage",
           "related-scale-100.0", "ids-apart", "tiny-logits", "no-texts",
           "ids-rare-teacher-alone", "nan")  # fmt: skip


@pytest.fixture
def backend(request):
    with tw.backend(request.param):
        yield request.param


backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
# Programs are interpreted, which takes long.
SERVED = [("cpu", dtype, p) for dtype in DTYPES for p in PROBLEMS if DEVICE == "cpu"] + [
    *(("triton", torch.float32, p) for p in PROBLEMS if p.name not in DOUBLES),
    *(("triton", dtype, p) for dtype in HALVES for p in HALF),
]


def outputs(loss_function, problem: Problem, tensors, dtype) -> dict[str, torch.Tensor]:
    """Loss and gradients; `dtype` is the scale's."""
    leaf = tensors["query"].detach().requires_grad_()
    scale = torch.tensor(problem.case.logit_scale, dtype=dtype, requires_grad=True)
    loss = loss_function(
        **{**tensors, "query": leaf}, logit_scale=scale, alpha=problem.alpha,
        positives=problem.case.positives,
    )
    gradients = torch.autograd.grad(loss, [leaf, scale])
    names = ("d_query", "d_scale")
    return {"loss": loss.detach(), **dict(zip(names, gradients, strict=True))}


def magnitudes(problem: Problem, query, keys, queue, teacher_query) -> dict[str, float]:
    """Sums of the absolute values of each output's terms, with what a rounded logit does."""
    candidates = keys if queue is None else torch.cat([keys, queue])
    if not len(query) or not len(candidates):
        return dict.fromkeys(("loss", "d_query", "d_scale"), 0.0)
    scale, alpha = problem.case.logit_scale, problem.alpha
    z = query @ candidates.T * scale  # (B, K + Q)
    pairs = matches(query, candidates, problem.case.positives).double()
    target = pairs / pairs.sum(1, keepdim=True).clamp(min=1)
    soft, soft_logits = torch.zeros_like(z), torch.zeros_like(z)
    if teacher_query is not None:
        soft_logits = teacher_query @ candidates.T * scale
        soft, target = alpha * torch.softmax(soft_logits, 1), (1 - alpha) * target
    rows = (pairs.sum(1, keepdim=True) > 0).double()
    weight = rows / rows.sum().clamp(min=1)
    lse = z.logsumexp(1, keepdim=True)
    of_term = 1 + z.abs() + lse.abs()
    terms = target * of_term + soft * (of_term + soft_logits.abs() * (lse - z))
    dz = (torch.softmax(z, 1) + target) * (1 + z.abs()) + soft * (1 + soft_logits.abs())
    dz = weight * dz
    return {
        "loss": float((weight * terms).sum()),
        "d_query": abs(scale) * float((dz @ candidates.abs()).amax()) if query.numel() else 0.0,
        "d_scale": float((dz * (query @ candidates.T).abs()).sum()),
    }


def check(problem: Problem, dtype):
    tensors = problem.tensors(dtype)
    exact = {name: None if x is None else x.double() for name, x in tensors.items()}
    truth = outputs(tw.reference.itc_loss, problem, exact, torch.float64)
    scale_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    ours = outputs(tw.itc_loss, problem, tensors, scale_dtype)
    eager = outputs(eager_itc_loss, problem, tensors, dtype)
    assert ours["loss"].dtype == scale_dtype and ours["d_query"].dtype == dtype
    assert_within_budget(ours, eager, truth, magnitudes(problem, **exact))


@pytest.mark.parametrize(
    "backend, dtype, problem", SERVED, indirect=["backend"],
    ids=lambda value: value.name if isinstance(value, Problem) else str(value),
)
def test_within_error_budget(backend, dtype, problem):
    check(problem, dtype)


@given(
    b=st.integers(0, 30), k=st.integers(0, 30), q=st.none() | st.integers(0, 60),
    d=st.integers(0, 20), scale=st.floats(-100, 100), positives=st.integers(-40, 80) | st.none(),
    names=st.integers(1, 60), teacher=st.booleans(), alpha=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
)
def test_random_problems(b, k, q, d, scale, positives, names, teacher, alpha, dtype):
    same = ids(b, k + (q or 0), names) if positives is None else positives
    case = Case("random", related(b, k, d), scale, None, same)
    check(Problem(case, q, teacher, alpha), dtype)


@backends
def test_alpha_may_be_a_tensor(backend):
    tensors = TYPICAL.tensors(torch.float32)
    expected = outputs(tw.itc_loss, TYPICAL, tensors, torch.float32)
    for alpha in (torch.tensor(0.4), torch.full((1, 1), 0.4, dtype=torch.float64)):
        ours = outputs(tw.itc_loss, replace(TYPICAL, alpha=alpha), tensors, torch.float32)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


@backends
def test_without_a_teacher_alpha_is_of_no_account(backend):
    problem = replace(TYPICAL, teacher=False)
    tensors = problem.tensors(torch.float32)
    first, second = (
        outputs(tw.itc_loss, replace(problem, alpha=alpha), tensors, torch.float32)
        for alpha in (0.1, 0.9)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_queries_without_a_match_are_left_out():
    """As if they were not there; the candidates that match nobody stay."""
    tensors = WITH_IDS.tensors(torch.float64)
    query_ids, candidate_ids = WITH_IDS.case.positives
    known = torch.isin(query_ids, candidate_ids)
    strange = torch.cat([query_ids[known], torch.tensor([1, 2, 3])])
    more = {n: torch.cat([tensors[n][known], tensors[n][:3]]) for n in ("query", "teacher_query")}
    fewer = {n: tensors[n][known] for n in more}
    losses = [
        tw.reference.itc_loss(
            **{**tensors, **part}, logit_scale=9.0, positives=(names, candidate_ids)
        )
        for part, names in ((more, strange), (fewer, query_ids[known]))
    ]
    torch.testing.assert_close(*losses)


def published(image, text, image_m, text_m, image_queue, text_queue, temp, alpha, ids=None):
    """The contrast of BLIP's paper as its authors wrote it: images with texts, then texts.

    Queues are (D, Q) as theirs; `ids` (B + Q,) are the names of the batch and of the queue.
    """
    text_all = torch.cat([text_m.t(), text_queue], dim=1)  # (D, B + Q)
    image_all = torch.cat([image_m.t(), image_queue], dim=1)
    with torch.no_grad():
        sim_i2t_m = image_m @ text_all / temp
        sim_t2i_m = text_m @ image_all / temp
        if ids is None:
            sim_targets = torch.zeros(sim_i2t_m.size(), dtype=image.dtype)
            sim_targets.fill_diagonal_(1)
        else:
            pos = torch.eq(ids[: len(image)].view(-1, 1), ids.view(1, -1)).to(image.dtype)
            sim_targets = pos / pos.sum(1, keepdim=True)
        sim_i2t_targets = alpha * F.softmax(sim_i2t_m, dim=1) + (1 - alpha) * sim_targets
        sim_t2i_targets = alpha * F.softmax(sim_t2i_m, dim=1) + (1 - alpha) * sim_targets
    sim_i2t = image @ text_all / temp
    sim_t2i = text @ image_all / temp
    loss_i2t = -torch.sum(F.log_softmax(sim_i2t, dim=1) * sim_i2t_targets, dim=1).mean()
    loss_t2i = -torch.sum(F.log_softmax(sim_t2i, dim=1) * sim_t2i_targets, dim=1).mean()
    return loss_i2t, loss_t2i


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("names", [None, 7], ids=["diagonal", "ids"])
def test_reference_is_the_published_loss(names, alpha):
    first, second = (
        Problem(Case(name, related(20, 20, 8))).tensors(torch.float64) for name in "ab"
    )
    image, text = (x["query"].requires_grad_() for x in (first, second))
    image_m, text_m = (x["teacher_query"] for x in (first, second))
    image_queue, text_queue = (x["queue"] for x in (first, second))
    temp = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    known = None if names is None else torch.arange(90) * 5 % names
    positives = 0 if known is None else (known[:20], known)
    theirs = published(
        image, text, image_m, text_m, image_queue.T, text_queue.T, temp, alpha, known
    )
    ours = (
        tw.reference.itc_loss(
            query, keys, 1 / temp, positives=positives, queue=queue, teacher_query=teacher,
            alpha=alpha,
        )
        for query, keys, queue, teacher in (
            (image, text_m, text_queue, image_m), (text, image_m, image_queue, text_m)
        )
    )
    for mine, other, leaf in zip(ours, theirs, (image, text), strict=True):
        torch.testing.assert_close(mine, other)
        gradients = (torch.autograd.grad(x, [leaf, temp], retain_graph=True) for x in (mine, other))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def test_reference_without_a_teacher_is_cross_entropy():
    tensors = TYPICAL.tensors(torch.float64)
    logits = 9 * tensors["query"] @ torch.cat([tensors["keys"], tensors["queue"]]).T
    expected = F.cross_entropy(logits, torch.arange(30, device=logits.device))
    ours = tw.reference.itc_loss(**{**tensors, "teacher_query": None}, logit_scale=9.0)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("positives", [3, ids(4, 8, 3)], ids=["offset", "ids"])
@pytest.mark.parametrize("teacher", [True, False])
def test_reference_gradcheck(positives, teacher):
    """With a teacher the scale is in the targets as well, whose derivative nobody wants."""
    tensors = Problem(Case("g", related(4, 5, 2)), 3, teacher).tensors(torch.float64)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=not teacher)

    def loss(query, scale):
        return tw.reference.itc_loss(
            **{**tensors, "query": query}, logit_scale=scale, alpha=0.3, positives=positives
        )

    assert torch.autograd.gradcheck(loss, (tensors["query"].requires_grad_(), scale))
    assert torch.autograd.gradgradcheck(loss, (tensors["query"], scale))
