"""The training runs of stage one: the perceptual network, the autoencoder, its critic."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.autoencoders import Autoencoder
from examples.common.data import scenes
from examples.common.reconstruction import usage
from examples.common.supervision import bag_of_words
from examples.common.training import Batches, Run, optimize
from examples.vqgan.losses import FeatureNet, adaptive_weight, critic_loss, perceptual
from examples.vqgan.models import Critic, vqgan
from examples.vqgan.world import Data, mixed

PERCEPTUAL, ADVERSARIAL = 2.0, 0.4  # weights beside the error of pixels
SUPPORT = 5  # captions that have a word, or the perceptual network does not learn it
VARIANTS = {"plain": "plain VQ-VAE", "perceptual": "+ perceptual", "gan": "+ perceptual and GAN"}


class FeaturesRun(Run):
    """The perceptual loss's network learns which words are in the caption."""

    def __init__(self, world: Data, args: argparse.Namespace):
        torch.manual_seed(args.seed)
        net = FeatureNet(len(world.words))
        super().__init__(
            "words, for the perceptual loss", args.out / "words.pt", net,
            torch.optim.AdamW([{"params": net.parameters(), "peak": 3e-3}], weight_decay=0.05),
            args.feature_steps,
            {"steps": args.feature_steps, "seed": args.seed},
        )  # fmt: skip
        self.args = args
        some = tuple(2 * n for n in args.batch_one)
        self.batches = Batches(
            world.seen, scenes(some[1] * self.steps, args.seed + 2), some, world.words,
            args.seed + 2,
        )  # fmt: skip
        support = bag_of_words(world.words(world.seen.captions), len(world.words)).sum(0)
        self.learned = support >= SUPPORT  # (V,)
        common = (support + 0.5) / (len(world.seen.captions) + 1)
        with torch.no_grad():
            net.head.bias.copy_(torch.logit(common))  # begins at how common words are

    def before(self, step: int) -> None:
        images, tokens = self.batches(step)
        self.images = _channels_last(images)
        self.wanted = bag_of_words(tokens, len(self.learned))[:, self.learned]

    def step(self, step: int) -> None:
        with mixed(self.args):
            logits = self.model(self.images)[:, self.learned].float()
        loss = F.binary_cross_entropy_with_logits(logits, self.wanted, reduction="none")
        loss.sum(1).mean().backward()
        optimize(self.optimizer, step, self.steps)
        self.history["loss"].append(loss.detach().sum(1).mean().item())


def _channels_last(images: Tensor) -> Tensor:
    """In [0, 1], from uint8."""
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)


class Pair(nn.Module):
    """What learns in stage one; `critic` may be missing."""

    def __init__(self, autoencoder: Autoencoder, critic: Critic | None):
        super().__init__()
        self.autoencoder, self.critic = autoencoder, critic


class StageOneRun(Run):
    """The trunk learns from pixels alone; the variants go on from it, each with its losses.

    So the critic begins late, as in the paper, and all variants share their first steps.

    Args:
        variant: "trunk" or one of `VARIANTS`.
        trunk: the finished run from which a variant goes on.
        net: whose features the perceptual loss compares.
    """

    def __init__(
        self, variant: str, world: Data, args: argparse.Namespace,
        trunk: StageOneRun | None = None, net: FeatureNet | None = None,
    ):  # fmt: skip
        torch.manual_seed(args.seed)
        model = Pair(
            vqgan(args.quantizer, args.codes, args.steps), Critic() if variant == "gan" else None
        )
        groups = [{"params": model.autoencoder.parameters(), "peak": args.rate}]
        if model.critic is not None:
            own = {"peak": args.critic_rate, "betas": (0.5, 0.99)}
            groups.append({"params": model.critic.parameters(), **own})
        settings = {
            name: getattr(args, name) for name in ("quantizer", "codes", "steps", "trunk", "seed")
        }
        super().__init__(
            VARIANTS.get(variant, "stage one, from pixels alone"),
            args.out / f"{variant}.pt", model,
            torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=1e-4),
            args.steps - args.trunk if trunk else args.trunk, settings,
            ("error", "perplexity", "critic", "weight"),
        )  # fmt: skip
        self.variant, self.trunk, self.net = variant, trunk, net
        self.followed = variant == "trunk"
        self.first, self.total, self.seed = args.trunk if trunk else 0, args.steps, args.seed
        self.late = 0 if args.quantizer == "gumbel" else args.trunk // 4
        self.codes, self.batches, self.args = args.codes, args.batches, args
        self.variance = (world.seen.images[::8].float() / 255).var().item()

    def before(self, step: int) -> None:
        if step == 0 and self.trunk is not None:
            self._go_on()
        step += self.first
        self.images = self.batches(step)[0]
        self.pictures = _channels_last(self.images)
        torch.manual_seed(self.seed * 1_000_003 + step)  # what a quantiser draws

    def _go_on(self) -> None:
        """Takes up the trunk's weights and what its optimiser remembers of them."""
        self.model.autoencoder.load_state_dict(self.trunk.model.autoencoder.state_dict())
        known, own = self.trunk.optimizer.state_dict(), self.optimizer.state_dict()
        own["state"] = {
            i: {k: v.clone() for k, v in x.items()} for i, x in known["state"].items()
        }
        self.optimizer.load_state_dict(own)

    def step(self, step: int) -> None:
        model = self.model.autoencoder
        quantize = self.first + step >= self.late
        with mixed(self.args):
            rebuilt, self.tokens, commitment = model(self.images, quantize)
            error = F.mse_loss(rebuilt, self.pictures)
            loss = error / self.variance  # 1 for the mean colour
            if self.variant in ("perceptual", "gan"):
                loss = loss + PERCEPTUAL * perceptual(self.net, rebuilt, self.pictures)
        (slope,) = torch.autograd.grad(loss, rebuilt)
        if self.variant == "gan":
            slope = slope + self._by_critic(rebuilt, slope)
        ((rebuilt * slope).sum() + commitment).backward()
        optimize(self.optimizer, self.first + step, self.total)
        if hasattr(model.quantizer, "step"):
            model.quantizer.step()  # of a temperature's schedule
        self.history["loss"].append((loss + commitment).item())
        self.history["error"].append(error.item())

    def _by_critic(self, rebuilt: Tensor, slope: Tensor) -> Tensor:
        """The critic learns; returns its weighted gradient in the rebuilt pictures."""
        critic, last = self.model.critic, self.model.autoencoder.decoder[-2].weight
        with mixed(self.args):
            (adversarial,) = torch.autograd.grad(-critic(rebuilt).float().mean(), rebuilt)
            loss = critic_loss(critic(self.pictures).float(), critic(rebuilt.detach()).float())
        weight = adaptive_weight(rebuilt, last, slope, adversarial)
        loss.backward()
        self.history["critic"].append(loss.item())
        self.history["weight"].append(weight.item())
        known = self.done >= self.steps // 5  # before, the critic alone learns
        return ADVERSARIAL * weight * adversarial * known

    def after(self, step: int) -> None:
        if self.tokens is not None:
            found = usage(self.tokens, self.codes)["perplexity"]
            self.history["perplexity"].append([self.first + step + 1, found])

    def note(self) -> str:
        text = f"mse {statistics.mean(self.history['error'][-20:]):.4f}"
        if self.history["perplexity"]:
            text += f"   perplexity {self.history['perplexity'][-1][1]:.0f}"
        return text


def load(folder: Path) -> tuple[Autoencoder, dict]:
    """The trained model in a folder of `examples.vqgan_train`, and its settings."""
    path = folder / "gan.pt"
    if not path.exists():
        raise SystemExit(f"{path} is not there: run `python -m examples.vqgan_train` first")
    state = torch.load(path, map_location="cpu", weights_only=True)
    settings = state["settings"]
    if len(state["history"]["loss"]) < settings["steps"] - settings["trunk"]:
        raise SystemExit(f"{path} is unfinished: `python -m examples.vqgan_train --resume`")
    model = vqgan(settings["quantizer"], settings["codes"])
    known = {k: v for k, v in state["model"].items() if k.startswith("autoencoder.")}
    model.load_state_dict({k.removeprefix("autoencoder."): v for k, v in known.items()})
    return model.eval(), settings
