"""What a type checker sees of the public calls: `make check` has mypy read this file."""

import torch
from torch import Tensor
from typing_extensions import assert_type

import tilewise as tw

FEATURES = torch.eye(4)


def test_results_of_functions() -> None:
    assert_type(tw.sigmoid_loss(FEATURES, FEATURES, 1.0), Tensor)
    assert_type(tw.clip_loss(FEATURES, FEATURES, 1.0), Tensor)
    assert_type(tw.info_nce(FEATURES, FEATURES, 1.0), Tensor)
    assert_type(tw.nearest_code(FEATURES, FEATURES).index, Tensor)
    assert_type(tw.gumbel_softmax(FEATURES), Tensor)


def test_results_of_modules() -> None:
    for loss in (tw.nn.SigLipLoss(), tw.nn.ClipLoss()):
        assert_type(loss(FEATURES, FEATURES, 1.0), Tensor)
        result = loss(FEATURES, FEATURES, 1.0, output_dict=True)
        assert_type(result, dict[str, Tensor])
        assert list(result) == ["contrastive_loss"]
    itc = tw.nn.ItcLoss(dim=4, queue_size=8)
    assert_type(itc(FEATURES, FEATURES, FEATURES, FEATURES), Tensor)
    assert_type(tw.nn.GumbelSoftmax()(FEATURES), Tensor)
    quantizers = tw.nn.VectorQuantizer(4, 8), tw.nn.GumbelQuantizer(4, 8)
    for quantizer in quantizers:
        quantized, indices, losses, *_ = quantizer(FEATURES)
        assert_type(quantized, Tensor)
        assert_type(indices, Tensor)
        assert_type(losses, Tensor)
    quantized, index, penalty = tw.nn.VectorQuantizer(dim=4, codebook_size=8)(FEATURES[None])
    assert_type(quantized, Tensor)
    assert_type(index, Tensor)
    assert_type(penalty, Tensor)
