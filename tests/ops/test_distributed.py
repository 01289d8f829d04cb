"""tilewise.distributed: what goes round comes home, on every route."""

import contextlib

import pytest
import torch
import torch.distributed as dist

import tilewise as tw
from tests.common.processes import OF_PROCESSES, WORLDS, Failed, processes
from tilewise import distributed
from tilewise.distributed import ROUTES, Peers, circulate
from tilewise.nn.losses import _ring

pytestmark = OF_PROCESSES

ROWS = [4, 0, 7, 3]


def block(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that say whose they are, and where."""
    place = torch.arange(ROWS[rank])
    return torch.stack([place + 100.0 * rank] * 2, 1), place + 1000 * rank


@contextlib.contextmanager
def long(rows: int, piece: int = _ring.PIECE):
    """Blocks of more rows go round in parts; pieces of so many are worth a call."""
    before = distributed.LONGEST, distributed.LONGEST_ON_CPU, _ring.PIECE
    distributed.LONGEST = distributed.LONGEST_ON_CPU = rows
    _ring.PIECE = piece
    try:
        yield
    finally:
        distributed.LONGEST, distributed.LONGEST_ON_CPU, _ring.PIECE = before


def circulated(route: str, pieces: int, longest: int):
    """In a process: who was seen, and what came home."""
    with long(longest):
        return _circulated(route, pieces)


def _circulated(route: str, pieces: int):
    peers = Peers(None, "test")
    rows = ROWS[: peers.size]
    seen: dict[int, list[torch.Tensor]] = {rank: [] for rank in range(peers.size)}

    def visit(owner, first, values, places):
        assert torch.equal(values[:, 0].long() % 100, places % 1000)
        assert torch.equal(places % 1000, first + torch.arange(len(places)))
        seen[owner].append(places)
        return values * 10**peers.rank, places[:, None].double()

    home = circulate(peers, rows, block(peers.rank), visit, route=route, pieces=pieces)
    nothing = circulate(peers, rows, block(peers.rank), lambda *_: (), route=route)
    return {rank: torch.cat(x) for rank, x in seen.items()}, home, nothing


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("world", WORLDS)
def test_every_block_visits_everyone_and_sums_come_home(world, route):
    for pieces, longest in ((1, 4096), (3, 4096), (1, 2), (3, 3)):
        found = processes().run(world, circulated, route, pieces, longest)
        for rank, (seen, home, nothing) in enumerate(found):
            assert nothing == ()
            for owner, places in seen.items():
                assert torch.equal(places.sort().values, block(owner)[1])  # once, whoever's
            values, places = block(rank)
            assert torch.equal(home[0], values * sum(10**r for r in range(world)))
            assert torch.equal(home[1], world * places[:, None].double())


def merged(route: str):
    peers = Peers(None, "test")

    def keep_larger(largest, other):
        torch.maximum(largest, other, out=largest)

    def visit(owner, first, values, _):
        return (values + (owner * 7 + peers.rank * 3) % 5,)

    return circulate(
        peers, ROWS[: peers.size], block(peers.rank), visit, route=route, merge=keep_larger
    )


def test_merges_need_not_be_sums():
    for route in ("bidir", "shift", "gather"):
        for rank, (home,) in enumerate(processes().run(4, merged, route)):
            most = max((rank * 7 + r * 3) % 5 for r in range(4))
            assert torch.equal(home, block(rank)[0] + most)


def seen_whole():
    """Each visitor's rows, in one call."""
    peers, calls = Peers(None, "test"), []

    def visit(owner, first, values, _):
        calls.append((owner, len(values)))
        return ()

    with long(2):
        rows = ROWS[: peers.size]
        circulate(peers, rows, block(peers.rank), visit, route="shift", whole=True)
    return calls


def test_whole_blocks_are_seen_at_once():
    for calls in processes().run(4, seen_whole):
        assert sorted(calls) == [*enumerate(ROWS)]


def seen_in_order():
    """Whose stretches, of which rows."""
    peers, calls = Peers(None, "test"), []

    def visit(owner, first, values, _):
        calls.append((owner, first, len(values)))
        return ()

    circulate(peers, ROWS[: peers.size], block(peers.rank), visit, pieces=2)
    return calls


def test_halves_of_the_own_block_come_first_and_last():
    for rank, calls in enumerate(processes().run(4, seen_in_order)):
        half = ROWS[rank] // 2
        assert calls[0] == (rank, 0, half) and calls[-1] == (rank, half, ROWS[rank] - half)
        assert rank not in [owner for owner, *_ in calls[1:-1]]


def first_of_each_exchange():
    found, begin = [], dist.batch_isend_irecv

    def seen(ways):
        found.append(ways[0].op)
        return begin(ways)

    dist.batch_isend_irecv = seen
    try:
        tw.distributed.gather(torch.ones(3))
    finally:
        dist.batch_isend_irecv = begin
    return [op is dist.irecv for op in found]


def test_receives_are_posted_before_data_are_sent():
    """Else a slow link's data stand before the word that gloo's other sender waits for."""
    for found in processes().run(2, first_of_each_exchange):
        assert found and all(found)


def losses_of_long_blocks(longest: int, piece: int):
    """Loss and gradients of this process's pairs, by four losses."""
    group, found, rows = dist.group.WORLD, [], (7, 0, 4)[dist.get_rank()]
    generator = torch.Generator().manual_seed(dist.get_rank())
    with long(longest, piece):
        for loss in (
            lambda x, y: tw.nn.SigLipLoss(rank=dist.get_rank(), world_size=dist.get_world_size())(
                x, y, torch.tensor(5.0), torch.tensor(-2.0)),
            lambda x, y: tw.nn.ClipLoss(rank=dist.get_rank(), world_size=dist.get_world_size(),
                                        gather_with_grad=True)(x, y, torch.tensor(5.0)),
            lambda x, y: tw.nn.InfoNCELoss(0.2, group=group)(x, y),
            lambda x, y: tw.nn.InfoNCELoss(0.2, label_smoothing=0.1, group=group)(x, y),
        ):  # fmt: skip
            x, y = (torch.randn(rows, 5, generator=generator).requires_grad_() for _ in range(2))
            value = loss(x, y)
            found += [value.detach(), *torch.autograd.grad(value, (x, y))]
    return found


def test_losses_do_not_depend_on_how_blocks_travel():
    ways = ((4096, 512), (2, 512), (4096, 1), (2, 1))  # whole, in parts, in pieces
    found = [processes().run(3, losses_of_long_blocks, *way) for way in ways]
    for of_process in zip(*found, strict=True):
        for whole, *others in zip(*of_process, strict=True):
            for x in others:
                torch.testing.assert_close(x, whole, rtol=1e-5, atol=1e-6)


def gathered(with_gradient: bool):
    x = block(dist.get_rank())[0].requires_grad_(with_gradient)
    out = tw.distributed.gather(x)
    if with_gradient:
        (out.square().sum() * (dist.get_rank() + 1)).backward()
    return out.detach(), x.grad


def test_gather():
    everything = torch.cat([block(rank)[0] for rank in range(4)])
    for rank, (out, grad) in enumerate(processes().run(4, gathered, True)):
        assert torch.equal(out, everything)
        torch.testing.assert_close(grad, 2 * block(rank)[0] * (1 + 2 + 3 + 4))
    assert all(torch.equal(x, everything) for x, _ in processes().run(4, gathered, False))


def other_shape():
    tw.distributed.gather(torch.ones(2, 3 + dist.get_rank()))


def test_gather_names_what_differs():
    with pytest.raises(Failed, match="gather: shape beyond the rows: .*got .3,. in rank 0 and"):
        processes().run(2, other_shape)


def late(seconds: float):
    """In a process: what it is told when another one does not come."""
    if dist.get_rank() == 1:
        import time

        time.sleep(seconds)
        return ""
    try:
        tw.distributed.gather(torch.ones(3))
    except RuntimeError as error:
        return str(error)


def test_a_late_process_is_named():
    found = processes().run(3, late, 2.0, group=1)
    for rank in (0, 2):
        assert f"tilewise.distributed.gather: rank {rank} lost rank" in found[rank]
        assert "process group" in found[rank] and "(3 processes)" in found[rank]
    assert any("lost rank 1" in x for x in found)


def test_needs_a_group():
    with pytest.raises(RuntimeError, match="gather: expected an initialised process group"):
        tw.distributed.gather(torch.ones(3))
