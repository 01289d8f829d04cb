"""The smooth metrics' example: its data, its verdicts, a short run."""

import math

import pytest
import torch

from tests.common.peers import need

need("mlxtend", "rich")

import tilewise as tw  # noqa: E402
from examples import smooth, smooth_report  # noqa: E402
from examples.common import report  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread(threads):
    """So little work in each op is done sooner than a second thread wakes up."""
    threads(1)


def test_classes_get_rarer_and_a_fifth_of_the_labels_is_wrong():
    data = smooth.problem(0)
    pixels, labels = data.test
    counts = sorted(labels.bincount(minlength=10).tolist(), reverse=True)
    assert counts == [round(250 * 0.75**i) for i in range(10)]
    seen = torch.cat([data.train[0], data.stopping[0]])
    given = torch.cat([data.train[1], data.stopping[1]])
    assert len(seen) == len(pixels) and torch.cdist(seen, pixels).min() > 1e-3
    nearest = labels[torch.cdist(seen, pixels).argmin(1)]  # right for nine digits of ten
    assert 0.1 < (nearest != given).double().mean() < 0.4
    assert not torch.equal(smooth.problem(1).test[1], labels)


def test_score_function_has_the_expected_f1_of_drawn_labels():
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 10), torch.randint(10, (40,))
    found = torch.stack([smooth.score_function(logits, labels) for _ in range(100)])
    drawn = tw.gumbel_argmax(logits.expand(1600, 40, 10))
    one_hot = torch.nn.functional.one_hot(drawn, 10).float()
    f1 = tw.smooth.f1(one_hot, labels.expand(1600, 40), tau=0)
    assert abs(found.mean() - (1 - f1).mean()) < 4 * f1.std() * (2 / 1600) ** 0.5


def test_verdicts():
    assert smooth_report.verdict([0.1, 0.11, 0.12]) == "better"
    assert smooth_report.verdict([-0.1, -0.11, -0.12]) == "worse"
    assert smooth_report.verdict([-0.1, 0.1, 0.05]) == "equal"
    assert report.two_errors([1.0, 3.0]) == (2.0, 2.0)
    assert math.isnan(report.two_errors([1.0])[1])
    history = [{"stopping f1": a, "test f1": b} for a, b in ((0.1, 1), (0.3, 2), (0.2, 3))]
    assert smooth.stopped(history, "f1") == 2


def test_a_short_run(tmp_path):
    results = smooth.main(["--quick", "--out", str(tmp_path)])
    for loss in ("cross-entropy", "soft F1"):
        assert min(results["accuracy"]["last"][loss]) > 0.7
        assert min(results["f1"]["last"][loss]) > 0.5
    assert min(results["accuracy"]["last"]["soft accuracy"]) > 0.3
    for name in ("curves.png", "rates.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
        assert (tmp_path / name).stat().st_size > 20_000
    text = (tmp_path / "report.txt").read_text()
    assert "macro F1" in text and "cross-entropy fell from" in text
