"""A tiny text GAN over the words of captions: a gradient through words that were chosen.

    python -m examples.text_gan             # a minute on two cores
    python -m examples.text_gan --quick     # few steps

A generator turns noise into captions of up to six words, all places at once. Words are chosen, so
that no gradient passes from a judge to the generator but by an estimator of `tw.estimators`:

- against a discriminator by straight-through Gumbel-softmax, by ReinMax, and by the score function;
- without one, with BLEU beside real captions as a reward, by the score function.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import tilewise as tw
from examples.common import report
from examples.common.data import pairs, words
from examples.common.report import BLUE, GREEN, ORANGE, RED
from examples.common.training import arguments, conduct
from tilewise import estimators

LENGTH, KNOWN, NOISE = 6, 80, 32  # words of a caption, of the vocabulary; numbers of noise
END = 0  # the word behind the last
SAMPLES = 4
KINDS = {
    "Gumbel-softmax": ("gumbel_softmax", {"tau": 0.7, "hard": True}),
    "ReinMax": ("reinmax", {}),
    "score function": ("score_function", {"baseline": "leave_one_out"}),
    "score function, BLEU": ("score_function", {"baseline": "leave_one_out"}),
}
COLORS = dict(zip(KINDS, (GREEN, RED, BLUE, ORANGE), strict=True))


def corpus() -> tuple[Tensor, list[str]]:
    """Captions of the most frequent words (N, 6), filled with END, and the vocabulary."""
    captions = sorted({tuple(words(text)) for text in pairs().captions})
    counts = Counter(word for caption in captions for word in caption)
    names = ["", *sorted(word for word, _ in counts.most_common(KNOWN))]
    number = {word: i for i, word in enumerate(names)}
    kept = [c for c in captions if 2 <= len(c) <= LENGTH and all(w in number for w in c)]
    rows = [[*(number[w] for w in c), *[END] * (LENGTH - len(c))] for c in kept]
    return torch.tensor(rows), names


class Generator(nn.Module):
    """Noise (B, 32) to logits of words (B, 6, V)."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.layers = nn.Sequential(
            nn.Linear(NOISE, 128), nn.ReLU(), nn.Linear(128, LENGTH * vocabulary)
        )

    def forward(self, noise: Tensor) -> Tensor:
        return self.layers(noise).unflatten(-1, (LENGTH, self.vocabulary))


class Discriminator(nn.Module):
    """How real one-hot words (..., 6, V) look: (...)."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.embed = nn.Linear(vocabulary, 24, bias=False)
        self.layers = nn.Sequential(nn.Linear(LENGTH * 24, 96), nn.LeakyReLU(0.2), nn.Linear(96, 1))

    def forward(self, one_hot: Tensor) -> Tensor:
        return self.layers(self.embed(one_hot).flatten(-2)).squeeze(-1)


def bleu_reward(real: Tensor) -> Callable[[Tensor], Tensor]:
    """1 - BLEU of pairs of words, beside some real captions (R, 6); of texts (S, B, 6, V)."""
    references = real.masked_fill(real == END, -1)

    def loss(one_hot: Tensor) -> Tensor:
        texts = one_hot.argmax(-1)
        mask = (texts != END).cumprod(-1).bool()
        given = references.expand(*texts.shape[:2], 1, *references.shape)
        return 1 - tw.smooth.bleu(
            texts[:, :, None], given, max_n=2, smoothing=0.1, mask=mask[:, :, None]
        )

    return loss


def train(kind: str, real: Tensor, vocabulary: int, args, tick: Callable[[], None]) -> dict:
    torch.manual_seed(args.seed)
    generator = Generator(vocabulary).to(args.device)
    discriminator = Discriminator(vocabulary).to(args.device)
    made = torch.optim.Adam(generator.parameters(), 2e-3, betas=(0.5, 0.99))
    judged = torch.optim.Adam(discriminator.parameters(), 1e-3, betas=(0.5, 0.99))
    name, options = KINDS[kind]
    history = []
    for step in range(args.steps + 1):
        if step % args.every == 0:
            history.append({"step": step, **judge(generator, real)})
            tick()
        batch = real[torch.randint(len(real), (64,))]
        logits = generator(torch.randn(64, NOISE).to(args.device))
        if kind.endswith("BLEU"):
            loss = bleu_reward(batch[:16])
        else:
            with torch.no_grad():
                fake = F.one_hot(tw.gumbel_argmax(logits), vocabulary).float()
            right = F.softplus(-discriminator(F.one_hot(batch, vocabulary).float()))
            wrong = F.softplus(discriminator(fake))
            judged.zero_grad()
            (right + wrong).mean().backward()
            judged.step()
            loss = lambda y: F.softplus(-discriminator(y))  # noqa: E731
        made.zero_grad()
        rows = estimators.Categorical(logits)
        getattr(estimators, name)(loss, rows, SAMPLES, **options).mean().backward()
        made.step()
    return {"history": history, "texts": draw(generator, 8).tolist()}


@torch.no_grad()
def draw(generator: Generator, count: int) -> Tensor:
    """Captions (count, 6) of noise that is always the same; nothing stands behind the first END."""
    noise = torch.randn(count, NOISE, generator=torch.Generator().manual_seed(1))
    device = next(generator.parameters()).device
    texts = tw.gumbel_argmax(generator(noise.to(device)), seed=1)
    return texts * (texts != END).cumprod(-1)


def judge(generator: Generator, real: Tensor) -> dict:
    """Of 500 captions: how many are real ones, are different, and have pairs that occur."""
    texts = [tuple(row) for row in draw(generator, 500).tolist()]
    known = {tuple(row) for row in real.tolist()}
    occurring = {(i, *row[i : i + 2]) for row in known for i in range(LENGTH - 1)}
    met = [(i, *row[i : i + 2]) in occurring for row in texts for i in range(LENGTH - 1)]
    return {
        "real": sum(text in known for text in texts) / len(texts),
        "different": len(set(texts)) / len(texts),
        "pairs": sum(met) / len(met),
    }


def say(text: list[int], names: list[str]) -> str:
    return " ".join(names[word] or "·" for word in text)


def table(console: Console, found: dict, names: list[str]) -> None:
    made = report.table(
        "500 captions, %", ["pairs of words that occur", "real captions", "different ones"]
    )
    for kind, run in found.items():
        last = run["history"][-1]
        made.add_row(kind, *(f"{100 * last[key]:.0f}" for key in ("pairs", "real", "different")))
    console.print(made)
    for kind, run in found.items():
        texts = "; ".join(say(text, names) for text in run["texts"][:3])
        console.print(f"[bold]{kind}[/]: {texts}")


def curves(found: dict, path: Path) -> None:
    titles = {
        "pairs": "Pairs of words that occur, %", "real": "Captions that are real, %",
        "different": "Different captions, %",
    }  # fmt: skip
    with report.picture(path):
        _, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
        for place, (key, title) in zip(axes, titles.items(), strict=True):
            for kind, run in found.items():
                steps = [entry["step"] for entry in run["history"]]
                place.plot(steps, [100 * entry[key] for entry in run["history"]],
                           color=COLORS[kind], label=kind)  # fmt: skip
            place.set(title=title, xlabel="step", ylim=(0, 103))
        axes[0].legend(loc="lower right")


def value(found: dict) -> str:
    """What came of it, in a sentence."""
    last = {kind: run["history"][-1] for kind, run in found.items()}
    best = max((k for k in last if not k.endswith("BLEU")), key=lambda k: last[k]["real"])
    bleu = last["score function, BLEU"]
    return (
        f"Against a discriminator {best} makes {100 * last[best]['real']:.0f} % real captions, "
        f"{100 * last[best]['different']:.0f} % different; BLEU as the only reward "
        f"{100 * bleu['real']:.0f} %, and {100 * bleu['different']:.0f} % are different."
    )


def run(args, bars: Progress) -> tuple[dict, list[str]]:
    real, names = corpus()
    real = real.to(args.device)
    found = {}
    for kind in KINDS:
        task = bars.add_task(kind, total=args.steps // args.every + 1, note=f"{len(real)} captions")
        found[kind] = train(
            kind, real, len(names), args, lambda task=task: bars.update(task, advance=1)
        )
    return found, names


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, Path("out/text_gan"), every=50, resumes=False, on_device=True)
    parser.add_argument("--steps", type=int, default=800, help="of each generator")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.every = 20, 10
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    console, (found, names) = conduct("Text GAN", args, run)
    table(console, found, names)
    curves(found, args.out / "curves.png")
    report.finish(console, args.out, ["curves.png"], value(found), found)
    return found


if __name__ == "__main__":
    main()
