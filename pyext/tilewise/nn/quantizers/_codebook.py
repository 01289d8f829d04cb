"""The codes of a vector quantiser, and how they learn: EMA, k-means, revival of dead codes."""

import torch
from torch import Tensor, nn

from tilewise.nn._precision import at_least_float32
from tilewise.nn.quantizers import _sync
from tilewise.nn.quantizers._unit import unit
from tilewise.ops import code_sums, nearest_code


class Codebook(nn.Module):
    """H codebooks of K codes in D dimensions, with the statistics that they are averaged from.

    Rows come as (M, D). With several codebooks, row m belongs to codebook m mod H, and its code is
    named by its place in all of them, h * K + k. Nothing here looks at a value on the host: what
    depends on data is chosen by `torch.where`, so a GPU is never waited for.

    State dict (the keys of lucidrains' `Codebook`):
        embed: (H, K, D) float32, the codes. A parameter with `learnable`, else a buffer.
        cluster_size: (H, K) float32, moving average of the rows that a code gets in a batch.
        embed_avg: (H, K, D) float32, moving average of the sum of these rows.
        initted: () bool, whether k-means was done, or not asked for.
    """

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    initted: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int,
        *,
        decay: float,
        eps: float,
        kmeans_init: bool,
        kmeans_iters: int,
        threshold_ema_dead_code: float,
        use_cosine_sim: bool,
        ema_update: bool,
        learnable: bool,
        sync: bool,
    ):
        super().__init__()
        self.decay, self.eps = decay, eps
        self.kmeans_iters = kmeans_iters
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.use_cosine_sim = use_cosine_sim
        self.ema_update, self.learnable, self.sync = ema_update, learnable, sync
        bound = (6 / (codebook_size * dim)) ** 0.5
        embed = torch.empty(num_codebooks, codebook_size, dim).uniform_(-bound, bound)
        if use_cosine_sim:
            embed = unit(embed)
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.detach().clone())
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        # What `initted` says, where Python and torch.compile can branch on it.
        self.needs_init = kmeans_init

    @property
    def learns(self) -> bool:
        """Whether a training step changes the codes otherwise than by their gradient."""
        return self.ema_update or self.threshold_ema_dead_code > 0

    def codes(self) -> Tensor:
        """The codes as rows are compared with them, (H, K, D): of length 1 with cosine."""
        if self.use_cosine_sim and self.learnable:
            # A copy, because revival may write to the parameter before the backward pass.
            return unit(self.embed.clone())
        return self.embed

    @torch.no_grad()
    def search(
        self, rows: Tensor, mask: Tensor | None, codes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Nearest codes of rows (M, D): their names h * K + k, -1 where mask (M) is False, and
        the distances (M)."""
        metric = "cosine" if self.use_cosine_sim else "l2"
        codes = self.codes() if codes is None else codes
        h, k, _ = codes.shape
        rows = rows.detach()
        if h == 1:
            return nearest_code(rows, codes[0], metric, mask=mask)
        mask = None if mask is None else self._by_head(mask)
        index, distance = nearest_code(self._by_head(rows), codes, metric, mask=mask)  # (H, N)
        first = k * torch.arange(h, device=rows.device).unsqueeze(1)  # (H, 1)
        index = torch.where(index < 0, -1, index + first)
        return index.t().reshape(-1), distance.t().reshape(-1)

    @torch.no_grad()
    def initialise(self, rows: Tensor, mask: Tensor | None) -> None:
        """k-means over rows (M, D); codes that get no row keep the one that they began with."""
        rows = rows.detach()
        valid = rows.isfinite().all(-1)
        if mask is not None:
            valid = valid & mask
        everything = torch.ones_like(self.cluster_size, dtype=torch.bool)
        samples, found = self._sample(rows, valid, everything, repeat=True)
        codes = torch.where(found, samples, self.embed)
        counts = torch.ones_like(self.cluster_size)
        for _ in range(self.kmeans_iters):
            index, _ = self.search(rows, valid, codes)
            counts, sums = self._reduced_sums(*self._sums(rows, index))
            means = sums / counts.clamp(min=1).unsqueeze(-1)
            codes = torch.where(counts.unsqueeze(-1) > 0, self._normal(means), codes)
        counts = counts.clamp(min=1)
        self.cluster_size.copy_(counts)
        self.embed_avg.copy_(codes * counts.unsqueeze(-1))
        self.embed.copy_(codes)
        if self.ema_update:
            self.refresh()
        self.initted.fill_(True)
        self.needs_init = False

    @torch.no_grad()
    def update(
        self, rows: Tensor, index: Tensor, refresh: bool = True, enabled: Tensor | None = None
    ) -> Tensor:
        """One step of learning from rows (M, D) with codes index (M), -1 to leave a row out.

        Args:
            refresh: whether codes follow their averages at once, or when `refresh` is called.
            enabled: () bool; False changes nothing.

        Returns:
            How many rows of this process each code got, (H, K).
        """
        rows = rows.detach()
        local_counts, sums = self._sums(rows, index)
        counts, sums = self._reduced_sums(local_counts, sums)
        weight = 1 - self.decay if enabled is None else (1 - self.decay) * enabled
        self.cluster_size.lerp_(counts.to(self.cluster_size.dtype), weight)
        self.embed_avg.lerp_(sums.to(self.embed_avg.dtype), weight)
        if self.ema_update and refresh:
            self.refresh(enabled)
        if self.threshold_ema_dead_code > 0:
            self._revive(rows, index >= 0, enabled)
        return local_counts

    @torch.no_grad()
    def refresh(self, enabled: Tensor | None = None) -> None:
        """Sets the codes to their averages, cluster sizes smoothed so that none is 0."""
        total = self.cluster_size.sum(-1, keepdim=True)  # (H, 1)
        k = self.cluster_size.shape[-1]
        size = (self.cluster_size + self.eps) / (total + k * self.eps) * total  # (H, K)
        codes = self._normal(self.embed_avg / size.unsqueeze(-1))
        self.embed.copy_(codes if enabled is None else torch.where(enabled, codes, self.embed))

    def _revive(self, rows: Tensor, valid: Tensor, enabled: Tensor | None) -> None:
        """Puts rows of this batch in the place of codes that hardly any row chooses.

        Their statistics restart with them: an old average would pull the code back.
        """
        dead = self.cluster_size < self.threshold_ema_dead_code  # (H, K)
        if enabled is not None:
            dead = dead & enabled
        samples, found = self._sample(rows, valid, dead)
        weight = float(self.threshold_ema_dead_code)
        self.embed.copy_(torch.where(found, samples, self.embed))
        self.embed_avg.copy_(torch.where(found, samples * weight, self.embed_avg))
        size = torch.where(found.squeeze(-1), weight, self.cluster_size)
        self.cluster_size.copy_(size)

    def _sample(
        self, rows: Tensor, valid: Tensor, wanted: Tensor, repeat: bool = False
    ) -> tuple[Tensor, Tensor]:
        """A random valid row, of any process, for each wanted code; no row twice.

        Args:
            rows, valid: (M, D), and (M) bool.
            wanted: (H, K) bool.
            repeat: whether rows serve twice where there are fewer than codes; else these codes
                get none.

        Returns:
            Rows (H, K, D), in the codes' dtype, and whether there is one, (H, K, 1).
        """
        valid = self._by_head(valid)  # (H, N)
        total = valid.sum(-1)  # (H)
        draws = torch.randint(2**62, (2, len(total)), device=rows.device)
        total, offset, draws = _sync.positions(total, draws, self.sync)
        position = systematic_sample(wanted, total.unsqueeze(-1), draws.unsqueeze(-1), repeat)
        found = (position >= 0).unsqueeze(-1)
        samples = self._rows_at(rows, valid, position - offset.unsqueeze(-1))
        samples = torch.where(found, samples, 0.0).to(self.embed.dtype)
        _sync.all_reduce(samples, self.sync)
        return samples, found

    def _rows_at(self, rows: Tensor, valid: Tensor, position: Tensor) -> Tensor:
        """The valid rows number `position` (H, K), 0 where this process has no such row."""
        h, n = valid.shape
        if n == 0:
            return rows.new_zeros(*position.shape, rows.shape[-1])
        order = valid.cumsum(-1)  # (H, N): how many valid rows there are up to each
        here = (position >= 0) & (position < order[:, -1:])
        row = torch.searchsorted(order, (position + 1).contiguous()).clamp(max=n - 1)  # (H, K)
        row = row * h + torch.arange(h, device=rows.device).unsqueeze(1)
        samples = rows.index_select(0, row.reshape(-1)).unflatten(0, position.shape)
        return torch.where(here.unsqueeze(-1), samples, 0.0)

    def _sums(self, rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Counts (H, K) and sums (H, K, D) of this process's rows."""
        h, k, d = self.embed.shape
        counts, sums = code_sums(rows, index, h * k)
        return counts.view(h, k), sums.view(h, k, d)

    def _reduced_sums(self, counts: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The same over all processes."""
        if _sync.world_size(self.sync) == 1:
            return counts, sums
        counts = counts.clone()  # the process's own counts are still needed
        _sync.all_reduce(counts, self.sync)
        _sync.all_reduce(sums, self.sync)
        return counts, sums

    def _normal(self, codes: Tensor) -> Tensor:
        return unit(codes) if self.use_cosine_sim else codes

    def _by_head(self, x: Tensor) -> Tensor:
        """(M, ...) as (H, N, ...), contiguous."""
        h = self.embed.shape[0]
        return x.reshape(x.shape[0] // h, h, *x.shape[1:]).transpose(0, 1).contiguous()

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        if not self.initted.is_meta:
            self.needs_init = not bool(self.initted)

    def _apply(self, fn, recurse=True):
        """Moves as asked, but half precision is too coarse to average codes in."""
        return super()._apply(at_least_float32(fn), recurse)


def systematic_sample(wanted: Tensor, total: Tensor, draws: Tensor, repeat: bool) -> Tensor:
    """Different places among `total`, evenly spread from a random start, one for each wanted code.

    Args:
        wanted: (H, K) bool.
        total: (H, 1) int64, how many there are to choose from.
        draws: (2, H, 1) int64, random.
        repeat: whether places serve twice where there are fewer than codes.

    Returns:
        (H, K) int64, -1 for codes that get none.
    """
    number = wanted.sum(-1, keepdim=True)  # (H, 1)
    turn = (wanted.cumsum(-1) - 1 + draws[0] % number.clamp(min=1)) % number.clamp(min=1)  # (H, K)
    chosen = number if repeat else torch.minimum(number, total)
    start = draws[1] % total.clamp(min=1)
    place = (turn * total + start) // chosen.clamp(min=1)
    return torch.where(wanted & (turn < chosen) & (total > 0), place, -1)
