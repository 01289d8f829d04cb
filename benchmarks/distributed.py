"""Losses of several processes: memory of each, bytes sent, time over a slow link, and a model.

    python -m benchmarks.distributed           # the tables of docs/scaling.md: a few minutes
    python -m benchmarks.distributed --link    # over shaped links between network namespaces: root

Each process computes on one thread. Where memory is measured it gives freed memory back at once, so
that a peak is of what is alive. A link's rate is chosen so that sending takes as long as the
products do, which is where overlap gains most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F

import tilewise as tw
from benchmarks.baselines.peers import open_clip_losses
from benchmarks.harness.measure import ROOT, peak_here
from benchmarks.netns import Network
from tilewise.distributed import LONGEST, LONGEST_ON_CPU

ANSWER = "result: "
OPTIONS = {"local_loss": True, "gather_with_grad": True}  # what large runs of CLIP use
LOSSES: dict[str, tuple[str, str, dict]] = {
    "SigLIP, ring": ("ours", "SigLipLoss", {}),
    "SigLIP, gather": ("ours", "SigLipLoss", {"dist_impl": "gather"}),
    "SigLIP, open_clip": ("open_clip", "SigLipLoss", {}),
    "CLIP, ring": ("ours", "ClipLoss", OPTIONS),
    "CLIP, open_clip": ("open_clip", "ClipLoss", OPTIONS),
}


# ---- the model


def products(loss: str, world: int, rows: int, dim: int) -> float:
    """Floating-point operations of a process: 3 or 4 products with all texts."""
    return 2 * (4 if loss.startswith("CLIP") else 3) * rows * (world * rows) * dim


def bytes_sent(loss: str, world: int, rows: int, dim: int, size: int = 4) -> int:
    """By one process in one step: texts of `size` bytes a number, gradients of 4.

    CLIP's texts go round twice; each has a largest logit and a sum, in float64, that is brought
    home in the first round and shown in the second.
    """
    if loss.startswith("CLIP"):
        return (world - 1) * rows * (dim * (2 * size + 4) + 2 * 16)
    return (world - 1) * rows * dim * (size + 4)


def seconds(
    loss: str, world: int, rows: int, dim: int, *, flops: float, rate: float, size: int = 4,
    longest: int = LONGEST,
) -> float:
    """Of a step: in each round the longer of products and sending.

    CLIP's first round, a quarter of the products, ends with the last visitor's sums, which every
    gradient needs.
    """
    computing = products(loss, world, rows, dim) / flops
    sending = bytes_sent(loss, world, rows, dim, size) / rate
    if not loss.startswith("CLIP"):
        return max(computing, sending)
    texts = (world - 1) * rows * dim * size / rate
    last = min(1, longest / rows) / 2 / world if world > 1 else 0  # of the sums
    sums, gradients = computing / 4, computing * 3 / 4
    return max(sums, texts + last * sums) + max(gradients, sending - texts)


# ---- what a process does


def prepare(loss: str, rows: int, dim: int) -> Callable[[], torch.Tensor]:
    """A step of the loss on this process's features."""
    package, module, options = LOSSES[loss]
    where = tw.nn if package == "ours" else open_clip_losses()
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    step = getattr(where, module)(**options, **place)
    generator = torch.Generator().manual_seed(dist.get_rank())
    image, text = (
        F.normalize(torch.randn(rows, dim, generator=generator), dim=1).requires_grad_()
        for _ in range(2)
    )
    scalars = [torch.tensor(x, requires_grad=True) for x in (10.0, -10.0)]
    if module == "ClipLoss":
        scalars.pop()

    def call():
        value = step(image, text, *scalars)
        value.backward()
        image.grad = text.grad = None
        return value

    return call


def peak(loss: str, rows: int, dim: int) -> int:
    """Bytes that a step adds at its peak, gradients included."""
    prepare(loss, 64, dim)()  # loads libraries
    call = prepare(loss, rows, dim)
    dist.barrier()
    return peak_here(call)


def count_sent(loss: str, rows: int, dim: int) -> int:
    """Bytes that a step hands to the process group."""
    call, sent, way = prepare(loss, rows, dim), 0, dist.P2POp

    def counted(send, x, *arguments, **keywords):
        nonlocal sent
        sent += x.numel() * x.element_size() if send is dist.isend else 0
        return way(send, x, *arguments, **keywords)

    dist.P2POp = counted
    try:
        call()
    finally:
        dist.P2POp = way
    return sent


def timed(call: Callable[[], object], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        dist.barrier()
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


def step_times(loss: str, rows: int, dim: int, rounds: int) -> dict[str, list[float]]:
    """Of a step, of its products alone, of sending its bytes alone, and of both beside each other.

    The last wait for nothing of each other: what they lose, they lose to the machine.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    call = prepare(loss, rows, dim)
    image, *text = (F.normalize(torch.randn(rows, dim), dim=1) for _ in range(1 + world))

    def compute():
        op = tw.clip_loss if loss.startswith("CLIP") else tw.sigmoid_loss
        for other in text:
            scale = torch.tensor(10.0, requires_grad=True)
            op(image.requires_grad_(), other.requires_grad_(), scale).backward()

    sent = torch.ones(bytes_sent(loss, world, rows, dim) // 4)
    came = torch.empty_like(sent)

    def send(meanwhile: Callable[[], object] = lambda: None):
        way = [
            dist.P2POp(dist.isend, sent, (rank + 1) % world),
            dist.P2POp(dist.irecv, came, (rank - 1) % world),
        ]
        works = dist.batch_isend_irecv(way) if world > 1 else []
        meanwhile()
        for work in works:
            work.wait()

    call()  # warms up
    calls = {"step": call, "products": compute, "sending": send, "both": lambda: send(compute)}
    return {name: timed(each, rounds) for name, each in calls.items()}


JOBS = {"peak": peak, "sent": count_sent, "times": step_times}


def work(rank: int, world: int, address: str, jobs: list[list]) -> None:
    """A process: its answer to each job, as a line of JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    for name, arguments in jobs:
        print(ANSWER + json.dumps(JOBS[name](**arguments)), flush=True)
    dist.barrier()
    dist.destroy_process_group()


# ---- starting them


def answers(
    world: int, jobs: list[tuple[str, dict]], network: Network | None = None
) -> list[list]:
    """Of each job, the answers of all processes."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{folder}/rendezvous" if network is None else network.address
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if network:
            environment["GLOO_SOCKET_IFNAME"] = network.interface
        if any(name == "peak" for name, _ in jobs):
            environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
        children = []
        for rank in range(world):
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.distributed", "--work",
                       json.dumps([rank, world, address, jobs])]  # fmt: skip
            command = network.inside(rank) + command if network else command
            children.append(subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
            ))
        found = []
        for child in children:
            text, _ = child.communicate(timeout=1800)
            assert child.returncode == 0, f"a process ended with {child.returncode}"
            lines = [x.removeprefix(ANSWER) for x in text.splitlines() if x.startswith(ANSWER)]
            found.append([json.loads(line) for line in lines])
    return [list(each) for each in zip(*found, strict=True)]


def table(title: str, head: list[str], rows: list[list]) -> None:
    print(f"\n{title}\n")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(x) for x in row) + " |")


def memory(worlds: list[int], rows: int, total: int, dim: int, names: list[str]) -> None:
    """Peak memory of a process, for a fixed number of rows of each, and of all."""
    for title, of in (
        (f"MB at the peak of a step, {rows} rows a process, D = {dim}", lambda world: rows),
        (f"the same, {total} rows in all", lambda world: total // world),
    ):
        found = {}
        for world in worlds:
            jobs = [("peak", {"loss": n, "rows": of(world), "dim": dim}) for n in names]
            for name, peaks in zip(names, answers(world, jobs), strict=True):
                found[name, world] = f"{max(peaks) / 1e6:.1f}"
        head = ["", *(f"W = {world}" for world in worlds)]
        table(title, head, [[n, *(found[n, w] for w in worlds)] for n in names])


def traffic(worlds: list[int], rows: int, dim: int) -> None:
    """Bytes that a process sends, beside the model's."""
    names = [name for name in LOSSES if "open_clip" not in name]
    lines = []
    for world in worlds:
        jobs = [("sent", {"loss": name, "rows": rows, "dim": dim}) for name in names]
        for name, sent in zip(names, answers(world, jobs), strict=True):
            model = bytes_sent(name, world, rows, dim)
            lines.append([name, world, sent[0], model, sent[0] - model])
    table(f"bytes sent by a process, {rows} rows, D = {dim}, float32",
          ["", "W", "counted", "model", "more"], lines)  # fmt: skip


def link(worlds: list[int], rows: int, dim: int, rounds: int) -> None:
    """A step over links that take as long as the products."""
    for loss in ("SigLIP, ring", "CLIP, ring"):
        job = ("times", {"loss": loss, "rows": rows, "dim": dim, "rounds": rounds})
        lines = []
        for world in worlds:
            (free,) = answers(world, [job])
            computing = max(min(x["products"]) for x in free)
            rate = bytes_sent(loss, world, rows, dim) / computing
            with Network(world, rate) as network:
                (found,) = answers(world, [job], network)
            step, alone, sending, both = (
                max(min(x[name]) for x in found) for name in ("step", "products", "sending", "both")
            )
            flops = products(loss, world, rows, dim) / alone
            model = seconds(
                loss, world, rows, dim, flops=flops, rate=rate, longest=LONGEST_ON_CPU
            )
            lines.append([
                world, f"{8e-6 * rate:.0f} Mbit/s",
                *(f"{1e3 * x:.0f}" for x in (alone, sending, both, step, model)),
                f"{step / max(alone, sending):.2f}", f"{step / both:.2f}",
            ])  # fmt: skip
        table(f"{loss}: ms, {rows} rows a process, D = {dim}",
              ["W", "link", "products alone", "sending alone", "both, independent", "step", "model",
               "step / longer", "step / both"], lines)  # fmt: skip


def extrapolate(flops: float, rate: float, dim: int, size: int) -> None:
    """The model for a batch of 2^20 on many devices."""
    lines = []
    for world in (8, 64, 256, 1024):
        rows = 2**20 // world
        for loss in ("SigLIP", "CLIP"):
            computing = products(loss, world, rows, dim) / flops
            sent = bytes_sent(loss, world, rows, dim, size)
            total = seconds(loss, world, rows, dim, flops=flops, rate=rate, size=size)
            gathered = world * rows * dim * 2 * size
            ring = dim * (rows * (2 * size + 2 * 4) + min(rows, LONGEST) * (4 * size + 4 * 4))
            lines.append([
                loss, world, rows, f"{1e3 * computing:.0f}", f"{sent / 1e9:.1f}",
                f"{1e3 * sent / rate:.0f}", f"{1e3 * total:.0f}", f"{ring / 1e6:.0f}",
                f"{gathered / 1e6:.0f}",
            ])  # fmt: skip
    table(f"model: 2^20 pairs, D = {dim}, {size} bytes a number, {flops / 1e12:.0f} Tflop/s, "
          f"{rate / 1e9:.0f} GB/s a device",
          ["", "W", "rows", "products, ms", "sent, GB", "sending, ms", "step, ms", "ring, MB",
           "gathered, MB"], lines)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--link", action="store_true", help="over shaped links alone")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=2048, help="of each process")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=[*LOSSES], metavar="LOSS",
                        help="whose memory is measured")  # fmt: skip
    args = parser.parse_args()
    if args.work:
        return work(*json.loads(args.work))
    if args.link:
        return link([w for w in args.worlds if w > 1], args.rows, args.dim, args.rounds)
    memory(args.worlds, args.rows, 2 * args.rows, args.dim, args.losses)
    traffic([w for w in args.worlds if w > 1], args.rows, args.dim)
    extrapolate(flops=300e12, rate=50e9, dim=1024, size=2)


if __name__ == "__main__":
    main()
