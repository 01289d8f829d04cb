"""One encoder and one decoder, and the latents between them: what is drawn, and what that costs.

Latents turn the encoder's output into a distribution q(z|x) beside a prior p(z). Each kind has

    loss(f, out)       E_q f(z) + KL(q, p) of each image (B,), with a gradient for training
    draw(out, count)   samples (S, B, size) as the decoder sees them, and log p(z) - log q(z|x)
    divergence(out)    KL(q, p) in nats, (B,)
    prior(count)       samples of p, (count, size)
    features(out)      what stands for an image, (B, ...)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewise as tw
from tilewise import estimators

PIXELS, HIDDEN = 784, 200


def layers(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLUs between them."""
    parts: list[nn.Module] = []
    for i, o in zip(sizes, sizes[1:], strict=False):
        parts += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


class Normal(nn.Module):
    """A Gaussian for each of `size` numbers; the prior is N(0, 1)."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.outputs = size, 2 * size

    def loss(self, f: Callable[[Tensor], Tensor], out: Tensor) -> Tensor:
        z, kl = tw.gaussian_sample(*out.chunk(2, -1))
        return f(z) + kl

    def draw(self, out: Tensor, count: int) -> tuple[Tensor, Tensor]:
        mean, logvar = out.expand(count, *out.shape).chunk(2, -1)
        z = tw.gaussian_sample(mean, logvar).z
        own = (z - mean).square() * torch.exp(-logvar) + logvar
        return z, (own - z.square()).sum(-1) / 2

    def divergence(self, out: Tensor) -> Tensor:
        return tw.nn.DiagonalGaussian(out).kl()

    def prior(self, count: int) -> Tensor:
        return torch.randn(count, self.size)

    def features(self, out: Tensor) -> Tensor:
        return out.chunk(2, -1)[0]


class EagerNormal(Normal):
    """The same in PyTorch's own operations."""

    def loss(self, f: Callable[[Tensor], Tensor], out: Tensor) -> Tensor:
        mean, logvar = out.chunk(2, -1)
        z = mean + torch.exp(logvar / 2) * torch.randn_like(mean)
        kl = (mean.square() + logvar.exp() - 1 - logvar).sum(-1) / 2
        return f(z) + kl


class Uniform(Normal):
    """The prior is uniform on the unit cube. With the normal distribution function Phi, a point is
    Phi(z) of a Gaussian z, as the prior's is of z from N(0, 1): divergences are a Gaussian's.

    The decoder sees numbers of mean 0 and variance 1 under the prior.
    """

    def loss(self, f: Callable[[Tensor], Tensor], out: Tensor) -> Tensor:
        return super().loss(lambda z: f(self.seen(torch.special.ndtr(z))), out)

    def draw(self, out: Tensor, count: int) -> tuple[Tensor, Tensor]:
        z, ratio = super().draw(out, count)
        return self.seen(torch.special.ndtr(z)), ratio

    @staticmethod
    def seen(point: Tensor) -> Tensor:
        """By the decoder."""
        return math.sqrt(12) * (point - 0.5)

    def prior(self, count: int) -> Tensor:
        return self.seen(torch.rand(count, self.size))

    def features(self, out: Tensor) -> Tensor:
        return self.seen(torch.special.ndtr(super().features(out)))


class Categories(nn.Module):
    """Independent variables of `kinds` categories each; the prior finds all equally likely.

    Args:
        estimator: of `tilewise.estimators`, for the gradient of the expectation.
        options: of the estimator; `tau` may be a schedule of the number of training steps.
    """

    def __init__(self, variables: int, kinds: int, estimator: str, samples: int = 2, **options):
        super().__init__()
        self.variables, self.kinds = variables, kinds
        self.size = self.outputs = variables * kinds
        self.estimator, self.samples, self.options = estimator, samples, options
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def logits(self, out: Tensor) -> Tensor:
        return out.view(-1, self.variables, self.kinds)

    def loss(self, f: Callable[[Tensor], Tensor], out: Tensor) -> Tensor:
        step = int(self.steps)
        options = {k: v(step) if callable(v) else v for k, v in self.options.items()}
        self.steps += 1
        expected = getattr(estimators, self.estimator)(
            lambda y: f(y.flatten(-2)), estimators.Categorical(self.logits(out)), self.samples,
            **options,
        )  # fmt: skip
        return expected + self.divergence(out)

    def draw(self, out: Tensor, count: int) -> tuple[Tensor, Tensor]:
        logs = F.log_softmax(self.logits(out), -1)
        index = tw.gumbel_argmax(logs.expand(count, *logs.shape))
        likely = logs.expand(count, *logs.shape).gather(-1, index[..., None]).squeeze(-1)
        ratio = -(likely + math.log(self.kinds)).sum(-1)
        return self.embed(index), ratio

    def embed(self, index: Tensor) -> Tensor:
        """(..., variables) to what the decoder sees."""
        return F.one_hot(index, self.kinds).float().flatten(-2)

    def divergence(self, out: Tensor) -> Tensor:
        logs = F.log_softmax(self.logits(out), -1)
        return self.variables * math.log(self.kinds) + (logs.exp() * logs).sum((-2, -1))

    def prior(self, count: int) -> Tensor:
        return self.embed(torch.randint(self.kinds, (count, self.variables)))

    def features(self, out: Tensor) -> Tensor:
        return torch.softmax(self.logits(out), -1).flatten(1)


class Codes(Categories):
    """Variables whose categories are codes of one codebook: a discrete VAE on `GumbelQuantizer`.

    Its temperature is the quantiser's, and falls by its schedule.
    """

    def __init__(self, variables: int, kinds: int, dim: int, tau):
        super().__init__(variables, kinds, "")
        self.outputs = self.size = variables * dim
        # Of the mean over an image's variables, the weight makes the sum: the whole divergence.
        self.quantizer = tw.nn.GumbelQuantizer(dim, kinds, tau=tau, kl_weight=float(variables))

    def logits(self, out: Tensor) -> Tensor:
        return self.quantizer.proj(out.unflatten(-1, (self.variables, -1)))

    def loss(self, f: Callable[[Tensor], Tensor], out: Tensor) -> Tensor:
        codes, _, kl = self.quantizer(out.unflatten(-1, (self.variables, -1)))
        if self.training:
            self.quantizer.step()
        return f(codes.flatten(1)) + kl

    def embed(self, index: Tensor) -> Tensor:
        return self.quantizer.get_codes_from_indices(index.flatten(0, -2)).view(
            *index.shape[:-1], self.size
        )


@torch.no_grad()
def begin_at_mean(decoder: nn.Sequential, mean: Tensor) -> None:
    """Lets it draw the mean digit (784,) at first, which saves it the first epoch."""
    decoder[-1].bias.copy_(torch.logit(mean.clamp(0.005, 0.995)))


class Vae(nn.Module):
    """Binary pixels (B, 784) to latents and back."""

    def __init__(self, latents: nn.Module):
        super().__init__()
        self.latents = latents
        self.encoder = layers(PIXELS, HIDDEN, HIDDEN, latents.outputs)
        self.decoder = layers(latents.size, HIDDEN, HIDDEN, PIXELS)

    def error(self, z: Tensor, x: Tensor) -> Tensor:
        """-log p(x|z) in nats, (..., B) of latents (..., B, size)."""
        return bernoulli(self.decoder(z), x).sum(-1)

    def loss(self, x: Tensor) -> Tensor:
        """The negative ELBO (B,) of one sample or few, with its gradient."""
        return self.latents.loss(lambda z: self.error(z, x), self.encoder(x))

    @torch.no_grad()
    def bound(self, x: Tensor, samples: int = 1) -> Tensor:
        """The negative ELBO in nats, (B,)."""
        out = self.encoder(x)
        z, _ = self.latents.draw(out, samples)
        return self.error(z, x).mean(0) + self.latents.divergence(out)

    @torch.no_grad()
    def importance_bound(self, x: Tensor, samples: int, chunk: int = 20) -> Tensor:
        """-log mean of p(x|z) p(z) / q(z|x) over the samples: nearer to -log p(x), (B,)."""
        out, found = self.encoder(x), []
        for start in range(0, samples, chunk):
            z, ratio = self.latents.draw(out, min(chunk, samples - start))
            found.append(ratio - self.error(z, x))
        return math.log(samples) - torch.logsumexp(torch.cat(found), 0)

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """Pixels' probabilities (count, 784) of latents that the prior draws."""
        return torch.sigmoid(self.decoder(self.latents.prior(count)))

    @torch.no_grad()
    def rebuild(self, x: Tensor) -> Tensor:
        """Pixels' probabilities, of a sample of q(z|x)."""
        return torch.sigmoid(self.decoder(self.latents.draw(self.encoder(x), 1)[0][0]))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return self.latents.features(self.encoder(x))


def bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    """-log p of each pixel."""
    return F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")


class Gan(nn.Module):
    """The other map from latents to pixels, with a critic in the encoder's place."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.generator = layers(size, HIDDEN, HIDDEN, PIXELS)
        self.critic = nn.Sequential(
            nn.Linear(PIXELS, HIDDEN), nn.LeakyReLU(0.2), nn.Dropout(0.3),
            nn.Linear(HIDDEN, HIDDEN), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(HIDDEN, 1),
        )  # fmt: skip

    def forward(self, count: int) -> Tensor:
        return torch.sigmoid(self.generator(torch.randn(count, self.size)))

    def judge(self, pixels: Tensor) -> Tensor:
        """(B, 1) logits of being a digit. With noise on the pixels no detail gives all away."""
        return self.critic(pixels + 0.2 * torch.randn_like(pixels))

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        return self(count)
