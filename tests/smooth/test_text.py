"""BLEU beside a textbook's, and figures of sacrebleu and nltk."""

import itertools
import math
from collections import Counter

import pytest
import torch

import tilewise as tw
from tilewise.smooth import bleu


def textbook(texts, references, max_n=4, smoothing=0.0):
    """Papineni's, of lists of words; each text with a list of references."""
    matches, totals, length, closest = [0] * max_n, [0] * max_n, 0, 0
    for text, given in zip(texts, references, strict=True):
        length += len(text)
        closest += min((abs(len(r) - len(text)), len(r)) for r in given)[1]
        for n in range(1, max_n + 1):
            grams = [Counter(zip(*(w[i:] for i in range(n)), strict=False)) for w in (text, *given)]
            most = grams[1]
            for other in grams[2:]:
                most = most | other
            matches[n - 1] += (grams[0] & most).total()
            totals[n - 1] += grams[0].total()
    for n in range(1, max_n):
        matches[n], totals[n] = matches[n] + smoothing, totals[n] + smoothing
    if 0 in matches or 0 in totals:
        return 0.0
    logs = sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / max_n
    return math.exp(min(0, 1 - closest / length) + logs)


def filled(lists, length, value):
    return torch.tensor([[*words, *[value] * (length - len(words))] for words in lists])


def corpus(seed, texts=6, words=5, references=3):
    torch.manual_seed(seed)

    def text(least=1):
        return torch.randint(words, (int(torch.randint(least, 12, ())),)).tolist()

    return [text() for _ in range(texts)], [[text() for _ in range(references)]
                                            for _ in range(texts)]  # fmt: skip


def tensors(texts, references):
    mask = filled([[1] * len(text) for text in texts], 12, 0).bool()
    return filled(texts, 12, 0), torch.stack([filled(r, 12, -1) for r in references]), mask


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_limit_is_the_textbooks(seed, smoothing):
    texts, references = corpus(seed)
    words, given, mask = tensors(texts, references)
    logits = torch.nn.functional.one_hot(words, 5).float()
    expected = textbook(texts, references, smoothing=smoothing)
    options = {"smoothing": smoothing, "mask": mask}
    assert bleu(words, given, **options).item() == pytest.approx(expected, rel=1e-5)
    for tau in (0, 0.02):
        found = bleu(logits, given, tau, **options).item()
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    each = bleu(words[:, None], given[:, None], max_n=2, smoothing=smoothing, mask=mask[:, None])
    expected = [textbook([t], [r], 2, smoothing) for t, r in zip(texts, references, strict=True)]
    assert each.tolist() == pytest.approx(expected, rel=1e-5)


def ids(text, words={}):  # noqa: B006  # one vocabulary for all
    return [words.setdefault(word, len(words)) for word in text.split()]


def test_figures_of_the_packages():
    """Papineni's examples. sacrebleu 2.6.0, nltk 3.10.4."""
    text = ("It is a guide to action which ensures that the military always obeys the commands of "
            "the party")  # fmt: skip
    first = ("It is a guide to action that ensures that the military will forever heed Party "
             "commands")  # fmt: skip
    second = ("It is the guiding principle which guarantees the military forces always being under "
              "the command of the Party")  # fmt: skip
    third = "It is the practical guide for the army always to heed the directions of the party"
    given = filled([ids(first), ids(second), ids(third)], 20, -1)[None]
    assert bleu(torch.tensor([ids(text)]), given).item() == pytest.approx(PAPINENI, abs=1e-6)
    seven = torch.tensor([ids("the the the the the the the")])
    cat = torch.tensor([ids("the cat is on the mat")])
    assert bleu(seven, cat, max_n=1).item() == pytest.approx(2 / 7)
    assert bleu(seven, cat, max_n=2) == 0


PAPINENI = 0.5045666840058485


def test_expected_matches_by_enumeration():
    """They are the mean over all texts, and more where the minimum cuts off some of these."""
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 3).double()
    p = torch.softmax(logits[0], -1)
    often = [0, 1, 2] * 5  # no more than it has of a pair or a word can be expected in four words
    pairs = {(0, 1), (1, 2), (2, 0)}
    mean = 0.0
    for text in itertools.product(range(3), repeat=4):
        probability = math.prod(p[t, word].item() for t, word in enumerate(text))
        mean += probability * sum(pair in pairs for pair in itertools.pairwise(text))
    found = bleu(logits, torch.tensor([often]), max_n=2)
    assert found.item() == pytest.approx(math.exp(1 - 15 / 4) * math.sqrt(mean / 3))

    once, mean, expected = torch.tensor([[0, 9, 9, 9]]), 0.0, p[:, 0].sum().item()
    for text in itertools.product(range(3), repeat=4):
        mean += math.prod(p[t, word].item() for t, word in enumerate(text)) * min(text.count(0), 1)
    found = 4 * bleu(logits, once.clamp(max=2), max_n=1).item()
    known = min(1.0, expected) + min(3.0, p[:, 2].sum().item())
    assert found == pytest.approx(known) and mean < min(1.0, expected)


def test_gradient_moves_words_towards_the_reference():
    torch.manual_seed(0)
    reference = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    logits = torch.zeros(1, 8, 10, requires_grad=True)
    with torch.no_grad():
        logits += 0.1 * torch.randn(1, 8, 10)
    first = bleu(logits, reference).item()
    optimizer = torch.optim.Adam([logits], 0.3)
    for _ in range(60):
        optimizer.zero_grad()
        (-bleu(logits, reference)).backward()
        optimizer.step()
    assert first < 0.2 and bleu(logits.argmax(-1), reference) > 0.7


def test_masked_words_get_no_gradient():
    logits = torch.randn(2, 5, 7)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    dirty = logits.masked_fill(~mask[..., None], math.nan).requires_grad_()
    references = torch.randint(7, (2, 6))
    found = tw.smooth.bleu(dirty, references, mask=mask)
    found.backward()
    assert dirty.grad.isfinite().all() and not dirty.grad[~mask].any() and dirty.grad.any()
    assert tw.smooth.bleu(logits[:, :0], references) == 0  # no words
