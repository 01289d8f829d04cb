"""The Triton backend of clip_loss, in the interpreter: what no other op promises."""

import pytest
import torch

import tilewise as tw
from tests.backends.contrast_adapters import CLIP, Smoothed, features
from tests.common.contrastive_cases import related
from tests.common.cross_entropy_cases import outputs
from tests.triton_tools.checker import MemoryFault, checked
from tilewise.kernels import _ids
from tilewise.kernels._contrast import Launch


def truth_of(case, tensors):
    exact = [x.double() for x in tensors.values()]
    return outputs(tw.reference.clip_loss, case, exact, torch.float64)


def test_checker_sees_a_workspace_without_room_for_whole_tiles(monkeypatch):
    case = CLIP.make(33, 40, 16)
    monkeypatch.setattr(Launch, "workspace", lambda self, image, size: image.new_empty(size))
    with pytest.raises(MemoryFault), checked(CLIP.outputs):
        CLIP.run(case, features(case, torch.bfloat16))


def test_the_loss_alone_takes_one_pass():
    case = CLIP.make(20, 20, 8)
    for needs, passes in (((False,) * 3, 1), ((False, False, True), 2)):
        with checked(CLIP.outputs) as launches:
            CLIP.run(case, features(case, torch.bfloat16), needs)
        assert sum(launch.kernel.endswith("_tile") for launch in launches) == passes


@pytest.mark.parametrize("rows, cols", [(40, 70), (1, 1), (33, 5)])
def test_ids_are_compared_or_sorted(monkeypatch, rows, cols):
    """Few are compared, many are sorted: the same matches, and so the same bits."""
    equal = torch.arange(rows) * 7 % 11 - 5, torch.arange(cols) ** 3 % 13 * 2**40
    equal[1][::2] = equal[0][torch.arange((cols + 1) // 2) % rows]
    case = CLIP.make(rows, cols, 8, positives=equal)
    tensors = features(case, torch.float32)
    few = CLIP.run(case, tensors)
    monkeypatch.setattr(_ids, "FEW", 0)
    with checked(CLIP.outputs) as launches:
        many = CLIP.run(case, tensors)
    assert all(map(torch.equal, few, many))
    assert "match_ids" in {launch.kernel for launch in launches}


def test_a_well_separated_pair_keeps_its_digits():
    """1 - p is 4e-5 of a p of 1: it needs the logits' differences, not logits of size 100."""
    case = Smoothed("", None, 100.5, smoothing=0.0)
    tensors = {"image": torch.tensor([[1.0, 0.9], [0.9, 1.0]]), "text": torch.eye(2)}
    _, d_image, *_ = CLIP.run(case, tensors)
    assert (d_image / truth_of(case, tensors)["d_image"] - 1).abs().max() < 5e-3


def test_float16_gradients_of_large_batches_do_not_flush_to_zero():
    """Each is below 1 / B of a probability of e-14: far below float16's range."""
    make = related(96, 96, 16, noise=0.0)
    case = Smoothed("tiny", make, logit_scale=14.0, smoothing=0.0)
    tensors = features(case, torch.float16)
    truth = truth_of(case, tensors)["d_image"]
    assert (CLIP.run(case, tensors)[1].double() - truth).norm() < 1e-3 * truth.norm()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [10.0, -10.0])
@pytest.mark.parametrize("n", [4, 5], ids=["text", "text-and-image"])
def test_logits_of_minus_infinity(n, scale, smoothing):
    """A pair that has no part in the loss adds nothing to it or to a gradient."""
    image, text = torch.rand(n, 4) + 2, torch.randn(5, 4)
    text[4] = -3e38 if scale > 0 else 3e38
    ids = torch.arange(n), torch.tensor([0, 1, 2, 3, 9])
    if n == 5:
        image[4] = 0  # neither it nor the last text has a match
    case = Smoothed("", None, scale, positives=ids, smoothing=0.0)
    loss, d_image, d_text, d_scale = CLIP.run(case, {"image": image, "text": text})
    fewer = Smoothed("", None, scale, positives=(ids[0], ids[1][:4]), smoothing=0.0)
    expected = CLIP.run(fewer, {"image": image, "text": text[:4]})
    for ours, theirs in zip((loss, d_image, d_text[:4], d_scale), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not d_text[4].any()


def test_a_match_of_minus_infinity_costs_infinity():
    image, text = torch.eye(3) + 1, torch.rand(3, 3)
    text[1] = -3e38
    loss, *_ = CLIP.run(Smoothed("", None, smoothing=0.0), {"image": image, "text": text})
    assert loss == float("inf")
