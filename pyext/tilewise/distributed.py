"""What the processes of a group send each other: blocks of rows that travel, and sums that follow.

Nothing here knows what is computed of them. The engine is torch.distributed: gloo on CPUs, NCCL on
GPUs. All waiting is bounded by the group's timeout, and a failure names who was waited for.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from tilewise._lanes import Lane, Own, Parts

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup

__all__ = ["Peers", "circulate", "gather"]

ROUTES = ("bidir", "shift", "reduce", "gather")
TEXT = 1024  # bytes of what processes tell each other about a difference
LONGEST = 4096  # rows of a block that travel at a time
LONGEST_ON_CPU = 1024  # which computes fewer as fast, and has less memory


class Peers:
    """The processes of a group, by their ranks in it, as seen by one of them.

    Args:
        group: a process group; None is that of all processes.
        user: on whose behalf they exchange something; error messages begin with it.

    Raises:
        RuntimeError: torch.distributed has no process group yet, or the process isn't in this one.
    """

    def __init__(self, group: ProcessGroup | None, user: str):
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"{user}: expected an initialised process group; call "
                "torch.distributed.init_process_group first, or leave world_size at 1"
            )
        self.group = dist.group.WORLD if group is None else group
        self.user = user
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise RuntimeError(f"{user}: this process does not belong to the group")

    def exchange(
        self, sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, Tensor]]
    ) -> Transfer:
        """Begins to send contiguous tensors to peers and to receive others in place.

        Each pair of processes must agree on order and sizes. Empty tensors are left out.
        """
        # Gloo's sender waits until it is told of the receiver: before what this process sends.
        ways = [(dist.irecv, *x) for x in received] + [(dist.isend, *x) for x in sent]
        ways = [way for way in ways if way[2].numel()]
        ranks = [rank for _, rank, _ in ways]
        try:
            works = dist.batch_isend_irecv([
                dist.P2POp(send, x, group=self.group, group_peer=rank) for send, rank, x in ways
            ]) if ways else []
        except RuntimeError as error:
            raise self.lost(ranks, error) from error
        if len(works) != len(ways):  # NCCL has one for all
            return Transfer(self, [(work, ranks) for work in works], ways)
        return Transfer(self, [(w, [r]) for w, r in zip(works, ranks, strict=True)], ways)

    def table(self, x: Tensor) -> Tensor:
        """(W, *x.shape): the tensors of all processes, small and of one shape."""
        out = x.new_empty(self.size, *x.shape)
        out[self.rank] = x
        others = [rank for rank in range(self.size) if rank != self.rank]
        if x.device.type == "cpu":  # each with each, so that a failure has a name
            x = x.contiguous()
            self.exchange([(r, x) for r in others], [(r, out[r]) for r in others]).wait()
        else:
            dist.all_gather(list(out.unbind()), x.contiguous(), group=self.group)
        return out

    def place(self, device: torch.device) -> torch.device:
        """Where to put small numbers: where the group also serves CPUs, no GPU is waited for."""
        serves_cpu = "cpu:" in dist.get_backend_config(self.group)
        return torch.device("cpu") if serves_cpu else device

    def agree(self, rows: int, facts: dict[str, Any], problem: str | None, device) -> list[int]:
        """How many rows each process has, after a look at whether all mean the same.

        Args:
            facts: what must be equal everywhere, by its name.
            problem: what this process found wrong with its own arguments.

        Raises:
            ValueError: in every process, the same: what differs, or whose problem it is.
        """
        where = self.place(device)
        text = "\n".join(f"{name}\t{value}" for name, value in facts.items())
        text = f"\n{problem}" if problem else text
        head = [rows, zlib.crc32(text.encode()), int(problem is not None)]
        table = self.table(torch.tensor(head, device=where)).tolist()
        if any(row[1:] != [table[0][1], 0] for row in table):
            raise ValueError(f"{self.user}: {_differences(self._texts(text, where))}")
        return [row[0] for row in table]

    def _texts(self, text: str, device) -> list[str]:
        data = text.encode()[:TEXT].ljust(TEXT)
        table = self.table(torch.tensor(list(data), dtype=torch.uint8, device=device))
        return [bytes(row).decode(errors="ignore").rstrip(" ") for row in table.tolist()]

    def lost(self, ranks: Sequence[int], error: Exception) -> RuntimeError:
        """The error of a process that waits for others in vain.

        It names those whose connections are closed, or else those who were waited for: they may be
        alive, and wait for a dead one themselves.
        """
        names = ", ".join(str(rank) for rank in self._closed() or sorted(set(ranks)))
        name = getattr(self.group, "group_desc", "") or getattr(self.group, "group_name", "")
        return RuntimeError(
            f"{self.user}: rank {self.rank} lost rank {names} of process group {name!r} "
            f"({self.size} processes) in an exchange: {error}"
        )

    def _closed(self) -> list[int]:
        """Whose connections are closed, where the engine tells: gloo refuses to use them."""
        closed = []
        if "cpu:gloo" in dist.get_backend_config(self.group):
            for rank in range(self.size):
                try:
                    if rank != self.rank:  # nothing is waited for
                        dist.irecv(torch.empty(1), group=self.group, group_src=rank)
                except RuntimeError as error:
                    closed += [rank] if "by peer" in str(error) else []
        return closed


class Transfer:
    """Tensors on their way."""

    def __init__(self, peers: Peers, works: list[tuple[Any, list[int]]], kept: Any):
        self.peers, self.works, self.kept = peers, works, kept

    def wait(self) -> None:
        """Until all have arrived, or RuntimeError: who was lost."""
        for work, ranks in self.works:
            try:
                work.wait()
            except RuntimeError as error:
                raise self.peers.lost(ranks, error) from error
        self.works, self.kept = [], None


def _differences(texts: list[str]) -> str:
    """Of the facts of all processes, or of those that have a problem."""
    problems = [f"rank {r}: {text[1:]}" for r, text in enumerate(texts) if text.startswith("\n")]
    if problems:
        return "; ".join(problems)
    facts = [dict(line.split("\t", 1) for line in text.split("\n")) for text in texts]
    found = []
    for name in dict.fromkeys(name for each in facts for name in each):
        ranks: dict[str, list[str]] = {}
        for rank, each in enumerate(facts):
            ranks.setdefault(each.get(name, "missing"), []).append(str(rank))
        if len(ranks) > 1:
            said = " and ".join(f"{value} in rank {', '.join(r)}" for value, r in ranks.items())
            found.append(f"{name}: expected the same in every process, got {said}")
    return "; ".join(found)


def circulate(
    peers: Peers,
    rows: list[int],
    block: Parts,
    visit: Callable[..., Parts],
    *,
    route: str = "bidir",
    pieces: int = 1,
    whole: bool = False,
    merge: Callable[[Tensor, Tensor], Any] = Tensor.add_,
) -> Parts:
    """Shows each process's block to every process; returns what all of them have for one's own.

    The next block is on its way while the present one is visited, and so are the sums. One's own
    block is visited first, before others arrive; with `pieces` > 1 its first part by halves, one
    first and one after the first round; of a long block a part after each round, while sums come
    home.

    Args:
        peers: the processes.
        rows: how many rows the block of each has; some may have none.
        block: this process's tensors, each (rows[rank], ...).
        visit: `visit(owner, first, *tensors)` is called with each process's block, this one's too,
            by the rank of its owner: by stretches of its rows, of which `first` is the first, in
            any order; whole with "reduce", or with "gather" or `whole` "shift" in one piece.
            Returns new tensors (rows of the stretch, ...), to be summed for the owner; none if
            there is nothing.
        route: "bidir", half of a block goes round the ring in each direction; "shift", the whole
            in one; "reduce", each process's in turn to all (by a broadcast and a reduction);
            "gather", each directly to each, all at once.
        pieces: into how many stretches what visits is cut, so that the sum of one goes on while the
            next is visited.
        whole: whether a long block goes round at once, in place of by 4,096 rows (1,024 on CPUs).
        merge: adds its second argument to its first, in place; with "reduce" it must be a sum.

    Returns:
        What `visit` returned for this process's block, merged over all processes.

    Raises:
        RuntimeError: an exchange failed or timed out; the message names the ranks.

    Cost: for each tensor that travels, and each sum, a process sends W - 1 blocks. Long blocks go
    round in such parts. Memory: some four parts of visitors and of sums at a time, whatever W; with
    "gather", W blocks.
    """
    block = tuple(x.contiguous() for x in block)
    if route == "reduce":
        return _in_turn(peers, rows, block, visit)
    if peers.size == 1:
        return visit(peers.rank, 0, *block)
    rounds = _rounds(peers, rows, pieces, route, max(rows) if whole else _rows_at_a_time(block[0]))
    own = Own(peers.rank, block, len(rounds), halves=pieces > 1)
    for lane in rounds[0]:
        lane.begin(block)
    own.visit(visit)
    before: list[Lane] = []  # whose sums come home
    for lanes, after in zip(rounds, [*rounds[1:], []], strict=True):
        for hop in range(lanes[0].hops):
            for i, lane in enumerate(lanes):
                if after and hop == lane.hops - 1:
                    after[i].begin(block)  # on its way meanwhile
                lane.visit(visit, merge)
                if before and hop == 0:
                    before[i].bring_home(own.sums, merge)
        own.visit(visit)
        before = lanes
    for lane in before:
        lane.bring_home(own.sums, merge)
    return own.sums


def _rows_at_a_time(x: Tensor) -> int:
    return LONGEST_ON_CPU if x.device.type == "cpu" else LONGEST


def _rounds(
    peers: Peers, rows: list[int], pieces: int, route: str, longest: int
) -> list[list[Lane]]:
    """Lanes that are used at the same time, and one after the other."""
    size = peers.size
    if route == "gather":
        return [[Lane(peers, rows, pieces, distance, 1) for distance in range(1, size)]]
    steps = (1, -1) if route == "bidir" else (1,)
    ways = len(steps)
    count = max(1, -(-max(rows) // max(1, longest)))
    each = max(1, pieces // (ways * count))
    return [
        [
            Lane(peers, rows, each, step, size - 1, ways * i + k, ways * count)
            for k, step in enumerate(steps)
        ]
        for i in range(count)
    ]


def _in_turn(peers: Peers, rows: list[int], block: Parts, visit: Callable[..., Parts]) -> Parts:
    """circulate's "reduce"."""
    own: Parts = ()
    coming = _broadcast(peers, rows, block, 0)
    sums: list[Transfer] = []
    for owner in range(peers.size):
        tensors, transfer = coming
        if owner + 1 < peers.size:
            coming = _broadcast(peers, rows, block, owner + 1)
        transfer.wait()
        parts = tuple(x.contiguous() for x in visit(owner, 0, *tensors))
        for earlier in sums:
            earlier.wait()
        sums = [_started(peers, owner, dist.reduce, x, group_dst=owner) for x in parts]
        own = parts if owner == peers.rank else own
    for transfer in sums:
        transfer.wait()
    return own


def _broadcast(peers: Peers, rows: list[int], block: Parts, owner: int) -> tuple[Parts, Transfer]:
    if owner != peers.rank:
        block = tuple(x.new_empty(rows[owner], *x.shape[1:]) for x in block)
    started = [_started(peers, owner, dist.broadcast, x, group_src=owner) for x in block]
    return block, Transfer(peers, [work for each in started for work in each.works], block)


def _started(peers: Peers, owner: int, collective: Callable, x: Tensor, **which: int) -> Transfer:
    if not x.numel():
        return Transfer(peers, [], x)
    try:
        work = collective(x, group=peers.group, async_op=True, **which)
    except RuntimeError as error:
        raise peers.lost([owner], error) from error
    return Transfer(peers, [(work, [owner])], x)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, peers: Peers, rows: list[int]) -> Tensor:
        ctx.peers, ctx.rows = peers, rows
        out = x.new_empty(sum(rows), *x.shape[1:])
        parts = out.split(rows)
        mine = parts[peers.rank].copy_(x)
        others = [rank for rank in range(peers.size) if rank != peers.rank]
        peers.exchange([(r, mine) for r in others], [(r, parts[r]) for r in others]).wait()
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        peers, rows = ctx.peers, ctx.rows
        grads = [x.contiguous() for x in grad.split(rows)]
        others = [rank for rank in range(peers.size) if rank != peers.rank]
        parts = {rank: torch.empty_like(grads[peers.rank]) for rank in others}
        peers.exchange([(r, grads[r]) for r in others], [*parts.items()]).wait()
        parts[peers.rank] = grads[peers.rank]
        return sum(parts[rank] for rank in range(peers.size)), None, None


def gather(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The rows of all processes, in the order of their ranks, with gradients.

    As `torch.cat(torch.distributed.nn.all_gather(x))`, but the processes may have different numbers
    of rows.

    Args:
        x: (rows, ...), the same shape beyond the rows and the same dtype in every process.
        group: the processes; None is all of them.

    Returns:
        (rows of all processes, ...). Its backward sums what the processes have for one's own rows,
        so all of them must run it.

    Raises:
        ValueError: in every process, if shapes or dtypes differ.
        RuntimeError: an exchange failed or timed out; the message names the ranks.

    Cost: O(W * rows) memory; a process sends its rows W - 1 times, and as many in backward.
    """
    peers = Peers(group, "tilewise.distributed.gather")
    facts = {"shape beyond the rows": tuple(x.shape[1:]), "dtype": x.dtype}
    rows = peers.agree(len(x), facts, None, x.device)
    return _Gather.apply(x, peers, rows)
