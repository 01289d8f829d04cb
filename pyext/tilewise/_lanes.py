"""What goes round a ring of processes: blocks of rows, and sums that follow one hop behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from tilewise.distributed import Peers, Transfer

Parts = tuple[Tensor, ...]


class Lane:
    """A way of blocks round the ring, `step` ranks at a time, and of what is summed for them.

    A block visits `hops` processes. The sum of what they have for it goes along with it, one hop
    behind, and from the last of them home. Of blocks that are cut in `count`, a lane has part
    `number`; `own` is where this process's lies.
    """

    def __init__(
        self, peers: Peers, rows: list[int], pieces: int, step: int, hops: int,
        number: int = 0, count: int = 1,
    ):  # fmt: skip
        self.parts = [cuts(n, count)[number] for n in rows]
        self.peers, self.own, self.step, self.hops = peers, self.parts[peers.rank], step, hops
        self.rows = [part.stop - part.start for part in self.parts]
        self.pieces = pieces
        self.hop = 0
        self.sums: list[tuple[Parts, Transfer]] = []  # of each piece, on their way here

    def _rank(self, steps: int) -> int:
        return (self.peers.rank + steps * self.step) % self.peers.size

    def begin(self, block: Parts) -> None:
        """Sends this process's part of its block."""
        self.send_on(tuple(x[self.own] for x in block))

    def send_on(self, block: Parts) -> None:
        """Begins to send the block to the next process, and to receive the previous one's."""
        if self.hop == self.hops:
            return
        rows = self.rows[self._rank(-self.hop - 1)]
        self.next = tuple(x.new_empty(rows, *x.shape[1:]) for x in block)
        self.arrival = self.peers.exchange(
            [(self._rank(1), x) for x in block], [(self._rank(-1), x) for x in self.next]
        )

    def visit(self, visit: Callable[..., Parts], merge: Callable[[Tensor, Tensor], Any]) -> None:
        """Takes the next block in, and sends on what there is for it."""
        self.arrival.wait()
        block, self.hop = self.next, self.hop + 1
        self.next = ()
        self.send_on(block)
        owner, last = self._rank(-self.hop), self.hop == self.hops
        # After the last hop sums go home. Here come those of the block that is visited next.
        to, source = (owner, self._rank(self.hops)) if last else (self._rank(1), self._rank(-1))
        rows = self.rows[self.peers.rank if last else self._rank(-self.hop - 1)]
        before, self.sums = self.sums[::-1], []
        sizes = zip(cuts(len(block[0]), self.pieces), cuts(rows, self.pieces), strict=True)
        for here, there in sizes:
            first = self.parts[owner].start + here.start
            parts = visit(owner, first, *(x[here] for x in block))
            if before:
                sums, transfer = before.pop()
                transfer.wait()
                for part, sum in zip(parts, sums, strict=True):
                    merge(part, sum)
            coming = tuple(x.new_empty(there.stop - there.start, *x.shape[1:]) for x in parts)
            self.sums.append((coming, self.peers.exchange(
                [(to, x.contiguous()) for x in parts], [(source, x) for x in coming]
            )))

    def bring_home(self, own: Parts, merge: Callable[[Tensor, Tensor], Any]) -> None:
        """Merges the sums of this process's own block, piece by piece."""
        own = tuple(x[self.own] for x in own)
        arriving, self.sums = self.sums, []
        places = cuts(self.rows[self.peers.rank], self.pieces)
        for at, (sums, transfer) in zip(places, arriving, strict=True):
            transfer.wait()
            for total, part in zip(own, sums, strict=True):
                merge(total[at], part)


class Own:
    """A process's own block, visited by parts, one for each of `rounds`, and its sums.

    With `halves` the first part is visited in two calls.
    """

    def __init__(self, rank: int, block: Parts, rounds: int, halves: bool):
        self.rank, self.block = rank, block
        self.left = cuts(len(block[0]), rounds)
        if halves:
            end = self.left[0].stop
            self.left[:1] = [slice(0, end // 2), slice(end // 2, end)]
        self.sums: Parts = ()

    def visit(self, visit: Callable[..., Parts]) -> None:
        """Visits the next part, if there is one."""
        if not self.left:
            return
        at = self.left.pop(0)
        found = visit(self.rank, at.start, *(x[at] for x in self.block))
        rows = len(self.block[0])
        if at == slice(0, rows):
            self.sums = found
            return
        if not self.sums:
            self.sums = tuple(x.new_empty(rows, *x.shape[1:]) for x in found)
        for total, part in zip(self.sums, found, strict=True):
            total[at] = part


def cuts(rows: int, pieces: int) -> list[slice]:
    """`pieces` slices of nearly equal length."""
    ends = [rows * k // pieces for k in range(pieces + 1)]
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
