"""InfoNCE of the queries and keys of several processes; see `_ring`.

A process computes its queries with every key, in two rounds: sums of exponentials, then gradients,
of which those by the keys travel to their owner.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewise.distributed import Peers, circulate
from tilewise.nn.losses._ring import Gradients, pieces, wanted
from tilewise.nn.losses._softmax import merge_sums, nothing_yet
from tilewise.ops._arguments import NOWHERE
from tilewise.ops._blocks import block_gradients, block_sums
from tilewise.ops._matched import matched_by_ids, matched_by_offset


def info_nce(
    peers: Peers, rows: list[int], inputs: Sequence[Tensor], needs: Sequence[bool], matches: tuple,
    label_smoothing: float,
) -> tuple[Tensor, Gradients]:
    """The sum over one's own queries and all keys, over the mean number of queries with a match.

    The mean over the processes is the loss of all, and so are the gradients.

    Args:
        rows: how many keys each process has.
        inputs: query, keys, logit_scale.
        matches: query i matches this process's key i + the first; or two vectors of ids behind it,
            which match everywhere.
    """
    found = _Queries(peers, rows, inputs, matches, label_smoothing)
    loss, weight = found.loss()
    gradients: Gradients = [None] * 3
    if any(needs):
        gradients = found.gradients(weight, needs)
    return loss.to(found.scale.dtype), gradients


class _Queries:
    """One's own queries in both rounds.

    Gradients by the logits are weight * (softmax - targets). Where matches are an offset, targets
    of 1 are subtracted in the kernels; `rest`, what targets are beyond that, is here.
    """

    def __init__(self, peers, rows, inputs, matches, smoothing: float):
        self.peers, self.rows, self.smoothing = peers, rows, smoothing
        self.query, self.keys, self.scale = inputs
        self.offset, self.query_ids, key_ids = matches
        self.ids = () if key_ids is None else (key_ids,)
        self.total = max(sum(rows), 1)
        self.of_match = 1 - smoothing  # a match's part of the targets, and what is left of it
        self.rest = self.of_match - (self.offset is not None)

    def loss(self) -> tuple[Tensor, Tensor]:
        """() float64, and what each query counts in it, (B,) float64. The first round."""
        query, keys = self.query, self.keys
        self.sums = nothing_yet(query)
        self.all_keys = self.sums.new_zeros(query.shape[1])
        # Of the keys that match, the mean; with ids it is a sum until all were seen.
        offset = NOWHERE if self.offset is None else self.offset
        self.mean, self.count = matched_by_offset(keys, None, offset, len(query))

        def visit(owner: int, first: int, keys: Tensor, *ids: Tensor) -> tuple[Tensor, ...]:
            sums, _, _ = block_sums(self.query, keys, self.scale, NOWHERE)
            merge_sums(self.sums, sums.t())
            if self.smoothing:
                self.all_keys.add_(keys.sum(0, dtype=torch.float64))
            if ids:
                found, count = matched_by_ids(keys, None, self.query_ids, *ids)
                self.mean.add_(found * count.unsqueeze(1))
                self.count += count
            return ()

        circulate(self.peers, self.rows, (keys, *self.ids), visit)
        if self.ids:
            self.mean /= self.count.clamp(min=1).unsqueeze(1)
        matched = self.count > 0
        counted = self.peers.table(matched.sum()).sum().clamp(min=1)
        weight = matched.double() * self.peers.size / counted
        self.all_keys /= self.total
        z = self._with_targets(self.of_match)[1] * self.scale
        terms = self.sums[:, 0] + self.sums[:, 1].log() - z
        return torch.where(matched, weight * terms, 0.0).sum(), weight

    def gradients(self, weight: Tensor, needs: Sequence[bool]) -> Gradients:
        """By query, keys and scale. The second round."""
        sums = self.sums.t().contiguous()
        targets, products = self._with_targets(self.rest)
        d_query = targets.mul_(-self.scale * weight.unsqueeze(1)).to(self.scale.dtype)
        d_scale = -(weight * products).sum()
        weighted = (weight.unsqueeze(1) * self.query).to(self.scale.dtype)
        weighted_sum = weighted.sum(0, dtype=torch.float64) / self.total

        def visit(owner: int, first: int, keys: Tensor, *ids: Tensor) -> tuple[Tensor, ...]:
            own = owner == self.peers.rank and self.offset is not None
            offset = self.offset - first if own else NOWHERE
            unused = sums.new_zeros(2, len(keys))
            _, by_keys, by_scale = block_gradients(
                self.query, keys, self.scale, offset, sums, unused, weight, unused[0], needs,
                d_query,
            )
            if needs[2]:
                d_scale.add_(by_scale)
            if not needs[1]:
                return ()
            if self.smoothing:
                by_keys -= self.scale * self.smoothing * weighted_sum
            if ids or (own and self.rest):
                by_keys -= self.scale * self.rest * self._of_matches(keys, ids, weighted, offset)
            return (by_keys,)

        block = (self.keys, *self.ids)
        (d_keys,) = circulate(
            self.peers, self.rows, block, visit, pieces=pieces(self.rows)
        ) or (None,)
        return wanted([d_query, d_keys, d_scale.to(self.scale.dtype)], needs)

    def _with_targets(self, of_match: float) -> tuple[Tensor, Tensor]:
        """The keys' mean under the targets (B, D), and each query times it (B,), float64."""
        targets = of_match * self.mean.double() + self.smoothing * self.all_keys
        return targets, (self.query * targets).sum(1)

    def _of_matches(
        self, keys: Tensor, ids: Sequence[Tensor], weighted: Tensor, offset: int
    ) -> Tensor:
        """(rows of keys, D): of each key, the sum of the queries' weighted targets."""
        if not ids:
            found, _ = matched_by_offset(weighted, None, -offset, len(keys))
            return found
        of_each = weighted / self.count.clamp(min=1).unsqueeze(1)
        found, count = matched_by_ids(of_each, None, ids[0], self.query_ids)
        return found * count.unsqueeze(1)
