"""DiagonalGaussian: diffusers' distribution of an autoencoder's latents, on tilewise's sampling."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tilewise.ops.gaussian_sample import gaussian_sample

LOGVAR_RANGE = (-30.0, 20.0)


class DiagonalGaussian:
    r"""A Gaussian with a mean and a variance for each element, as autoencoders encode an image.

        z = mean + exp(logvar / 2) * e,    e standard normal,    -30 <= logvar <= 20
        kl_i = sum over the elements of row i of (mean^2 + exp(logvar) - 1 - logvar) / 2

    Takes the place of diffusers' `DiagonalGaussianDistribution`. One pass over the parameters gives
    the sample and its divergence; noise, standard deviation and variance are not stored.

    Args:
        parameters: (B, 2 * C, ...), any floating dtype: mean and log of the variance, one after the
            other in dimension 1.
        deterministic: the variance is 0, and so are divergence and likelihood.

    Attributes: `parameters`, `mean`, `deterministic`, and computed from them `logvar`, clamped,
    `std` and `var`, all as in diffusers. `mean`, `logvar`, `std` and `var` can be assigned to.

    Raises:
        ValueError, TypeError: parameters that are not floating, or have no two halves.

    Differences to diffusers: `kl` and `nll` are float32 for half precision (a variance of e^20 is
    beyond float16) and sum over all dimensions but the first, of videos (B, C, T, H, W) too.
    Assigning one of `logvar`, `std` and `var` changes the other two.

    Paper: Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014.

    Example:
        >>> posterior = tw.nn.DiagonalGaussian(encoder(image))
        >>> z = posterior.sample()
        >>> loss = reconstruction(decoder(z), image) + 1e-6 * posterior.kl().mean()
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False):
        if not isinstance(parameters, Tensor) or not parameters.is_floating_point():
            got = parameters.dtype if isinstance(parameters, Tensor) else type(parameters).__name__
            raise TypeError(f"parameters: expected a floating point tensor, got {got}")
        if parameters.dim() < 2 or parameters.shape[1] % 2:
            raise ValueError(
                "parameters: expected (B, 2 * C, ...), an even number of channels, "
                f"got {tuple(parameters.shape)}"
            )
        self.parameters = parameters
        self.deterministic = deterministic
        self._mean, self._logvar = torch.chunk(parameters, 2, dim=1)
        self._kl: Tensor | None = None  # of the pass that the latest sample came from

    @property
    def mean(self) -> Tensor:
        return self._mean

    @mean.setter
    def mean(self, value: Tensor) -> None:
        self._mean, self._kl = value, None

    @property
    def logvar(self) -> Tensor:
        return self._logvar.clamp(*LOGVAR_RANGE)

    @logvar.setter
    def logvar(self, value: Tensor) -> None:
        self._logvar, self._kl = value, None

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar / 2)

    @std.setter
    def std(self, value: Tensor) -> None:
        self.logvar = 2 * value.log()

    @property
    def var(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    @var.setter
    def var(self, value: Tensor) -> None:
        self.logvar = value.log()

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def sample(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: Tensor | int | None = None,
        row_offset: int = 0,
    ) -> Tensor:
        """A sample as `mean`, through which gradients pass.

        Args:
            generator: draws the seed; of a list, one draws for each row.
            seed, row_offset: as in `tilewise.gaussian_sample`.

        Raises:
            ValueError: both generator and seed; a list of another length than B.
        """
        if generator is not None and seed is not None:
            raise ValueError("seed: expected either generator or seed, got both")
        if self.deterministic:
            return self.mean
        if isinstance(generator, Sequence) and len(generator) != 1:
            return self._sample_each(generator)
        if generator is not None:
            seed = _draw(generator[0] if isinstance(generator, Sequence) else generator)
        z, self._kl = gaussian_sample(
            self.mean, self._logvar, seed, row_offset, logvar_range=LOGVAR_RANGE
        )
        return z

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """The divergence from `other`, or from N(0, 1), of each row: (B,) float32.

        After `sample` the second costs nothing more. Float64 for float64.
        """
        if self.deterministic:
            return self._nothing()
        if other is not None:
            return self._divergence(other)
        differentiate = torch.is_grad_enabled() and (
            self.mean.requires_grad or self._logvar.requires_grad
        )
        if self._kl is None or (differentiate and not self._kl.requires_grad):
            # The seed is of no consequence, and none is drawn.
            _, self._kl = gaussian_sample(self.mean, self._logvar, 0, logvar_range=LOGVAR_RANGE)
        return self._kl.clone()  # the caller may write to it

    def nll(self, sample: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """-log p(sample), summed over `dims`; None means all but the first.

            sum of (log(2 pi) + logvar + (sample - mean)^2 / exp(logvar)) / 2
        """
        if self.deterministic:
            return self._nothing()
        mean, logvar = _wide(self.mean), _wide(self.logvar)
        terms = math.log(2 * math.pi) + logvar + (sample - mean).square() * torch.exp(-logvar)
        return terms.sum(_all_but_first(mean) if dims is None else tuple(dims)) / 2

    def _divergence(self, other: "DiagonalGaussian") -> Tensor:
        mean, logvar = _wide(self.mean), _wide(self.logvar)
        if other.deterministic:  # from a point
            return mean.new_full((len(mean),), math.inf)
        distance = (mean - other.mean).square() * torch.exp(-_wide(other.logvar))
        ratio = logvar - other.logvar
        return (distance + torch.expm1(ratio) - ratio).sum(_all_but_first(mean)) / 2

    def _sample_each(self, generators: Sequence[torch.Generator]) -> Tensor:
        if len(generators) != len(self.mean):
            raise ValueError(
                f"generator: expected one or {len(self.mean)}, got {len(generators)}"
            )
        parts = [
            gaussian_sample(mean, logvar, _draw(generator), logvar_range=LOGVAR_RANGE)
            for mean, logvar, generator in zip(
                self.mean.split(1), self._logvar.split(1), generators, strict=True
            )
        ]
        self._kl = torch.cat([kl for _, kl in parts])
        return torch.cat([z for z, _ in parts])

    def _nothing(self) -> Tensor:
        return _wide(self.mean).new_zeros(1)


def _draw(generator: torch.Generator) -> Tensor:
    """A seed, where the generator lives."""
    return torch.randint(2**63 - 1, (), generator=generator, device=generator.device)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _all_but_first(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.dim()))
