"""Gradient estimators side by side: bias, variance, cost, a bandit, and a VAE's expectation.

    python -m examples.estimators             # a minute or two on two cores
    python -m examples.estimators --quick     # a look at every stage

1. A function of two categorical variables whose exact gradient is a sum of 25 terms: how far each
   estimator is off, by the number of samples and by the temperature.
2. What a sample costs, in time and memory, where f is a network.
3. A bandit, whose reward has no slope: the score function with each of its baselines.
4. A VAE's expectation over its latents, Gaussian or categorical, on digits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

import tilewise as tw
from examples import estimators_report
from examples.common import estimator_cost, report
from examples.common.data import split_digits
from examples.common.training import arguments, conduct
from tilewise.estimators import Categorical, Gaussian, MovingAverage, gradient

LOO = {"baseline": "leave_one_out"}
KINDS: dict[str, tuple[str, dict]] = {
    "score function": ("score_function", {}),
    "leave-one-out": ("score_function", LOO),
    "REBAR": ("rebar", {}),
    "straight-through": ("straight_through", {}),
    "ReinMax": ("reinmax", {}),
    "Gumbel-softmax": ("gumbel_softmax", {}),
    "Gumbel-softmax, hard": ("gumbel_softmax", {"hard": True}),
    "Gumbel-Rao": ("gumbel_rao", {}),
}
COUNTS = (1, 2, 4, 8, 16, 32)
TAUS = (0.1, 0.2, 0.5, 1.0, 2.0)

# ---- 1. a sum that is known

WEIGHTS = torch.tensor([[0.6, -1.0, 1.4, 0.2, -0.3], [1.0, 0.0, -0.5, 0.3, 0.8]])
LOGITS = torch.tensor([[0.5, -1.0, 0.3, 0.0, 0.2], [0.0, 0.4, -0.2, -0.8, 0.1]])


def curved(y: Tensor) -> Tensor:
    """Of (S, B, 2, 5)."""
    total = (y * WEIGHTS.to(y)).sum((-2, -1))
    return torch.sin(2 * total) + total.exp() / 2


def errors(kind: str, rows: int, truth: Tensor, device: str = "cpu", **options) -> dict:
    """Of `rows` independent estimates, relative to the length of the gradient."""
    name, own = KINDS[kind]
    many = Categorical(LOGITS.to(device).expand(rows, *LOGITS.shape))
    found = gradient(curved, many, name, seed=0, **{**own, **options}).logits.double().cpu()
    length, mean = truth.norm(), found.mean(0)
    variance = found.var(0).sum()
    bias = ((mean - truth).square().sum() - variance / rows).clamp(min=0).sqrt()
    return {
        "bias": float(bias / length), "spread": float(variance.sqrt() / length),
        "error": float((bias**2 + variance).sqrt() / length),
        "chance": float((variance / rows).sqrt() / length),
        "mean": float(mean[0, 0]), "mean_error": float(2 * found[:, 0, 0].std() / rows**0.5),
    }  # fmt: skip


def known_sum(rows: int, device: str, task: Callable[[], None]) -> dict:
    truth = gradient(curved, Categorical(LOGITS[None].double()), "exact").logits[0]
    counts: dict[str, list] = {}
    taus: dict[str, list] = {}
    for kind, (name, own) in KINDS.items():
        least = 2 if own == LOO else 1
        counts[kind] = [
            [n, errors(kind, max(rows * 2 // (1 + n), 200), truth, device, num_samples=n)]
            for n in COUNTS if n >= least
        ]
        if name != "score_function":
            taus[kind] = [[tau, errors(kind, rows, truth, device, tau=tau)] for tau in TAUS]
        task()
    return {"counts": counts, "taus": taus, "truth": float(truth[0, 0])}


# ---- 3. a bandit

PULLS = {
    "score function": lambda rows: {},
    "moving average": lambda rows: {"baseline": MovingAverage(0.95).to(rows.device)},
    "learned": lambda rows: {"baseline": rows.new_zeros(len(rows)).requires_grad_()},
    "leave-one-out": lambda rows: {"num_samples": 2, **LOO},  # in half as many steps
}


def bandit(kind: str, pulls: int, rows: int, device: str = "cpu") -> list[float]:
    """How often the best of ten arms is pulled, by `rows` bandits that learn beside each other.

    Arm k pays N(m_k, 1) with m_k from N(4, 1): far from 0, which a baseline takes away.
    """
    torch.manual_seed(0)
    means = 4 + torch.randn(rows, 10).to(device)
    logits = torch.zeros(rows, 10, device=device, requires_grad=True)
    options = PULLS[kind](means)
    samples = options.get("num_samples", 1)
    learned = [x for x in options.values() if isinstance(x, Tensor)]
    optimizer = torch.optim.SGD([{"params": [logits], "lr": 0.2 * samples},
                                 *({"params": [x], "lr": 0.1} for x in learned)])  # fmt: skip

    def loss(arm: Tensor) -> Tensor:  # (S, rows, 10) -> (S, rows)
        return -(arm * (means + torch.randn(arm.shape).to(device))).sum(-1)

    found = []
    best = F.one_hot(means.argmax(-1), 10)
    for _ in range(pulls // samples):
        found += [float((torch.softmax(logits.detach(), -1) * best).sum(-1).mean())] * samples
        optimizer.zero_grad()
        tw.estimators.score_function(loss, Categorical(logits), **options).sum().backward()
        optimizer.step()
    return found


# ---- 4. the expectation of a VAE

VARIABLES, CATEGORIES, LATENTS, PIXELS = 8, 8, 16, 196
VAES: dict[str, tuple[str, dict]] = {
    "Gaussian, reparameterised": ("reparameterized", {}),
    "Gaussian, leave-one-out": ("score_function", LOO),
    "categories, leave-one-out": ("score_function", LOO),
    "categories, straight-through": ("straight_through", {}),
    "categories, ReinMax": ("reinmax", {}),
    "categories, Gumbel-softmax": ("gumbel_softmax", {"tau": 0.7}),
    "categories, REBAR": ("rebar", {}),
}


class Vae(nn.Module):
    """Binary pixels (B, 196); latents are 16 Gaussians, or 8 variables of 8 categories."""

    def __init__(self, gaussian: bool):
        super().__init__()
        self.gaussian = gaussian
        size = LATENTS if gaussian else VARIABLES * CATEGORIES
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS, 128), nn.ReLU(), nn.Linear(128, 2 * size if gaussian else size)
        )
        self.decoder = nn.Sequential(nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, PIXELS))

    def latents(self, x: Tensor) -> tuple[Gaussian | Categorical, Tensor]:
        """Their distribution given x, and its divergence (B,) from the prior."""
        out = self.encoder(x)
        if self.gaussian:
            mean, logvar = out.chunk(2, -1)
            return Gaussian(mean, logvar), tw.gaussian_sample(mean, logvar).kl
        logits = out.view(-1, VARIABLES, CATEGORIES)
        logs = F.log_softmax(logits, -1)
        entropy = -(logs.exp() * logs).sum((-2, -1))
        return Categorical(logits), VARIABLES * torch.log(torch.tensor(CATEGORIES)) - entropy

    def loss(self, x: Tensor, name: str, samples: int, **options) -> Tensor:
        """The mean negative ELBO, with the estimator's gradient."""
        latents, divergence = self.latents(x)

        def error(z: Tensor) -> Tensor:  # (S, B, ...) -> (S, B), in nats
            logits = self.decoder(z if self.gaussian else z.flatten(-2))
            pixels = x.expand_as(logits)
            return F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum(-1)

        estimator = getattr(tw.estimators, name)
        return (estimator(error, latents, samples, **options) + divergence).mean()


def vae(kind: str, seed: int, args) -> list[list[float]]:
    """[step, negative ELBO of held-out digits in nats] along the way; one-hot latents, whatever
    training relaxed."""
    seen, heldout = (
        (F.avg_pool2d(x.images.float() / 255, 2).flatten(1) > 0.4).float() for x in split_digits()
    )
    seen, heldout = seen.to(args.device), heldout.to(args.device)
    torch.manual_seed(seed)
    model = Vae(kind.startswith("Gaussian")).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    name, options = VAES[kind]
    found = []
    for step in range(args.steps + 1):
        if step % args.every == 0 or step == args.steps:
            with torch.no_grad():
                found.append([step, model.loss(heldout, "score_function", 4, seed=0).item()])
        x = seen[torch.randint(len(seen), (100,))]
        optimizer.zero_grad()
        model.loss(x, name, args.samples, **options).backward()
        optimizer.step()
    return found


# ---- all of it


def run(args, bars: Progress) -> dict:
    def task(label: str, total: int) -> Callable[[], None]:
        number = bars.add_task(label, total=total, note="")
        return lambda: bars.update(number, advance=1)

    found: dict = {"known": known_sum(args.rows, args.device, task("a known sum", len(KINDS)))}
    done = task("bandit", len(PULLS))
    found["bandit"] = {}
    for kind in PULLS:
        found["bandit"][kind] = bandit(kind, args.pulls, args.bandits, args.device)
        done()
    done = task("VAE", len(VAES) * args.seeds)
    found["vae"] = {kind: [] for kind in VAES}
    for seed in range(args.seed, args.seed + args.seeds):
        for kind, curves in found["vae"].items():
            curves.append(vae(kind, seed, args))
            done()
    done = task("cost", 1)
    found["cost"] = estimator_cost.measure(KINDS, args.measure, args.device)
    done()
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, Path("out/estimators"), every=25, resumes=False, on_device=True)
    add = parser.add_argument
    add("--rows", type=int, default=4000, help="independent estimates of the known sum")
    add("--pulls", type=int, default=600, help="of each bandit")
    add("--bandits", type=int, default=200, help="that learn beside each other")
    add("--steps", type=int, default=250, help="of training each VAE")
    add("--samples", type=int, default=4, help="of the VAE's latents in a step")
    add("--measure", type=float, default=3.0, help="seconds for timing")
    add("--seeds", type=int, default=3, help="of the VAEs, from --seed on")
    args = parser.parse_args(argv)
    if args.quick:
        args.rows, args.pulls, args.bandits, args.steps, args.seeds = 400, 60, 20, 30, 2
        args.every, args.measure = 15, 0.2
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    console, found = conduct("Gradient estimators", args, run)
    estimators_report.tables(console, found)
    estimators_report.known(found["known"], args.out / "variance.png")
    estimators_report.uses(found, args.out / "uses.png")
    value = estimators_report.value(found)
    report.finish(console, args.out, ["variance.png", "uses.png"], value, found)
    return found


if __name__ == "__main__":
    main()
