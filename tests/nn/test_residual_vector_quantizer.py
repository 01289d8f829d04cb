"""ResidualVectorQuantizer and its grouped form against lucidrains' modules."""

import copy
import pickle
import random

import pytest
import torch

from tests.common.quantizer_cases import (
    CLOSE,
    LAYERS,
    NoHostReads,
    assert_same_state,
    grouped,
    residual,
    rows,
    step,
)
from tilewise.nn.quantizers._sampling import Wanted, sample_rows


@pytest.mark.parametrize("settings", [
    dict(),
    dict(rotation_trick=False, quant_grad_frac=1.0),
    dict(quant_grad_frac=0.3, commitment_weight=0.25),
    dict(use_cosine_sim=True),
    dict(codebook_dim=5),
    dict(shared_codebook=True),
    dict(codebook_size=(8, 32, 16), num_quantizers=None),
], ids=str)
def test_training_equals_lucidrains(settings):
    peer = pytest.importorskip("vector_quantize_pytorch")
    ours = residual(**settings)
    theirs = peer.ResidualVQ(
        **{**dict(dim=16, codebook_size=32, num_quantizers=LAYERS), **settings}
    )
    theirs.load_state_dict(ours.state_dict())
    for seed in range(3):
        x = rows(4, 50, 16, seed=seed)
        (q, index, loss, codes), grad = step(ours, x, return_all_codes=True)
        (their_q, their_index, their_loss, their_codes), their_grad = step(
            theirs, x, return_all_codes=True
        )
        assert torch.equal(index, their_index)
        for a, b in ((q, their_q), (loss, their_loss), (codes, their_codes), (grad, their_grad)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert_same_state(ours, theirs)
    index = ours.eval()(x)[1]
    assert torch.equal(index, theirs.eval()(x)[1])
    for method in ("get_output_from_indices", "get_codes_from_indices"):
        torch.testing.assert_close(
            getattr(ours, method)(index), getattr(theirs, method)(index), **CLOSE
        )


@pytest.mark.parametrize("settings", [
    dict(), dict(quantize_dropout_cutoff_index=1), dict(quantize_dropout_multiple_of=3),
], ids=str)
def test_dropout_equals_lucidrains(settings, monkeypatch):
    peer = pytest.importorskip("vector_quantize_pytorch")
    settings = dict(quantize_dropout=True, **settings)
    ours = residual(**settings)
    theirs = peer.ResidualVQ(dim=16, codebook_size=32, num_quantizers=LAYERS, **settings)
    theirs.load_state_dict(ours.state_dict())
    for seed in range(4):
        draw = random.Random(seed).randrange(settings.get("quantize_dropout_cutoff_index", 0), 4)
        monkeypatch.setattr(torch, "randint", lambda *_, draw=draw, **__: torch.tensor(draw))
        (q, index, loss), grad = step(ours, rows(4, 50, 16, seed=seed))
        monkeypatch.undo()
        x = rows(4, 50, 16, seed=seed).requires_grad_()
        their_q, their_index, their_loss = theirs(x, rand_quantize_dropout_fixed_seed=seed)
        ((their_q * rows(4, 50, 16, seed=9)).sum() + 3.0 * their_loss.sum()).backward()
        assert torch.equal(index, their_index)
        for a, b in ((q, their_q), (loss, their_loss), (grad, x.grad)):
            torch.testing.assert_close(a, b, **CLOSE)
        assert_same_state(ours, theirs)


@pytest.mark.parametrize("cutoff, multiple, kept", [
    (0, 1, {1, 2, 3, 4}), (2, 1, {3, 4}), (0, 2, {2, 4}), (0, 3, {3, 4}), (3, 1, {4}),
])
def test_dropout_keeps_as_many_as_asked(cutoff, multiple, kept):
    module = residual(
        quantize_dropout=True,
        quantize_dropout_cutoff_index=cutoff,
        quantize_dropout_multiple_of=multiple,
    )
    seen = set()
    for _ in range(40):
        _, index, loss = module(rows(5, 16))
        number = int((index[0] >= 0).sum())
        assert (index[:, :number] >= 0).all() and (index[:, number:] == -1).all()
        assert (loss[number:] == 0).all()
        seen.add(number)
    assert seen == kept
    assert (module.eval()(rows(5, 16))[1] >= 0).all()


def test_layers_left_out_do_not_learn():
    module = residual(quantize_dropout=True)
    before = copy.deepcopy(module.state_dict())
    module.draw_last = lambda *_: 1
    module(rows(20, 16))
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]) == (int(key[7]) > 1 or "initted" in key), key


@pytest.mark.parametrize("make, settings, shape", [
    (residual, dict(), (2, 9, 16)),
    (residual, dict(codebook_dim=5, accept_image_fmap=True), (2, 16, 3, 4)),
    (residual, dict(channel_last=False), (2, 16, 9)),
    (grouped, dict(), (2, 9, 16)),
    (grouped, dict(codebook_dim=3, accept_3d_fmap=True), (2, 16, 3, 4, 2)),
])
def test_output_from_indices(make, settings, shape):
    module = make(**settings).eval()
    q, index, loss, codes = module(rows(*shape), return_all_codes=True)
    groups = (2,) if make is grouped else ()
    inner = shape[1:-1] if module._layout.channel_last else shape[2:]
    assert q.shape == shape and index.shape == (*groups, shape[0], *inner, LAYERS)
    assert loss.shape == (*groups, LAYERS)
    assert codes.shape[:-1] == (*groups, LAYERS, shape[0], *inner)
    torch.testing.assert_close(module.get_output_from_indices(index), q, **CLOSE)
    fewer = torch.cat([index[..., :2], torch.full_like(index[..., 2:], -1)], -1)
    torch.testing.assert_close(
        module.get_output_from_indices(index[..., :2]), module.get_output_from_indices(fewer)
    )


def test_each_layer_brings_x_nearer():
    module = residual(kmeans_init=True)
    x = rows(300, 16)
    for _ in range(5):
        module(x)
    losses = module.eval()(x)[2]
    assert (losses.diff() < 0).all()


@pytest.mark.parametrize("make", [residual, grouped])
@pytest.mark.parametrize("keep", [True, False])
def test_masked_rows_have_no_part(make, keep):
    settings = dict(return_zeros_for_masked_padding=keep, codebook_dim=6)
    ours, alone = make(**settings), make(**settings)
    x, mask = rows(3, 40, 16), rows(3, 40) > 0
    (q, index, loss), grad = step(ours, x, mask=mask)
    q_alone, index_alone, loss_alone = alone(x[mask])
    index = index.flatten(0, -4) if make is grouped else index[None]
    assert torch.equal(index[:, mask].view(index_alone.shape), index_alone)
    assert (index[:, ~mask] == -1).all()
    torch.testing.assert_close(q[mask], q_alone, **CLOSE)
    torch.testing.assert_close(loss, loss_alone)
    assert torch.equal(q[~mask], torch.zeros_like(x[~mask]) if keep else x[~mask])
    assert_same_state(ours, alone)


def test_layers_teach_a_shared_codebook_in_turn():
    """A code that is dead after one layer's rows is replaced before the next layer counts."""
    module = residual(shared_codebook=True, threshold_ema_dead_code=1.0)
    other = copy.deepcopy(module)
    x = rows(20, 16)
    torch.manual_seed(1)
    module(x)
    book = other.layers[0]._codebook
    choices = other.choose(x, None, None, None, None).choices
    torch.manual_seed(1)
    for lesson in (chosen.lesson for chosen in choices):
        book.average(lesson.counts, lesson.sums, refresh=False)
        wanted = Wanted(lesson.rows, lesson.flat_index >= 0, book.dead(None))
        assert wanted.codes.any()
        (sample,) = sample_rows([wanted], sync=False)
        book.replace(sample.found, sample.rows)
    book.refresh()
    assert_same_state(module, other)


def test_shared_codebook_revives_dead_codes():
    module = residual(shared_codebook=True, threshold_ema_dead_code=1.0)
    book = module.layers[2]._codebook
    assert book is module.layers[0]._codebook
    book.embed[0, :10] = 50.0
    book.embed_avg.copy_(book.embed)
    book.cluster_size[0, :10] = 0.1
    module(rows(200, 16))
    assert (book.embed.abs() < 6).all() and (book.cluster_size > 0.4).all()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert copied.layers[2]._codebook is copied.layers[0]._codebook
    assert_same_state(copied, module, rtol=0, atol=0)


def test_usage():
    module = residual(codebook_size=(8, 16), num_quantizers=None)
    for mode in (True, False):
        _, index, _, usage = module.train(mode)(rows(50, 16), return_usage=True)
        for layer, one in enumerate(usage):
            counts = torch.bincount(index[:, layer], minlength=(8, 16)[layer])
            assert torch.equal(one.counts, counts)
    usage = grouped()(rows(50, 16), return_usage=True)[-1]
    assert len(usage) == 2 and len(usage[0]) == LAYERS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_leaves_no_large_residual(dtype):
    module = residual(codebook_size=64, kmeans_init=True, num_quantizers=8)
    x = rows(400, 16)
    module(x)
    full = (module.eval()(x)[0] - x).square().mean()
    q = module(x.to(dtype))[0]
    assert q.dtype == dtype
    assert (q.float() - x).square().mean() < full + 1e-4


@pytest.mark.parametrize("settings", [
    dict(kmeans_init=True, threshold_ema_dead_code=1.0, quantize_dropout=True),
    dict(shared_codebook=True, threshold_ema_dead_code=1.0, codebook_dim=5),
], ids=str)
def test_no_host_reads(settings):
    module = residual(**settings)
    module.draw_last = lambda *_: 2  # a host's number: see test_dropout
    if settings.get("kmeans_init"):  # two steps look whether it is over
        step(module, rows(3, 40, 16)), step(module, rows(3, 40, 16))
    with NoHostReads():
        for _ in range(2):
            step(module, rows(3, 40, 16), mask=rows(3, 40) > 0, return_usage=True)


@pytest.mark.parametrize("settings", [
    dict(quantize_dropout=True, kmeans_init=True, kmeans_iters=1),
    dict(shared_codebook=True, threshold_ema_dead_code=1.0),
], ids=str)
def test_compiles_into_one_graph(settings):
    torch._dynamo.reset()
    eager, module = residual(num_quantizers=2, **settings), residual(num_quantizers=2, **settings)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seed in range(5):
        x = rows(6, 9, 16, seed=seed)
        torch.manual_seed(seed)
        (q, index, loss), grad = step(compiled, x)
        number = int((index[0, 0] >= 0).sum())
        torch.manual_seed(seed)
        if settings.get("quantize_dropout"):  # the eager module has its own way to draw
            eager.draw_last = lambda *_, last=number - 1: last
        (their_q, their_index, their_loss), their_grad = step(eager, x)
        assert torch.equal(index, their_index)
        for a, b in ((q, their_q), (loss, their_loss), (grad, their_grad)):
            torch.testing.assert_close(a, b)
        assert_same_state(module, eager)
    eager.__dict__.pop("draw_last", None)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), eager.eval()(x))


@pytest.mark.parametrize("make, arguments, error, text", [
    (residual, dict(num_quantizers=0), ValueError, "num_quantizers"),
    (residual, dict(codebook_size=(3, 4)), ValueError, "codebook_size: expected one for each"),
    (residual, dict(codebook_size=(3, 4), num_quantizers=2, shared_codebook=True), ValueError,
     "expected one size"),
    (residual, dict(heads=2), TypeError, "heads"),
    (residual, dict(beam_size=2), TypeError, "beam_size"),
    (residual, dict(quantize_dropout_cutoff_index=4), ValueError, "cutoff_index"),
    (residual, dict(quantize_dropout_multiple_of=0), ValueError, "multiple_of"),
])
def test_bad_arguments(make, arguments, error, text):
    with pytest.raises(error, match=text):
        make(**arguments)


def test_bad_input():
    with pytest.raises(ValueError, match="indices: expected at most 4"):
        residual().get_codes_from_indices(torch.zeros(3, 5).long())
