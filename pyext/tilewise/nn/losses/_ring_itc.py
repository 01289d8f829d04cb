"""BLIP's contrast of the pairs of several processes: teachers' features go round the ring."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.distributed import Peers, circulate
from tilewise.nn.losses._ring import Gradients, wanted
from tilewise.nn.losses._softmax import Means, combined
from tilewise.ops._matched import matched_by_ids


class Candidates(NamedTuple):
    """The teacher's features of some pairs, (n, D) each, and their ids (n,), or none."""

    image: Tensor
    text: Tensor
    ids: Tensor | None


def itc(
    peers: Peers, rows: list[int], student: Sequence[Tensor], own: Candidates, queue: Candidates,
    scale: Tensor, alpha: Tensor | None, needs: Sequence[bool],
    enqueue: Callable[[int, Candidates], None],
) -> tuple[Tensor, Gradients]:
    """The loss of one's own pairs among all processes' and the queue, over their mean number.

    Args:
        student: one's own image and text features, (b, D).
        alpha: the teacher's part of the targets, None without a teacher.
        enqueue: is given each process's candidates, by its rank, after the queue was read.
    """
    # Images look for texts, and texts for images.
    sides = [
        _Side(student[0], own.image, own.text, own.ids, scale, alpha, any(needs)),
        _Side(student[1], own.text, own.image, own.ids, scale, alpha, any(needs)),
    ]

    def show(candidates: Candidates) -> None:
        for side, keys in zip(sides, (candidates.text, candidates.image), strict=True):
            side.see(keys, candidates.ids)

    def visit(
        owner: int, first: int, image: Tensor, text: Tensor, *ids: Tensor
    ) -> tuple[Tensor, ...]:
        block = Candidates(image, text, ids[0] if ids else None)
        show(block)
        enqueue(owner, block)
        return ()

    if len(queue.image):
        show(queue)
    block = tuple(x for x in own if x is not None)
    # The queue has places for whole blocks.
    circulate(peers, rows, block, visit, route="shift", whole=True)
    weight = 0.5 * peers.size / max(sum(rows), 1)  # each query matches its own pair at least
    loss, (d_image, d_text), d_scale = combined([x.results(weight) for x in sides], scale)
    return loss, wanted([d_image, d_text, d_scale], needs)


class _Side:
    """Queries of one modality, and the teacher's of the same pairs, among candidates."""

    def __init__(
        self,
        query: Tensor,
        teacher: Tensor,
        match: Tensor,
        ids: Tensor | None,
        scale: Tensor,
        alpha: Tensor | None,
        need_mean: bool,
    ):
        self.student, self.ids, self.alpha = Means(query, scale, need_mean), ids, alpha
        self.teacher = None if alpha is None else Means(teacher.to(query.dtype), scale, True)
        # Without ids a pair matches itself alone; with them `matched` is a sum until all were seen.
        self.matched = match.to(query.dtype).to(scale.dtype)
        if ids is not None:
            self.matched = torch.zeros_like(self.matched)
            self.count = torch.zeros_like(ids)

    def see(self, keys: Tensor, ids: Tensor | None) -> None:
        """Takes a block of candidates in."""
        keys = keys.to(self.student.query.dtype)
        for means in (self.student, self.teacher):
            if means is not None:
                means.see(keys)
        if self.ids is not None and ids is not None:
            found, count = matched_by_ids(keys, None, self.ids, ids)
            self.matched.add_(found * count.unsqueeze(1))
            self.count += count

    def results(self, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """As `Means.results`."""
        target = self.matched.double()
        if self.ids is not None:
            target /= self.count.clamp(min=1).unsqueeze(1)
        if self.alpha is not None and self.teacher is not None and self.teacher.mean is not None:
            target = self.alpha * self.teacher.mean + (1 - self.alpha) * target
        return self.student.results(target, weight)
