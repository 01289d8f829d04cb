"""One run of SigLIP on pairs of a picture and a caption, as the smaller examples compare them.

    model = TwoTowers(ImageTower(), TextTower(len(words)))
    run = PairRun("plain", args.out / "plain.pt", model, batches, validation, args.steps)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from examples.common.data import Pairs
from examples.common.retrieval import recall
from examples.common.supervision import CONTRASTS, TowerRun
from examples.common.towers import TwoTowers, score
from examples.common.training import Batches

SIGLIP = CONTRASTS["SigLIP"]


class PairRun(TowerRun):
    """A TowerRun that follows the two scalars, and the recall on validation pairs."""

    def __init__(self, label: str, path: Path, model: TwoTowers, batches: Batches,
                 validation: Pairs, steps: int, loss: Callable = SIGLIP["fused"],
                 device: str = "cpu"):  # fmt: skip
        settings = {"batch": batches.singles, "seed": batches.seed,
                    "pairs": len(batches.train.captions)}  # fmt: skip
        super().__init__(label, path, model, loss, batches, steps, settings, device=device)
        self.history |= {"scale": [], "bias": [], "recall": []}
        self.validation = validation

    def before(self, step: int) -> None:
        super().before(step)
        torch.manual_seed(self.batches.seed * 1_000_003 + step)  # of patches that are dropped

    def after(self, step: int) -> None:
        self.history["scale"].append(self.model.log_scale.exp().item())
        self.history["bias"].append(self.model.logit_bias.item())

    def evaluate(self) -> None:
        found = recall(score(self.model, self.validation, self.batches.words))
        self.history["recall"].append([self.done, *found])

    def note(self) -> str:
        found = self.history["recall"]
        return super().note() + (f"   recall@1 {100 * found[-1][1]:.0f} %" if found else "")
