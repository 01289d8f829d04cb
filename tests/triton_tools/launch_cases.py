"""The calls whose launches are counted: of each op and size, and a training step of modules."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import tilewise as tw
from tests.triton_tools.launches import Row, counted, passes

HALF = torch.bfloat16


def features(*sizes: int, dtype: torch.dtype = HALF, grad: bool = True) -> list[Tensor]:
    return [torch.zeros(n, 64, dtype=dtype, requires_grad=grad) for n in sizes]


def number(value: float = 1.0) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def rows() -> Iterator[Row]:
    for family in (losses, itc, negatives, codes, samples, modules):
        yield from family()


def losses() -> Iterator[Row]:
    scale, bias = number(), number()
    ids = torch.arange(256), torch.arange(256)
    for case, size, dtype, options in (
        ("256", 256, HALF, {}), ("8192", 8192, HALF, {}), ("32768", 32768, HALF, {}),
        ("256 ids", 256, HALF, {"positives": ids}), ("2048 float32", 2048, torch.float32, {}),
        ("8192 float32", 8192, torch.float32, {}), ("256 float32", 256, torch.float32, {}),
    ):
        image, text = features(size, size, dtype=dtype)
        call: Callable = partial(tw.sigmoid_loss, image, text, scale, bias, **options)
        yield from passes("sigmoid_loss", case, call, [image, text, scale, bias])
        call = partial(tw.clip_loss, image, text, scale, **options)
        yield from passes("clip_loss", case, call, [image, text, scale])
    call = partial(tw.clip_loss, image, text, scale, label_smoothing=0.1)
    yield from passes("clip_loss", "256 smoothed", call, [image, text, scale])
    with torch.no_grad():
        call = partial(tw.sigmoid_loss, image, text, scale)
        yield from passes("sigmoid_loss", "256 no gradient", call, [])


def itc() -> Iterator[Row]:
    scale = number()
    query, = features(512)
    keys, teacher, queue = features(512, 512, 57600, grad=False)
    ids = torch.arange(512), torch.arange(512 + 57600)
    both = {"queue": queue, "teacher_query": teacher}
    for case, options in (
        ("512 + 57600", both), ("512 + 57600 no teacher", {"queue": queue}),
        ("512 no queue", {"teacher_query": teacher}),
        ("512 + 57600 ids", both | {"positives": ids}),
    ):
        call = partial(tw.itc_loss, query, keys, scale, **options)
        yield from passes("itc_loss", case, call, [query, scale])


def negatives() -> Iterator[Row]:
    scale, seed = torch.ones(()), torch.zeros((), dtype=torch.int64)
    single = torch.float32
    for size, dtype in ((256, HALF), (8192, HALF), (32768, HALF), (2048, single), (8192, single)):
        image, text = features(size, size, dtype=dtype, grad=False)
        call = partial(tw.hard_negatives, image, text, scale, seed=seed)
        case = f"{size} float32" if dtype == single else str(size)
        yield from passes("hard_negatives", case, call, [])
    image, text = features(256, 256, grad=False)
    ids = torch.arange(256), torch.arange(256)
    call = partial(tw.hard_negatives, image, text, scale, positives=ids, seed=seed)
    yield from passes("hard_negatives", "256 ids", call, [])


def codes() -> Iterator[Row]:
    for n, k in ((4096, 8192), (16, 512), (262144, 1024)):
        x, codebook = torch.zeros(n, 64), torch.zeros(k, 64)
        for metric in ("l2", "cosine", "dot"):
            call = partial(tw.nearest_code, x, codebook, metric)
            yield from passes("nearest_code", f"{n} x {k} {metric}", call, [])
        with counted():
            call = partial(tw.nearest_code, x, tw.prepare_codebook(codebook))
        yield from passes("nearest_code", f"{n} x {k} prepared", call, [])
        index = torch.zeros(n, dtype=torch.int64)
        yield from passes("code_sums", f"{n} x {k}", partial(tw.code_sums, x, index, k), [])


def samples() -> Iterator[Row]:
    seed = torch.zeros((), dtype=torch.int64)
    for n, k in ((256, 1000), (4, 150000)):
        logits, tau = torch.zeros(n, k, requires_grad=True), number()
        for kind, hard, inputs in (
            ("soft", False, [logits]), ("hard", True, [logits]), ("tau", False, [logits, tau]),
        ):
            temperature = tau if kind == "tau" else tau.detach()
            call: Callable = partial(tw.gumbel_softmax, logits, temperature, hard, seed=seed)
            yield from passes("gumbel_softmax", f"{n} x {k} {kind}", call, inputs)
        for count in (None, 4):
            call = partial(tw.gumbel_argmax, logits.detach(), k=count, seed=seed)
            yield from passes("gumbel_argmax", f"{n} x {k} k={count}", call, [])
        call = partial(tw.gumbel_argmax, logits.detach(), log_prob=True, seed=seed)
        yield from passes("gumbel_argmax", f"{n} x {k} log_prob", call, [])
        mean, logvar = (torch.zeros(n, k, requires_grad=True) for _ in range(2))
        call = partial(tw.gaussian_sample, mean, logvar, seed=seed)
        yield from passes("gaussian_sample", f"{n} x {k}", call, [mean, logvar])


def modules() -> Iterator[Row]:
    quantizer = tw.nn.VectorQuantizer(64, 1024)
    x = torch.zeros(8, 512, 64, requires_grad=True)
    loss = tw.nn.ItcLoss(64, queue_size=57600)
    student, teacher = features(512, 512), features(512, 512, grad=False)

    one = torch.ones(())

    def quantize() -> None:
        quantized, _, commitment = quantizer(x)
        torch.autograd.grad([quantized, commitment], [x], [x.detach(), one])

    def contrast(ids: Tensor | None) -> None:
        torch.autograd.grad(loss(*student, *teacher, ids), [*student, loss.temperature], one)

    for name, case, step in (
        ("nn.VectorQuantizer", "training", quantize),
        ("nn.ItcLoss", "training", partial(contrast, None)),
        ("nn.ItcLoss", "training ids", partial(contrast, torch.arange(512))),
    ):
        with counted():
            step()
        with counted() as count:
            step()
        yield Row(name, case, "step", count)
