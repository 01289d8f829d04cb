"""Small convolutional towers with a quantiser between them, and the quantiser people write by hand.

    quantizer = tw.nn.VectorQuantizer(64, 512, accept_image_fmap=True)
    model = Autoencoder(channels=3, quantizer=quantizer)
    pictures, tokens, loss = model(images)  # tokens int64 (B, H / 4, W / 4)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 4  # pixels per token and side
DIM = 64  # channels of the latent grid


class Residual(nn.Module):
    """Begins as the identity: the towers start out linear, which a decoder learns from at once."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, width // 2, 3, padding=1, padding_mode="replicate"),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 1),
        )
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def encoder(channels: int, dim: int, width: int = 128) -> nn.Sequential:
    """(B, channels, H, W) -> (B, dim, H / 4, W / 4)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, STRIDE, stride=STRIDE),
        Residual(width),
        Residual(width),
        nn.Conv2d(width, dim, 1),
    )


def decoder(channels: int, dim: int, width: int = 128) -> nn.Sequential:
    """(B, dim, h, w) -> (B, channels, 4 h, 4 w)."""
    return nn.Sequential(
        nn.Conv2d(dim, width, 3, padding=1, padding_mode="replicate"),
        Residual(width),
        Residual(width),
        nn.ConvTranspose2d(width, channels, STRIDE, stride=STRIDE),
    )


class Autoencoder(nn.Module):
    """Encoder, quantiser, decoder; without a quantiser a plain autoencoder of the same size.

    `towers` make the first and the last, from channels of pictures and of the latent grid.
    """

    def __init__(
        self, channels: int, quantizer: nn.Module | None = None, towers=(encoder, decoder)
    ):
        super().__init__()
        self.encoder, self.decoder = (tower(channels, DIM) for tower in towers)
        self.to(memory_format=torch.channels_last)  # faster on a CPU
        self.quantizer = quantizer

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> features (B, DIM, H / 4, W / 4)."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.encoder(images.float() / 127.5 - 1)

    def decode(self, features: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in [0, 1] but for overshoot."""
        return self.decoder(features).float() * 0.5 + 0.5

    def forward(
        self, images: Tensor, quantize: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Reconstructions, tokens (None where nothing was quantised) and the quantiser's loss."""
        features, tokens = self.encode(images), None
        loss = features.new_zeros(())
        if self.quantizer is not None and quantize:
            with torch.autocast(features.device.type, enabled=False):  # codes are float32
                features, tokens, loss = self.quantizer(features.float())
        return self.decode(features), tokens, loss.sum()  # residual quantisers have several


class EagerVectorQuantizer(nn.Module):
    """A quantiser in plain PyTorch, as it is written by hand: the matrix of all distances, and a
    one-hot matrix for the moving averages.

    Codes are the averages of the rows that choose them (van den Oord et al. 2017, appendix A.1).
    A code that fewer than `threshold_ema_dead_code` rows of a batch choose on average starts again
    at a row of the batch. Which row that is is drawn as `tilewise.nn.VectorQuantizer` draws it, so
    both learn the same from one seed.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        decay: float = 0.8,
        eps: float = 1e-5,
        use_cosine_sim: bool = False,
        threshold_ema_dead_code: float = 0,
        commitment_weight: float = 1.0,
    ):
        super().__init__()
        inner = codebook_dim or dim
        self.project_in = nn.Linear(dim, inner) if inner != dim else nn.Identity()
        self.project_out = nn.Linear(inner, dim) if inner != dim else nn.Identity()
        self.decay, self.eps = decay, eps
        self.cosine, self.threshold = use_cosine_sim, threshold_ema_dead_code
        self.commitment_weight = commitment_weight
        bound = (6 / (codebook_size * inner)) ** 0.5
        codes = self._normal(torch.empty(codebook_size, inner).uniform_(-bound, bound))
        self.register_buffer("embed", codes)
        self.register_buffer("cluster_size", torch.ones(codebook_size))
        self.register_buffer("embed_avg", codes.clone())

    @property
    def codebook(self) -> Tensor:
        return self.embed

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, dim, h, w) -> quantised features, tokens (B, h, w), commitment loss."""
        maps = self.project_in(features.permute(0, 2, 3, 1))  # (B, h, w, D)
        x = self._normal(maps.flatten(0, 2))  # (N, D)
        rows = x.detach()
        index = torch.cdist(rows, self.embed).argmin(1)
        codes = self.embed[index]
        if self.training:
            self._follow(rows, index)
        loss = self.commitment_weight * F.mse_loss(x, codes)
        codes = x + (codes - x).detach()  # straight through
        codes = self.project_out(codes.view(maps.shape)).permute(0, 3, 1, 2)
        return codes, index.view(maps.shape[:3]), loss

    def copy_state(self, quantizer: nn.Module) -> None:
        """Takes up the state of a `tilewise.nn.VectorQuantizer`, which has another shape."""
        own = self.state_dict()
        theirs = {k.removeprefix("_codebook."): v for k, v in quantizer.state_dict().items()}
        self.load_state_dict({name: theirs[name].reshape(v.shape) for name, v in own.items()})

    def _normal(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=1e-6) if self.cosine else x

    @torch.no_grad()
    def _follow(self, rows: Tensor, index: Tensor) -> None:
        one_hot = F.one_hot(index, len(self.embed)).to(rows.dtype)  # (N, K)
        self.cluster_size.lerp_(one_hot.sum(0), 1 - self.decay)
        self.embed_avg.lerp_(one_hot.T @ rows, 1 - self.decay)
        self._set_codes()
        if self.threshold:
            dead = self.cluster_size < self.threshold
            samples = rows[self._spread(int(dead.sum()), len(rows), rows.device)]
            self.embed[dead] = samples
            self.cluster_size[dead] = self.threshold
            self.embed_avg[dead] = samples * self.threshold

    def _set_codes(self) -> None:
        total = self.cluster_size.sum()
        size = (self.cluster_size + self.eps) / (total + len(self.embed) * self.eps) * total
        self.embed.copy_(self._normal(self.embed_avg / size[:, None]))

    @staticmethod
    def _spread(count: int, rows: int, device: torch.device) -> Tensor:
        """`count` different places among `rows`, evenly spread from a random start."""
        turn, start = torch.randint(2**62, (2, 1), device=device)
        order = (torch.arange(count, device=device) + turn) % max(count, 1)
        return (order * rows + start % rows) // max(count, 1)
