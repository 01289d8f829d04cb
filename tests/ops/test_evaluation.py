"""Recall and accuracy against the full matrix of similarities."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.common.contrastive_cases import DEVICE
from tilewise import evaluation


def by_matrix(queries, candidates, k, ids, candidate_ids):
    """Recall at k out of all similarities in float64, the lowest index first among equals."""
    scores = F.normalize(queries.double(), dim=-1) @ F.normalize(candidates.double(), dim=-1).T
    nearest = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    matches = ids[:, None] == candidate_ids
    hits = matches.gather(1, nearest).any(1)
    return float(hits[matches.any(1)].double().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("images, texts, names", [(40, 40, 40), (30, 150, 25), (150, 20, 60)])
def test_recall_is_that_of_the_matrix(images, texts, names, dtype):
    torch.manual_seed(images)
    image_ids, text_ids = torch.randint(names, (images,)), torch.randint(names, (texts,))
    prototypes = torch.randn(names, 16)
    image = (prototypes[image_ids] + 2 * torch.randn(images, 16)).to(dtype)
    text = (prototypes[text_ids] + 2 * torch.randn(texts, 16)).to(dtype)
    found = evaluation.retrieval_recall(image, text, (1, 3, 10), positives=(image_ids, text_ids))
    for k in (1, 3, 10):
        assert found.image_to_text[k] == by_matrix(image, text, k, image_ids, text_ids)
        assert found.text_to_image[k] == by_matrix(text, image, k, text_ids, image_ids)
    assert found.image_to_text[1] < found.image_to_text[10]


def test_pairs_by_position():
    torch.manual_seed(0)
    image = torch.randn(50, 8)
    text = image + 0.9 * torch.randn(50, 8)
    ids = torch.arange(50)
    found = evaluation.retrieval_recall(image, text)
    assert found == evaluation.retrieval_recall(image, text, positives=(ids, ids))
    shifted = evaluation.retrieval_recall(image[:20], text.roll(7, 0), positives=7)
    assert shifted.image_to_text == evaluation.retrieval_recall(
        image[:20], text, positives=(ids[:20], ids)
    ).image_to_text
    assert math.isnan(evaluation.retrieval_recall(image, text, positives=None).image_to_text[1])
    assert evaluation.retrieval_recall(image, text, 5)[0] == {5: found.image_to_text[5]}
    assert evaluation.retrieval_recall(image, image).image_to_text == {1: 1.0, 5: 1.0, 10: 1.0}
    assert 0.1 < found.image_to_text[1] < 0.9


def test_lengths_of_features_change_nothing():
    torch.manual_seed(0)
    image, text = torch.randn(60, 8), torch.randn(60, 8)
    scaled = text * torch.rand(60, 1).add(0.1)
    assert evaluation.retrieval_recall(image, text) == evaluation.retrieval_recall(image, scaled)


def test_a_collapsed_model_finds_nothing():
    """Equal similarities must not count as hits."""
    same = torch.ones(100, 4)
    assert evaluation.retrieval_recall(same, same, (1, 5)).image_to_text == {1: 0.01, 5: 0.05}


def test_queries_without_a_match_do_not_count():
    image, text = torch.eye(4), torch.eye(4)[:2]
    ids = torch.tensor([0, 1, 2, 3])
    found = evaluation.retrieval_recall(image, text, (1,), positives=(ids, ids[:2]))
    assert found == ({1: 1.0}, {1: 1.0})


def test_nothing_to_find():
    empty = torch.zeros(0, 4)
    assert math.isnan(evaluation.retrieval_recall(empty, empty).image_to_text[1])
    ids = torch.arange(3)
    pairs = ids, ids[:0]
    found = evaluation.retrieval_recall(torch.eye(3), torch.zeros(0, 3), 1, positives=pairs)
    assert math.isnan(found.image_to_text[1]) and math.isnan(found.text_to_image[1])


def test_zero_shot_classification_with_prompt_ensembles():
    """Averaging prompts finds classes that single prompts confuse."""
    torch.manual_seed(0)
    classes, prompts, dim = 30, 25, 32
    centres = torch.randn(classes, dim)
    features = centres[:, None] + 3 * torch.randn(classes, prompts, dim)
    labels = torch.arange(600) % classes
    images = centres[labels] + 0.8 * torch.randn(600, dim)
    single = evaluation.zero_shot_accuracy(
        images, evaluation.zero_shot_classifier(features[:, :1]), labels
    )
    ensemble = evaluation.zero_shot_classifier(features)
    found = evaluation.zero_shot_accuracy(images, ensemble, labels)
    assert torch.allclose(ensemble.norm(dim=1), torch.ones(classes))
    assert found[1] > single[1] + 0.2 and found[5] >= found[1]
    scores = F.normalize(images, dim=1) @ ensemble.T
    assert found[1] == float((scores.argmax(1) == labels).double().mean())


def test_classes_with_different_numbers_of_prompts():
    torch.manual_seed(0)
    prompts = [torch.randn(p, 6) for p in (1, 4, 2)]
    classifier = evaluation.zero_shot_classifier(prompts)
    expected = F.normalize(F.normalize(prompts[1], dim=1).mean(0), dim=0)
    assert torch.allclose(classifier[1], expected)
    assert evaluation.zero_shot_accuracy(classifier, classifier, torch.arange(3), (1, 5)) == {
        1: 1.0, 5: 1.0
    }


X = torch.zeros(3, 4)


@pytest.mark.parametrize("call, error, message", [
    (lambda: evaluation.retrieval_recall(X, X[:2]), ValueError, "text_features: expected 3 rows"),
    (lambda: evaluation.retrieval_recall(X, X, positives=(torch.arange(2), torch.arange(3))),
     ValueError, "positives: expected 3 ids"),
    (lambda: evaluation.retrieval_recall(X, X, positives=(X[:, 0], X[:, 0])), TypeError,
     "positives: expected an int64"),
    (lambda: evaluation.retrieval_recall(X, X, 2.5), TypeError, "k: expected an int, got float"),
    (lambda: evaluation.retrieval_recall(X, X, "5"), TypeError, "k: expected an int, got str"),
    (lambda: evaluation.retrieval_recall(X, X, (17,)), ValueError, "k: expected from 1 to 16"),
    (lambda: evaluation.retrieval_recall(X, X, (0,)), ValueError, "k: expected"),
    (lambda: evaluation.zero_shot_accuracy(X, X, [0, 1, 2]), TypeError, "labels"),
    (lambda: evaluation.zero_shot_accuracy(X, X, torch.tensor([0, 3, 1])), ValueError,
     "labels: expected from 0 to 2, .*got 0 to 3"),
    (lambda: evaluation.zero_shot_accuracy(X, X, torch.tensor([0, -1, 1])), ValueError, "labels"),
    (lambda: evaluation.zero_shot_classifier([]), ValueError, "prompt_features"),
])
@pytest.mark.skipif(DEVICE != "cpu", reason="its tensors were made on the CPU")
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
