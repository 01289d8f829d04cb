"""The codes of a vector quantiser, and how they learn: EMA, k-means, revival of dead codes."""

import itertools
import weakref

import torch
from torch import Tensor, nn

from tilewise import _backend
from tilewise.nn import _sync
from tilewise.nn._precision import without_halving
from tilewise.nn.quantizers._sampling import Wanted, by_head, sample_rows
from tilewise.nn.quantizers._unit import EPS, unit
from tilewise.ops._register import define
from tilewise.ops.code_sums import code_sums
from tilewise.ops.nearest_code import nearest_code


class Codebook(nn.Module):
    """H codebooks of K codes in D dimensions, with the statistics that they are averaged from.

    Rows come as (M, D). With several codebooks, row m belongs to codebook m mod H, and its code is
    named by its place in all of them, the flat index h * K + k. What depends on data is chosen by
    `torch.where`, so a GPU is never waited for, but for `needs_init`.

    State dict (the keys of lucidrains' `Codebook`):
        embed: (H, K, D) float32, the codes. A parameter with `learnable`, else a buffer.
        cluster_size: (H, K) float32, moving average of the rows that a code gets in a batch.
        embed_avg: (H, K, D) float32, moving average of the sum of these rows.
        initted: () float32, 0 while k-means is still to come. No bool: weight averaging subtracts.

    Not in it: `pending` (H, K, 1 + D), counts and sums of the micro batches of a step that has not
    ended, or None.
    """

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    initted: Tensor
    pending: Tensor | None

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
        self.dtype = torch.get_default_dtype()  # of codes as they are given out, see `_apply`
        precise = torch.promote_types(self.dtype, torch.float32)
        embed = torch.empty(num_codebooks, codebook_size, dim, dtype=precise)
        embed.uniform_(-bound, bound)
        if use_cosine_sim:
            embed = unit(embed)
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", embed.new_ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.detach().clone())
        self.register_buffer("initted", torch.tensor(float(not kmeans_init), dtype=torch.float32))
        self.register_buffer("pending", None, persistent=False)
        self._known_initted = None if kmeans_init else self.initted
        self._register()

    @property
    def learns(self) -> bool:
        """Whether a training step changes the codes otherwise than by their gradient."""
        return self.ema_update or self.threshold_ema_dead_code > 0

    @property
    def needs_init(self) -> bool:
        """Whether k-means is still to come, as the buffer `initted` says.

        The buffer decides, since loading, copying, averaging and broadcasting all reach it. Python
        reads it until it says that k-means is over, and remembers which tensor said so: training
        waits for a GPU in its first two steps, and never after. A compiled graph cannot read it:
        there k-means runs once more if need be, leaves the codes alone where the buffer forbids it,
        and tells Python what the buffer says (`_tell`).
        """
        if torch.compiler.is_compiling():
            return self._known_initted is None
        if self._known_initted is not self.initted:
            over = self.initted.is_meta or bool(self.initted != 0)
            self._known_initted = self.initted if over else None
        return self._known_initted is None

    def codes(self) -> Tensor:
        """The codes as rows are compared with them, (H, K, D): of length 1 with cosine."""
        if self.use_cosine_sim and self.learnable:
            # A copy, because revival may write to the parameter before the backward pass.
            return unit(self.embed.clone())
        return self.embed

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Puts codes (H, K, D) in place, with averages that agree; k-means won't replace them."""
        size = max(1.0, float(self.threshold_ema_dead_code))  # not dead at once
        self.embed.copy_(self._normal(codes.to(self.embed)))
        self.cluster_size.fill_(size)
        self.embed_avg.copy_(self.embed * size)
        self.initted.fill_(1.0)
        self.pending = None

    def flat_index(self, index: Tensor) -> Tensor:
        """Indices (..., H) in each head's codebook as flat ones; negative ones stay -1."""
        h, k, _ = self.embed.shape
        first = k * torch.arange(h, device=index.device)
        return torch.where(index < 0, -1, index + first)

    def local_index(self, flat_index: Tensor) -> Tensor:
        """Flat indices as indices in each head's codebook: a new tensor."""
        if len(self.embed) == 1:
            return flat_index.clone()
        return torch.where(flat_index < 0, -1, flat_index % self.embed.shape[1])

    @torch.no_grad()
    def search(
        self, rows: Tensor, mask: Tensor | None, codes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Nearest codes of rows (M, D): flat indices, -1 where mask (M) is False, and the
        distances (M)."""
        metric = "cosine" if self.use_cosine_sim else "l2"
        codes = self.codes() if codes is None else codes
        heads = len(codes)
        rows = rows.detach()
        if heads == 1:
            return nearest_code(rows, codes[0], metric, mask=mask)
        mask = None if mask is None else by_head(mask, heads)
        index, distance = nearest_code(by_head(rows, heads), codes, metric, mask=mask)  # (H, N)
        return self.flat_index(index.t()).reshape(-1), distance.t().reshape(-1)

    @torch.no_grad()
    def initialise(self, rows: Tensor, mask: Tensor | None) -> None:
        """k-means over rows (M, D); codes that get no row keep the one that they began with.

        Nothing changes where `initted` says that it is over, or where there is no finite row.
        """
        rows = rows.detach()
        valid = rows.isfinite().all(-1)
        if mask is not None:
            valid = valid & mask
        everything = torch.ones_like(self.cluster_size, dtype=torch.bool)
        codes, counts, total = self._kmeans(rows, valid, everything)
        counts = counts.clamp(min=1).to(self.cluster_size.dtype)
        start = (self.initted == 0) & (total > 0).all()
        self.cluster_size.copy_(torch.where(start, counts, self.cluster_size))
        self.embed_avg.copy_(torch.where(start, codes * counts.unsqueeze(-1), self.embed_avg))
        self.embed.copy_(torch.where(start, codes, self.embed))
        if self.ema_update:
            self.refresh(start)
        over = torch.where(start, 1.0, self.initted)
        self.initted.copy_(_tell(over, self._number) if torch.compiler.is_compiling() else over)

    def _kmeans(
        self, rows: Tensor, valid: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (H, K, D), their rows (H, K), and how many rows there were (H)."""
        (sample,) = sample_rows([Wanted(rows, valid, wanted)], self.sync, repeat=True)
        codes = torch.where(sample.found, sample.rows.to(self.embed.dtype), self.embed)
        counts = torch.ones_like(self.cluster_size)
        for _ in range(self.kmeans_iters):
            index, _ = self.search(rows, valid, codes)
            counts, sums = _sync.summed([*self.sums(rows, index)], self.sync)
            means = sums / counts.clamp(min=1).unsqueeze(-1)
            codes = torch.where(counts.unsqueeze(-1) > 0, self._normal(means), codes)
        return codes, counts, sample.total

    @torch.no_grad()
    def average(
        self,
        counts: Tensor,
        sums: Tensor,
        refresh: bool = True,
        enabled: Tensor | None = None,
        accumulate: bool = False,
    ) -> None:
        """Moves the averages by counts (H, K) and sums (H, K, D), those of all processes.

        Args:
            refresh: whether codes follow their averages at once, or when `refresh` is called.
            enabled: () bool; False changes nothing.
            accumulate: only adds them to those of the next step.
        """
        if accumulate or self.pending is not None:
            counts, sums = self._accumulated(counts, sums, accumulate)
        if accumulate:
            return
        refresh = refresh and self.ema_update
        if self._averaged_by_kernel(counts, sums, refresh, enabled):
            return
        weight = 1 - self.decay if enabled is None else (1 - self.decay) * enabled
        self.cluster_size.lerp_(counts.to(self.cluster_size.dtype), weight)
        self.embed_avg.lerp_(sums.to(self.embed_avg.dtype), weight)
        if refresh:
            self.refresh(enabled)

    def _averaged_by_kernel(
        self, counts: Tensor | None, sums: Tensor | None, refresh: bool, enabled: Tensor | None
    ) -> bool:
        """Whether Triton serves, which needs two launches for what else are ten."""
        buffers = self.cluster_size, self.embed_avg, self.embed
        dtypes = [x.dtype for x in (self.embed, sums) if x is not None]
        kernel = _backend.triton_operator("moving_averages", self.embed.device, *dtypes)
        if kernel is None or not all(x.is_contiguous() for x in buffers):
            return False
        kernel(
            *buffers, counts, sums, enabled, 1 - self.decay, self.eps, refresh,
            self.use_cosine_sim, EPS,
        )
        return True

    @torch.no_grad()
    def refresh(self, enabled: Tensor | None = None) -> None:
        """Sets the codes to their averages, cluster sizes smoothed so that none is 0."""
        if self._averaged_by_kernel(None, None, True, enabled):
            return
        total = self.cluster_size.sum(-1, keepdim=True)  # (H, 1)
        k = self.cluster_size.shape[-1]
        size = (self.cluster_size + self.eps) / (total + k * self.eps) * total  # (H, K)
        codes = self._normal(self.embed_avg / size.unsqueeze(-1))
        self.embed.copy_(codes if enabled is None else torch.where(enabled, codes, self.embed))

    def dead(self, enabled: Tensor | None) -> Tensor:
        """(H, K) bool: codes that hardly any row chooses; none where `enabled` is False."""
        dead = self.cluster_size < self.threshold_ema_dead_code
        return dead if enabled is None else dead & enabled

    @torch.no_grad()
    def replace(self, found: Tensor, rows: Tensor) -> None:
        """Puts rows (H, K, D) in the place of codes, where found (H, K, 1).

        Their statistics restart with them: an old average would pull the code back.
        """
        rows = rows.to(self.embed.dtype)
        weight = float(self.threshold_ema_dead_code)
        self.embed.copy_(torch.where(found, rows, self.embed))
        self.embed_avg.copy_(torch.where(found, rows * weight, self.embed_avg))
        size = torch.where(found.squeeze(-1), weight, self.cluster_size)
        self.cluster_size.copy_(size)

    def sums(self, rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Counts (H, K) and sums (H, K, D) of this process's rows."""
        h, k, d = self.embed.shape
        counts, sums = code_sums(rows, index, h * k)
        return counts.view(h, k), sums.view(h, k, d)

    def _accumulated(self, counts: Tensor, sums: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """Counts and sums with those that are pending, which they become or end."""
        parts = torch.cat([counts.to(sums.dtype).unsqueeze(-1), sums], dim=-1)
        if self.pending is not None:
            parts = parts + self.pending
        self.pending = parts if keep else None
        return parts[..., 0], parts[..., 1:]

    def _normal(self, codes: Tensor) -> Tensor:
        return unit(codes) if self.use_cosine_sim else codes

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Also reads older releases, whose codes are (K, D), and EnCodec's, which writes `inited`.

        A buffer that says "not yet" counts again. One that says "over" is looked at in training,
        where there are several processes: if only one of them loads, all must still do the same.
        """
        if prefix + "inited" in state_dict:
            state_dict[prefix + "initted"] = state_dict.pop(prefix + "inited")
        for name in ("embed", "embed_avg", "cluster_size"):
            value = state_dict.get(prefix + name)
            if value is not None and value.dim() == getattr(self, name).dim() - 1:
                state_dict[prefix + name] = value.unsqueeze(0)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.pending = None
        if self.initted.is_meta:
            return
        if not bool(self.initted != 0):
            self._known_initted = None
        elif _sync.world_size(self.sync) == 1:
            self._known_initted = self.initted

    def _apply(self, fn, recurse=True):
        """Moves as asked, but half precision is too coarse to average codes in."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.embed.device)).dtype
        return super()._apply(without_halving(fn), recurse)

    def _register(self) -> None:
        """Takes a number by which a graph knows this codebook; copies take another."""
        self._number = next(_numbers)
        _codebooks[self._number] = self

    def __setstate__(self, state):
        super().__setstate__(state)
        self._register()

    def extra_repr(self) -> str:
        h, k, d = self.embed.shape
        return f"{k} codes of {d} channels" + (f", {h} codebooks" if h > 1 else "")


define(
    "moving_averages",
    "(Tensor(a!) cluster_size, Tensor(b!) embed_avg, Tensor(c!) embed, Tensor? counts, "
    "Tensor? sums, Tensor? enabled, float weight, float eps, bool refresh, bool cosine, "
    "float smallest) -> ()",
    lambda *_: None,
    module="_moving_averages",
)

_numbers = itertools.count()
_codebooks: weakref.WeakValueDictionary[int, Codebook] = weakref.WeakValueDictionary()


@torch.library.custom_op("tilewise::tell_initted", mutates_args=())
def _tell(initted: Tensor, number: int) -> Tensor:
    """A copy of `initted`, read on the host when a graph runs, for codebook `number`."""
    book = _codebooks.get(number)
    if book is not None and bool(initted != 0):
        book._known_initted = book.initted
    return initted.clone()


@_tell.register_fake
def _(initted, number):
    return torch.empty_like(initted)
