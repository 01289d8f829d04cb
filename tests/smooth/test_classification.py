"""Metrics of classifiers: the limit is scikit-learn's figure, the smooth one the formula's."""

import math

import pytest
import torch
from sklearn import metrics

import tilewise as tw


def problem(samples=200, classes=5, seed=0):
    torch.manual_seed(seed)
    labels = torch.randint(classes, (samples,))
    logits = torch.randn(samples, classes) + 1.5 * torch.nn.functional.one_hot(labels, classes)
    return logits, labels


def test_limits_are_scikit_learns():
    logits, labels = problem()
    chosen = logits.argmax(-1)
    smooth = tw.smooth
    assert smooth.accuracy(logits, labels, 0).item() == pytest.approx(
        metrics.accuracy_score(labels, chosen)
    )
    for k in (1, 2, 4):
        assert smooth.topk_accuracy(logits, labels, k, 0).item() == pytest.approx(
            metrics.top_k_accuracy_score(labels, logits, k=k)
        )
    for average in ("macro", "micro", None):
        expected = metrics.f1_score(labels, chosen, average=average)
        assert smooth.f1(logits, labels, 0, average=average).tolist() == pytest.approx(expected)


def test_f1_of_classes_that_are_not_there():
    logits, labels = problem(classes=4)
    logits, labels = torch.cat([logits, torch.full((200, 2), -9.0)], 1), labels.clone()
    logits[0, 5] = 99.0  # class 4 is neither there nor chosen, class 5 is chosen
    expected = metrics.f1_score(
        labels, logits.argmax(-1), average=None, labels=range(6), zero_division=0
    )
    found = tw.smooth.f1(logits, labels, 0, average=None)
    assert found.tolist() == pytest.approx(expected.tolist()) and found[4:].tolist() == [0, 0]
    assert tw.smooth.f1(logits, labels, 0).item() == pytest.approx(expected.mean())


def test_f1_of_yes_and_no():
    torch.manual_seed(0)
    labels = torch.rand(100, 3) < torch.tensor([0.5, 0.2, 0.05])
    logits = torch.randn(100, 3) + labels.float() - 0.5
    for average in ("macro", "micro", None):
        expected = metrics.f1_score(labels, logits > 0, average=average)
        assert tw.smooth.f1(logits, labels, 0, average=average).tolist() == pytest.approx(expected)
    p = torch.sigmoid(logits / 0.4)
    by_hand = 2 * (p * labels).sum(0) / (p + labels.float()).sum(0)
    torch.testing.assert_close(tw.smooth.f1(logits, labels, 0.4, average=None), by_hand)
    binary = tw.smooth.f1(logits[:, :1], labels[:, :1], 0)
    assert binary.item() == pytest.approx(metrics.f1_score(labels[:, 0], logits[:, 0] > 0))


def test_auc_is_scikit_learns_with_ties():
    torch.manual_seed(0)
    labels = torch.rand(300) < 0.3
    scores = (torch.randn(300) + labels.float()).mul(4).round()
    expected = metrics.roc_auc_score(labels, scores)
    assert tw.smooth.auc(scores, labels, 0).item() == pytest.approx(expected)
    low = scores.masked_fill(scores < -4, -math.inf)
    expected = metrics.roc_auc_score(labels, scores.clamp(min=-5))
    assert tw.smooth.auc(low, labels, 0).item() == pytest.approx(expected)
    assert tw.smooth.auc(low, labels, 0.1).item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("tau", [0, 0.7])
def test_auc_is_mann_and_whitneys_statistic_of_smooth_ranks(tau):
    torch.manual_seed(0)
    scores, labels = torch.randn(50).double(), torch.rand(50) < 0.4
    positives = int(labels.sum())
    ranks = tw.smooth.rank(scores, tau)[labels].sum()
    expected = (ranks - positives * (positives + 1) / 2) / (positives * (50 - positives))
    torch.testing.assert_close(tw.smooth.auc(scores, labels, tau), expected)


def test_smooth_accuracy_is_the_expected_one_of_drawn_classes():
    logits, labels = problem()
    p = torch.softmax(logits.double(), -1)[torch.arange(200), labels]
    torch.testing.assert_close(tw.smooth.accuracy(logits.double(), labels), p.mean())
    drawn = tw.gumbel_argmax(logits.expand(2000, 200, 5), seed=0)
    hits = (drawn == labels).double().mean(1)
    assert abs(hits.mean() - p.mean()) < 4 * hits.std() / math.sqrt(2000)


def test_micro_f1_of_labels_is_the_accuracy():
    logits, labels = problem()
    for tau in (0, 0.5):
        torch.testing.assert_close(
            tw.smooth.f1(logits, labels, tau, average="micro"),
            tw.smooth.accuracy(logits, labels, tau),
        )


def test_a_collapsed_model_has_the_accuracy_of_chance():
    labels = torch.zeros(10, dtype=torch.int64)
    for tau in (0, 0.1, 1.0):
        assert tw.smooth.accuracy(torch.zeros(10, 4), labels, tau).item() == pytest.approx(0.25)
        found = tw.smooth.topk_accuracy(torch.zeros(10, 4), labels, 3, tau).item()
        assert found == pytest.approx(0.75)


@pytest.mark.parametrize("tau", [0, 0.5])
def test_masked_samples_are_as_if_not_there(tau):
    logits, labels = problem()
    mask = torch.rand(200) < 0.7
    dirty = logits.masked_fill(~mask[:, None], math.nan)
    names = labels.masked_fill(~mask, -100)
    smooth = tw.smooth
    for call in (smooth.accuracy, smooth.f1, lambda *a, **o: smooth.topk_accuracy(*a[:2], 2, *a[2:],
                                                                                  **o)):
        found = call(dirty, names, tau, mask=mask)
        torch.testing.assert_close(found, call(logits[mask], labels[mask], tau))
    yes = logits[:, 1:3] > 0
    scores = logits[:, :2]
    found = smooth.f1(scores.masked_fill(~mask[:, None], math.nan), yes, tau, mask=mask)
    torch.testing.assert_close(found, smooth.f1(scores[mask], yes[mask], tau))
    found = smooth.auc(dirty[:, 0], yes[:, 0], tau, mask=mask)
    torch.testing.assert_close(found, smooth.auc(logits[mask, 0], yes[mask, 0], tau))
    x = dirty.requires_grad_()
    if tau:
        smooth.f1(x, names, tau, mask=mask).backward()
        assert x.grad.isfinite().all() and not x.grad[~mask].any()


def test_nothing_to_measure():
    logits, labels = problem(0)
    assert tw.smooth.accuracy(logits, labels).isnan() and tw.smooth.f1(logits, labels) == 0
    assert tw.smooth.auc(torch.randn(3), torch.ones(3, dtype=torch.bool)).isnan()
