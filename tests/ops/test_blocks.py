"""Blocks of CLIP's logits: put together, they are the whole loss, in every backend."""

import pytest
import torch

import tilewise as tw
from tests.common.contrastive_cases import DEVICE, Case, related
from tilewise.ops import _arguments
from tilewise.ops._blocks import block_gradients, block_means, block_sums

BACKENDS = ["reference", "cpu", "triton"] if DEVICE == "cpu" else ["reference", "triton"]
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with tw.backend(request.param):
        yield request.param


def merged(parts: list[torch.Tensor]) -> torch.Tensor:
    """(2, n) of all blocks of n rows."""
    largest, total = torch.stack(parts).unbind(1)
    most = largest.amax(0)
    return torch.stack([most, (total * (largest - most).exp()).sum(0)])


@pytest.mark.parametrize("scale", [20.0, -7.0, 0.0], ids=str)
def test_blocks_are_the_whole(backend, scale):
    """Rows and columns cut unevenly; positives are an offset into another block."""
    case = Case("blocks", related(30, 37, 12), logit_scale=scale)
    image, text = (x.requires_grad_() for x in case.features(torch.float32))
    number = torch.tensor(scale, device=DEVICE, requires_grad=True)
    loss = tw.clip_loss(image, text, number, positives=3)
    expected = torch.autograd.grad(loss, [image, text, number])
    image, text, number = (x.detach() for x in (image, text, number))

    rows = [slice(0, 11), slice(11, 12), slice(12, 30)]
    cols = [slice(0, 20), slice(20, 20), slice(20, 37)]
    blocks = {
        (i, j): (image[r], text[c], number, 3 + r.start - c.start)
        for i, r in enumerate(rows) for j, c in enumerate(cols)
    }
    sums = {key: block_sums(*block) for key, block in blocks.items()}
    of_image = [merged([sums[i, j][0] for j in range(3)]) for i in range(3)]
    of_text = [merged([sums[i, j][1] for i in range(3)]) for j in range(3)]
    # Each image and text 3..32 has a match; the other seven texts have none.
    image_weight = torch.full((30,), 0.5 / 30, dtype=torch.float64, device=DEVICE)
    text_weight = torch.zeros(37, dtype=torch.float64, device=DEVICE)
    text_weight[3:33] = 0.5 / 30

    def weighted(sums, weight):
        return (weight * (sums[0] + sums[1].log())).sum()

    value = weighted(torch.cat(of_image, 1), image_weight)
    value += weighted(torch.cat(of_text, 1), text_weight)
    value -= sum(matched for *_, matched in sums.values()) / 30
    torch.testing.assert_close(value.float(), loss.detach(), **CLOSE)

    d_image, d_text = torch.zeros_like(image), torch.zeros_like(text)
    d_scale = torch.zeros_like(number)
    for (i, j), block in blocks.items():
        parts = block_gradients(
            *block, of_image[i], of_text[j], image_weight[rows[i]], text_weight[cols[j]],
            (True, True, True),
        )
        d_image[rows[i]] += parts[0]
        d_text[cols[j]] += parts[1]
        d_scale += parts[2]
    for ours, theirs in zip((d_image, d_text, d_scale), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_what_has_no_weight_has_no_gradient(backend):
    """Though its sums are those of nothing."""
    image, text = Case("w", related(6, 8, 4)).features(torch.float32)
    nothing = torch.tensor([[-torch.inf], [0.0]], dtype=torch.float64, device=DEVICE)
    scale, offset = torch.tensor(30.0, device=DEVICE), _arguments.NOWHERE
    ones, zeros = (torch.full((8,), x, dtype=torch.float64, device=DEVICE) for x in (1.0, 0.0))
    sums = block_sums(image, text, scale, offset)
    d_image, d_text, d_scale = block_gradients(
        image, text, scale, offset, sums[0], nothing.expand(2, 8), ones[:6], zeros,
        (True, True, True),
    )
    rows = torch.softmax(30 * image @ text.T, 1)
    torch.testing.assert_close(d_image, 30 * rows @ text, **CLOSE)
    torch.testing.assert_close(d_text, 30 * rows.T @ image, **CLOSE)
    torch.testing.assert_close(d_scale, (rows * (image @ text.T)).sum(), **CLOSE)
    gradients = block_gradients(
        image, text, scale, offset, nothing.expand(2, 6), nothing.expand(2, 8), zeros[:6], zeros,
        (True, False, False),
    )
    assert not gradients[0].any() and [len(x) for x in gradients[1:]] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [20.0, -7.0, 0.0], ids=str)
def test_means_of_blocks(backend, scale, dtype):
    """Softmaxes over all columns and their means are made of those of each block."""
    query, keys = Case("means", related(11, 300, 12)).features(dtype)
    number = torch.tensor(scale, device=DEVICE)
    blocks = [keys[:290], keys[290:290], keys[290:]]
    parts = [block_means(query, block, number) for block in blocks]
    z = scale * query.double() @ keys.double().T
    sums = merged([sums for sums, _ in parts])
    torch.testing.assert_close(sums[0] + sums[1].log(), z.logsumexp(1), rtol=1e-5, atol=1e-5)
    shares = [x[1] * (x[0] - sums[0]).exp() / sums[1] for x, _ in parts]
    mean = sum(share[:, None] * x for share, (_, x) in zip(shares, parts, strict=True))
    torch.testing.assert_close(mean, z.softmax(1) @ keys.double(), rtol=0, atol=2e-5)
    alone, nothing = block_means(query, keys, number, False)
    assert torch.equal(alone, block_means(query, keys, number)[0]) and not len(nothing)
    torch.testing.assert_close(alone[0], sums[0], rtol=1e-6, atol=1e-6)  # other shapes, other bits
    assert parts[1][0].tolist() == [[-torch.inf] * 11, [0.0] * 11] and not parts[1][1].any()
    assert block_means(query[:0], keys, number)[1].shape == (0, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(backend, dtype):
    image, text = Case("half", related(20, 20, 16)).features(dtype)
    scale, ones = torch.tensor(10.0, device=DEVICE), torch.ones(20, device=DEVICE).double()
    sums = block_sums(image, text, scale, 0)
    d_image, *_ = block_gradients(
        image, text, scale, 0, *sums[:2], ones / 40, ones / 40, (True, False, False)
    )
    exact = image.double().requires_grad_()
    expected, = torch.autograd.grad(tw.reference.clip_loss(exact, text.double(), 10.0), exact)
    assert d_image.dtype == torch.float32
    assert (d_image - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.skipif(DEVICE != "cpu", reason="the C++ backend, on CPU tensors")
def test_refusals_say_what_was_expected():
    x, one = torch.zeros(4, 3), torch.ones(())
    sums, weight = torch.zeros(2, 4), torch.zeros(4)
    op = torch.ops.tilewise.clip_block_gradients
    for arguments, message in [
        ((sums[:1], sums, weight, weight), r"image_sums: expected \(2, 4\)"),
        ((sums, sums, weight, weight[:2]), "text_sums: expected 4 weights"),
    ]:
        with pytest.raises(ValueError, match=message):
            op(x, x, one, 0, *arguments, True, True, True)
    for total, error, message in [
        (torch.zeros(3, 4).t(), ValueError, "total: expected .*, got .*, not contiguous"),
        (torch.zeros(5, 3), ValueError, r"total: expected \[4, 3\].*, got \[5, 3\]"),
        (x.double(), TypeError, "total: expected Float, got Double"),
    ]:
        with pytest.raises(error, match=message):
            torch.ops.tilewise.sigmoid_block_added(x, x, one, None, 0, total, True, True, True)


@pytest.mark.parametrize("name", [b for b in BACKENDS if b != "reference"])
def test_opcheck(name):
    x, y = torch.randn(4, 3, device=DEVICE), torch.randn(5, 3, device=DEVICE)
    ops = torch.ops.tilewise_triton if name == "triton" else torch.ops.tilewise
    scale = torch.tensor(3.0, device=DEVICE)
    sums = ops.clip_block_sums(x, y, scale, 1)
    weights = [torch.ones(n, dtype=torch.float64, device=DEVICE) for n in (4, 5)]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.clip_block_sums.default, (x, y, scale, 1), test_utils=tests)
    torch.library.opcheck(
        ops.clip_block_gradients.default,
        (x, y, scale, 1, *sums[:2], *weights, True, False, True), test_utils=tests,
    )
    torch.library.opcheck(ops.itc_block_means.default, (x, y, scale, True), test_utils=tests)
    if name == "cpu":
        total = torch.zeros(4, 3)
        torch.library.opcheck(
            ops.sigmoid_block_added.default,
            (x, y, scale, None, 0, total, True, True, False), test_utils=tests,
        )
        torch.library.opcheck(
            ops.clip_block_added.default,
            (x, y, scale, 1, *sums[:2], *weights, total, True, True), test_utils=tests,
        )
