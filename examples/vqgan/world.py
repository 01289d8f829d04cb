"""What both stages share: their settings, their data, and the SigLIP that judges them."""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch

from examples.common.data import SCENE_WORDS, Pairs, Scenes, scenes, split, split_heldout
from examples.common.towers import Words
from examples.common.training import Batches
from examples.siglip import SigLipRun


def add_shared(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Arguments of both stages."""
    add = parser.add_argument
    add("--judge-steps", type=int, default=150, help="of SigLIP, which judges both stages")
    add("--scenes", type=int, default=4096, help="to learn from in stage two; an eighth to test")
    add("--precision", choices=["bfloat16", "float32"],
        default="bfloat16" if bfloat16_pays() else "float32",
        help="of networks' products in training (default: %(default)s on this CPU)")  # fmt: skip
    return parser


def shared(args: argparse.Namespace) -> argparse.Namespace:
    """Settings of both stages that have no flag, and those of `--quick`."""
    args.judge_batch, args.feature_steps = 256, 200
    args.batch_one, args.batch_two = (12, 4), (48, 16)  # single pictures and scenes of a step
    args.shown = 14  # pictures in a row of a sheet
    if args.quick:
        args.shown = 3
        args.judge_steps, args.judge_batch, args.feature_steps, args.scenes = 4, 32, 3, 64
        args.every, args.batch_one, args.batch_two = 2, (6, 2), (6, 2)
    return args


class Data(NamedTuple):
    """What is seen in training, what choices are made by, and what is looked at once."""

    seen: Pairs
    validation: Pairs
    test: Pairs
    drawn: Scenes
    test_scenes: Pairs
    words: Words


def data(args: argparse.Namespace) -> Data:
    everything = split()[0]
    seen = everything.take(list(range(0, 3317, 16))) if args.quick else everything
    validation, test = split_heldout(30 if args.quick else None)
    new = scenes(args.scenes // 8, args.seed + 1, heldout=True)
    return Data(
        seen, validation, test, scenes(args.scenes, args.seed), Pairs(new.draw(), new.captions),
        Words([*everything.captions, *SCENE_WORDS]),
    )  # fmt: skip


def bfloat16_pays() -> bool:
    """Whether this CPU multiplies bfloat16: training then takes about half the time."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def mixed(args: argparse.Namespace) -> torch.autocast:
    """Products of networks in bfloat16, where `--precision` says so."""
    return torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bfloat16")


def judge_run(world: Data, args: argparse.Namespace) -> SigLipRun:
    """SigLIP as in `examples.siglip`, by our fused loss."""
    settings = argparse.Namespace(
        out=args.stage_one / "siglip", seed=args.seed, device="cpu", steps=args.judge_steps,
        batch_size=args.judge_batch,
    )  # fmt: skip
    pairs = settings.batch_size - settings.batch_size // 4, settings.batch_size // 4
    canvases = scenes(pairs[1] * settings.steps, args.seed)
    batches = Batches(world.seen, canvases, pairs, world.words, args.seed)
    run = SigLipRun("fused", settings, batches, world.validation, -10.0, settings.steps)
    run.label = "SigLIP, the judge"
    return run
