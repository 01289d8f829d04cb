"""How codebooks learn from a batch: averages, and rows of the batch in the place of dead codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.nn import _sync
from tilewise.nn.quantizers._codebook import Codebook
from tilewise.nn.quantizers._sampling import Wanted, sample_rows


class Lesson(NamedTuple):
    """What a codebook has yet to learn from a batch, as this process sees it."""

    book: Codebook
    rows: Tensor  # (M, D)
    flat_index: Tensor  # (M) int64; -1 leaves a row out
    counts: Tensor  # (H, K) int64: how many rows each code got
    sums: Tensor  # (H, K, D), of these rows
    enabled: Tensor | None  # () bool: False changes nothing


@torch.no_grad()
def lesson(book: Codebook, rows: Tensor, flat_index: Tensor, enabled: Tensor | None) -> Lesson:
    """A lesson of rows (M, D) with indices (M); `learn` has to follow."""
    rows = rows.detach()
    return Lesson(book, rows, flat_index, *book.sums(rows, flat_index), enabled)


@torch.no_grad()
def learn(
    lessons: Sequence[Lesson | None], refresh: bool = True, accumulate: bool = False
) -> None:
    """One step of learning. Processes exchange once, and twice where codes may be dead.

    Args:
        lessons: in the order in which one codebook gets several; all with the same `sync`.
        refresh: whether codes follow their averages at once, or when `Codebook.refresh` is called.
        accumulate: only adds the rows to those of the next step.
    """
    todo = [one for one in lessons if one is not None]
    if not todo:
        return
    parts = [x for one in todo for x in (one.counts, one.sums)]
    parts = _sync.summed(parts, todo[0].book.sync)
    statistics = list(zip(parts[::2], parts[1::2], strict=True))
    for turn in _turns(todo):
        for i in turn:
            todo[i].book.average(*statistics[i], refresh, todo[i].enabled, accumulate)
        if not accumulate:
            _revive([todo[i] for i in turn])


def _turns(lessons: Sequence[Lesson]) -> list[list[int]]:
    """Places of lessons that can be taken together: of different codebooks."""
    turns: list[list[int]] = []
    for i, one in enumerate(lessons):
        for turn in turns:
            if all(lessons[j].book is not one.book for j in turn):
                turn.append(i)
                break
        else:
            turns.append([i])
    return turns


def _revive(lessons: Sequence[Lesson]) -> None:
    """Puts rows of this batch in the place of codes that hardly any row chooses."""
    lessons = [one for one in lessons if one.book.threshold_ema_dead_code > 0]
    if not lessons:
        return
    wanted = [Wanted(one.rows, one.flat_index >= 0, one.book.dead(one.enabled)) for one in lessons]
    samples = sample_rows(wanted, lessons[0].book.sync)
    for one, sample in zip(lessons, samples, strict=True):
        one.book.replace(sample.found, sample.rows)
