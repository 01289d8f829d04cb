"""Losses of the pairs of several processes, each of which holds a part of the rows.

A process computes its images with every text, block by block as `tilewise.distributed.circulate`
shows them, and what it finds for the texts travels to their owner. Loss and gradients are finished
after the forward pass: backward only scales them, and exchanges nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tilewise.distributed import Peers, circulate
from tilewise.nn.losses._softmax import Means, combined, merge_sums
from tilewise.ops._arguments import NOWHERE
from tilewise.ops._blocks import block_gradients, block_sums, sigmoid_block

PIECE = 512  # rows of a block that are worth a call of their own
PIECES = 4

Gradients = list[Tensor | None]


def wanted(gradients: Sequence[Tensor | None], needs: Sequence[bool]) -> Gradients:
    """Those that are needed, None in place of the others."""
    return [x if need else None for x, need in zip(gradients, needs, strict=True)]


def pieces(rows: list[int]) -> int:
    return max(1, min(PIECES, max(rows) // PIECE))


def sigmoid(
    peers: Peers, rows: list[int], image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None,
    needs: Sequence[bool], route: str,
) -> tuple[Tensor, Gradients]:
    """SigLIP: sum of one's own images with all texts, over the mean number of rows.

    The mean over the processes is the loss of all pairs, and so are the gradients.
    """
    share = len(image) * peers.size / max(sum(rows), 1)  # the op divides by its own rows
    d_image: Tensor | None = None
    sums: list[Tensor] = []  # of loss and gradients by scale and bias

    def visit(owner: int, first: int, text: Tensor) -> tuple[Tensor, ...]:
        nonlocal d_image
        offset = -first if owner == peers.rank else NOWHERE
        loss, d_image, d_text, *scalars = sigmoid_block(
            image, text, scale, bias, offset, needs, d_image
        )
        sums[:] = _added(sums, [loss, *scalars])
        return (d_text if share == 1 else d_text.mul_(share),) if needs[1] else ()

    (d_text,) = circulate(
        peers, rows, (text,), visit, route=route, pieces=pieces(rows)
    ) or (None,)
    assert d_image is not None  # its own texts were shown at least
    loss, d_image, *scalars = (
        x if share == 1 else x.mul_(share) for x in (sums[0], d_image, *sums[1:])
    )
    gradients = [d_image, d_text, *(x.to(scale.dtype) for x in scalars)]
    return loss.to(scale.dtype), wanted(gradients, needs)


def _added(sums: Sequence[Tensor], more: Sequence[Tensor]) -> list[Tensor]:
    """Of each, in float64; without sums so far, `more`."""
    found = [x.double() for x in more]
    return [x + y for x, y in zip(sums, found, strict=True)] if sums else found


def clip(
    peers: Peers, rows: list[int], image: Tensor, text: Tensor, scale: Tensor,
    needs: Sequence[bool], *, local_loss: bool, gather_with_grad: bool,
) -> tuple[Tensor, Gradients]:
    """CLIP, in two rounds: sums of exponentials, then gradients.

    The loss of one's own images and texts (`local_loss`), or of all. Of the gradients, what
    open_clip's are with the same options.
    """
    if local_loss and not gather_with_grad:
        return _clip_of_queries(peers, rows, image, text, scale, needs)
    world = peers.size
    weight = 0.5 / max(sum(rows), 1)
    image_sums, text_sums, matched = _clip_sums(peers, rows, image, text, scale)
    terms = [sums[:, 0] + sums[:, 1].log() for sums in (image_sums, text_sums)]
    loss = weight * (terms[0].sum() + terms[1].sum() - 2 * matched)
    gradients: Gradients = [None] * 3
    if any(needs):
        gradients = _clip_gradients(
            peers, rows, image, text, scale, (image_sums, text_sums), weight, needs
        )
    if gather_with_grad:
        gradients[:2] = [None if x is None else x.mul_(world) for x in gradients[:2]]
    d_scale = gradients[2]
    if local_loss:
        loss = loss * world
        gradients[2] = None if d_scale is None else d_scale * world
    else:
        parts = torch.stack([loss, loss.new_zeros(()) if d_scale is None else d_scale.double()])
        loss, total = (x.clone() for x in peers.table(parts).sum(0))  # no views of one tensor
        gradients[2] = None if d_scale is None else total
    gradients[2] = None if gradients[2] is None else gradients[2].to(scale.dtype)
    return loss.to(scale.dtype), gradients


def _clip_of_queries(
    peers: Peers, rows: list[int], image: Tensor, text: Tensor, scale: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Gradients]:
    """The local loss, whose features have no gradient as candidates: one round, nothing comes home.

    Two softmax means, so 2 products for each direction.
    """
    queries = [Means(x, scale, any(needs)) for x in (image, text)]

    def visit(owner: int, first: int, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        queries[0].see(text)
        queries[1].see(image)
        return ()

    circulate(peers, rows, (image, text), visit)
    weight = 0.5 * peers.size / max(sum(rows), 1)
    found = [
        x.results(target.double(), weight) for x, target in zip(queries, (text, image), strict=True)
    ]
    loss, (d_image, d_text), d_scale = combined(found, scale)
    return loss, wanted([d_image, d_text, d_scale], needs)


def _clip_sums(
    peers: Peers, rows: list[int], image: Tensor, text: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of exponentials of one's own images and texts (rows, 2), the sum of matches' logits."""
    own: list[Tensor] = []

    def visit(owner: int, first: int, text: Tensor) -> tuple[Tensor]:
        offset = -first if owner == peers.rank else NOWHERE
        image_sums, text_sums, matched = block_sums(image, text, scale, offset)
        if own:
            merge_sums(own[0], image_sums.t())
            own[1] += matched
        else:
            own.extend([image_sums.t().contiguous(), matched])
        return (text_sums.t().contiguous(),)

    (text_sums,) = circulate(peers, rows, (text,), visit, merge=merge_sums)
    return own[0], text_sums, own[1]


def _clip_gradients(
    peers: Peers, rows: list[int], image: Tensor, text: Tensor, scale: Tensor,
    sums: tuple[Tensor, Tensor], weight: float, needs: Sequence[bool],
) -> Gradients:
    """By image and text of the loss of all pairs; by the scale, one's own images' part of it."""
    image_sums = sums[0].t().contiguous()
    images = image_sums.new_full((len(image),), weight)
    total: Tensor | None = None
    scales: list[Tensor] = []

    def visit(owner: int, first: int, text: Tensor, text_sums: Tensor) -> tuple[Tensor, ...]:
        nonlocal total
        texts = text_sums.new_full((len(text),), weight)
        offset = -first if owner == peers.rank else NOWHERE
        total, d_text, d_scale = block_gradients(
            image, text, scale, offset, image_sums, text_sums.t().contiguous(), images, texts,
            needs, total,
        )
        scales[:] = _added(scales, [d_scale])
        return (d_text,) if needs[1] else ()

    (d_text,) = circulate(
        peers, rows, (text, sums[1]), visit, pieces=pieces(rows)
    ) or (None,)
    return wanted([total, d_text, *scales], needs)


T = TypeVar("T")


def agreed(
    peers: Peers, check: Callable[[], tuple[T, int, dict]], device: torch.device
) -> tuple[T, list[int]]:
    """What `check` makes of this process's arguments, and how many rows each process has.

    Args:
        check: returns that, the rows, and what must be equal in every process. What it raises is
            an error in all of them.
    """
    problem, found = None, None
    rows = 0
    facts: dict[str, Any] = {}
    try:
        found, rows, facts = check()
    except (TypeError, ValueError) as error:
        problem = str(error)
    table = peers.agree(rows, facts, problem, device)
    return found, table  # type: ignore[return-value]  # with a problem, agree has raised


def named(needs: Sequence[bool], *names: str) -> str:
    """Of which inputs a gradient is needed."""
    return " ".join(name for name, need in zip(names, needs, strict=False) if need)


def device_of(*features: Tensor) -> torch.device:
    """Where features are, whatever else a process was given."""
    tensors = [x for x in features if isinstance(x, Tensor)]
    return tensors[0].device if tensors else torch.device("cpu")


def _scaled(grad: Tensor, gradients: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Gradients times `grad`: where they are, if nobody will read them again."""
    again = torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph()
    if again or any(x.dtype != of.dtype for x, of in zip(gradients, inputs, strict=True)):
        return torch.ops.tilewise.scale_gradients(grad, gradients, inputs)
    torch._foreach_mul_(gradients, grad)
    return gradients


class _Finished(torch.autograd.Function):
    """A loss whose gradients were computed with it."""

    @staticmethod
    def forward(ctx, run, needs, *inputs):
        loss, gradients = run(needs)
        ctx.places = [i for i, x in enumerate(gradients) if x is not None]
        ctx.count = len(inputs)
        ctx.save_for_backward(*(x[i] for x in (gradients, inputs) for i in ctx.places))
        return loss

    @staticmethod
    def backward(ctx, grad):
        n, saved = len(ctx.places), ctx.saved_tensors  # checkpointing lets them be read once
        scaled = _scaled(grad, list(saved[:n]), list(saved[n:]))
        result = [None] * ctx.count
        for i, x in zip(ctx.places, scaled, strict=True):
            result[i] = x
        return None, None, *result


def finished(
    run: Callable[[Sequence[bool]], tuple[Tensor, Gradients]],
    needs: Sequence[bool],
    *inputs: Tensor | None,
) -> Tensor:
    """The loss that `run(needs)` returns with its gradients, differentiable in `inputs`."""
    return _Finished.apply(run, needs, *inputs) if any(needs) else run(needs)[0]
