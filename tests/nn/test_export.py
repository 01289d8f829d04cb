"""torch.export, as the README has it: an exported module takes any batch, to the same bits."""

import torch
from torch.utils._pytree import tree_leaves

import tilewise as tw


class Bottlenecks(torch.nn.Module):
    """All that may stand in an exported model: quantisers, samplers, a search and losses."""

    def __init__(self):
        super().__init__()
        self.quantizers = torch.nn.ModuleList([
            tw.nn.VectorQuantizer(16, 64), tw.nn.GumbelQuantizer(16, 64),
            tw.nn.ResidualVectorQuantizer(dim=16, codebook_size=64, num_quantizers=2),
        ])  # fmt: skip
        self.register_buffer("codebook", torch.randn(5, 16))

    def forward(self, x, seed):
        samples = tw.gumbel_softmax(x, seed=seed), tw.gumbel_argmax(x, seed=seed)
        code = tw.nearest_code(x, self.codebook)
        sums = tw.code_sums(x, code.index, num_codes=5)
        sample, pairs = tw.gaussian_sample(x, x, seed=seed), (x[:, 0], x[:, 1], 10.0)
        losses = [loss(*pairs) for loss in (tw.sigmoid_loss, tw.clip_loss, tw.info_nce)]
        losses.append(tw.hard_negatives(*pairs, seed=seed))
        return [q(x) for q in self.quantizers], samples, sample, sums, losses


def test_exported_modules_take_any_batch():
    module, seed = Bottlenecks().eval(), torch.tensor(7)
    shapes = {"x": {0: torch.export.Dim("batch")}, "seed": None}
    exported = torch.export.export(module, (torch.randn(2, 8, 16), seed), dynamic_shapes=shapes)
    x = torch.randn(5, 8, 16)
    ours, theirs = tree_leaves(module(x, seed)), tree_leaves(exported.module()(x, seed))
    assert len(ours) == len(theirs) == 20
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
