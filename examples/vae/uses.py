"""What the latents are good for: the other half of a digit, its label, how unusual it is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import tilewise as tw
from examples.vae.judge import nearest
from examples.vae.models import PIXELS, Vae, bernoulli

TOP = torch.arange(PIXELS) < PIXELS // 2

# ---- half a digit


def infer(model: Vae, x: Tensor, known: Tensor, steps: int) -> Tensor:
    """The parameters of q(z | pixels that are known), (B, outputs), by raising their own ELBO.

    The encoder has learned whole digits only; its guess is where the ascent starts.
    """
    with torch.no_grad():
        out = model.encoder(x * known)
    out.requires_grad_()
    optimizer = torch.optim.Adam([out], 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.latents.loss(
            lambda z: (bernoulli(model.decoder(z), x) * known).sum(-1), out
        )
        (grad,) = torch.autograd.grad(loss.sum(), out)
        out.grad = grad
        optimizer.step()
    return out.detach()


@torch.no_grad()
def completions(model: Vae, out: Tensor, count: int) -> Tensor:
    """Pixels' probabilities (count, B, 784)."""
    return torch.sigmoid(model.decoder(model.latents.draw(out, count)[0]))


def mixed(probabilities: Tensor, x: Tensor, asked: Tensor) -> float:
    """-log of the mean over the first dimension (S, B, 784) of p(pixels asked for), in nats."""
    p = probabilities.clamp(0.005, 0.995)
    logs = -(bernoulli(torch.logit(p), x) * asked).sum(-1)
    return float((math.log(len(p)) - torch.logsumexp(logs, 0)).mean())


def half_a_digit(model: Vae, data, args) -> dict:
    """Nats of the lower half given the upper one, and what must be beaten."""
    x, low = data.binary[:: 1000 // args.halves], (~TOP).float()
    out = infer(model, x, TOP.float(), args.infer_steps)
    means = data.seen.mean(0).expand(1, len(x), -1)
    rows = (x * TOP).split(100)
    near = torch.cat([
        torch.cdist(part, data.seen * TOP).topk(20, largest=False).indices for part in rows
    ])  # fmt: skip
    neighbours = data.seen[near].transpose(0, 1)  # (20, B, 784)
    blurred = (0.7 * neighbours + 0.3 * neighbours.mean(0)).clamp(0.02, 0.98)
    return {
        "nats": {
            "VAE, 100 completions": mixed(completions(model, out, 100), x, low),
            "mean of 20 nearest upper halves": mixed(neighbours.mean(0)[None], x, low),
            "each of them, blurred": mixed(blurred, x, low),
            "mean digit": mixed(means, x, low),
        },
        "shown": shown(model, x, out),
    }


def shown(model: Vae, x: Tensor, out: Tensor, count: int = 8) -> list:
    """Digits, their upper half, its mean completion and three completions: (count, 6, 784)."""
    made = completions(model, out, 100)
    rows = torch.arange(0, len(x), len(x) // count)[:count]
    half = torch.where(TOP, x, 0.5)
    parts = torch.stack([x, half, made.mean(0), *made[:3]], 1)[rows]
    parts[:, 2:] = torch.where(TOP, x[rows, None], parts[:, 2:])
    return parts.tolist()


# ---- labels


def linear_probe(x: Tensor, labels: Tensor, new: Tensor, new_labels: Tensor) -> float:
    """Accuracy on new digits of a logistic regression."""
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-2)
    x, new = (x - mean) / scale, (new - mean) / scale
    weight = torch.zeros(10, x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=30, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = F.linear(x, weight[:, 1:], weight[:, 0])
        decay = weight[:, 1:].square().sum() / len(x)
        loss = F.cross_entropy(logits, labels) + decay
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        found = F.linear(new, weight[:, 1:], weight[:, 0]).argmax(1)
    return float((found == new_labels).float().mean())


def components(seen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean (784,) and principal directions (784, count)."""
    mean = seen.mean(0)
    return mean, torch.linalg.eigh((seen - mean).T.cov()).eigenvectors[:, -count:]


def probes(model: Vae, data, counts: list[int]) -> dict[str, list[float]]:
    """Accuracy by the number of labels, of latents, principal components and pixels."""
    mean, directions = components(data.seen, model.latents.size)
    features = {
        "latents": model.features,
        "principal components": lambda x: (x - mean) @ directions,
        "pixels": lambda x: x,
    }
    order = torch.randperm(len(data.seen), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {}
    for name, feature in features.items():
        x, new = feature(data.seen), feature(data.heldout)
        found[name] = [
            linear_probe(x[rows], data.labels[rows], new, data.heldout_labels)
            for rows in (order[:count] for count in counts)
        ]
    return found


# ---- unusual digits


def strange(data, fours: Tensor) -> dict[str, Tensor]:
    """Kinds of binary pictures that are no digits of the training set: (N, 784) each."""
    x = data.binary
    other = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return {
        "halves of two digits": torch.where(TOP, x, other),
        "turned by a quarter": x.view(-1, 28, 28).rot90(1, (1, 2)).flatten(1),
        "a digit never seen (4)": x[fours],
    }


def anomalies(model: Vae, data, samples: int) -> dict:
    """How well scores rank strange pictures above usual ones: the area under the curve.

    Neither the model nor what it is compared with has seen a four.
    """
    mean, directions = components(data.seen, model.latents.size)
    fours = data.heldout_labels == 4
    pixel = torch.logit(mean.clamp(0.005, 0.995))
    scores = {
        "VAE": lambda x: model.importance_bound(x, samples),
        "principal components": lambda x: _residual(x - mean, directions),
        "nearest training digit": lambda x: nearest(x, data.seen)[0],
        "mean digit": lambda x: bernoulli(pixel.expand_as(x), x).sum(-1),
    }
    found: dict = {}
    for name, score in scores.items():
        usual = score(data.binary[~fours])
        found[name] = {
            kind: _ranked(score(x), usual) for kind, x in strange(data, fours).items()
        }
    return found


def _residual(away: Tensor, directions: Tensor) -> Tensor:
    return (away - away @ directions @ directions.T).square().sum(-1)


def _ranked(strange: Tensor, usual: Tensor) -> float:
    """The chance that a strange picture has the higher score."""
    scores = torch.cat([strange, usual])
    labels = torch.arange(len(scores)) < len(strange)
    return float(tw.smooth.auc(scores, labels, tau=0))


def ranking(model: Vae, data, samples: int, count: int = 10) -> dict[str, list]:
    """Held-out digits, the most usual and the most unusual ones by the bound."""
    score = model.importance_bound(data.binary, samples)
    order = score.argsort()
    return {
        "usual": data.heldout[order[:count]].tolist(),
        "unusual": data.heldout[order[-count:]].tolist(),
    }
