"""The random ops against their laws. Fixed seeds: what passes once passes always.

`make statistics` sets TILEWISE_STATISTICS=long: a thousand times the draws.
"""

import functools
import os

import pytest
import torch

import tilewise as tw
from tests.common import random_cases as cases
from tests.common import random_statistics as statistics
from tests.common.random_cases import INF
from tilewise.reference import _philox

LONG = os.environ.get("TILEWISE_STATISTICS") == "long"
DRAWS = 2**30 if LONG else 2**20
SAMPLED = 2**27 if LONG else 2**19  # perturbed logits of one set of frequencies
REPEATS = 30 if LONG else 1
# By chance, one in 10,000 sound generators is worse.
LEAST_P = 1e-4
BACKENDS = cases.KERNELS[:1] if LONG else ["reference", *cases.KERNELS[:1]]

backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
laws = pytest.mark.parametrize("law", statistics.LAWS)
backend = pytest.fixture(cases.serve)


@functools.cache
def summary(backend, law):
    """Of all draws; the tests of one law in one backend share them."""
    return statistics.summarise(law, seed=2026, draws=DRAWS)


def assert_likely(probabilities):
    assert min(probabilities.values()) > LEAST_P, probabilities


@backends
@laws
def test_every_draw_is_finite(backend, law):
    assert summary(backend, law).finite


@backends
@laws
def test_noise_follows_its_law(backend, law):
    assert_likely(statistics.law_p(summary(backend, law)))


@backends
@laws
def test_tails(backend, law):
    """Down to one in a million, to both sides."""
    assert_likely(statistics.tail_p(summary(backend, law)))


@backends
@laws
def test_moments(backend, law):
    assert_likely(statistics.moment_p(summary(backend, law)))


@backends
def test_neighbours_are_independent(backend):
    """Rows, columns, the words of a call, seeds, and ops."""
    assert_likely(statistics.independence_p([1000 + 3 * i for i in range(REPEATS)]))


@backends
def test_large_noise_hardly_repeats(backend):
    assert statistics.repeats_in_the_winning_tail(2**20, 5) <= 6


LOGITS = {
    "two": torch.tensor([0.0, 0.4]),
    "equal": torch.zeros(10),
    "geometric": -0.7 * torch.arange(12.0),
    "peaked": torch.tensor([0.0, 1.0, 9.0, -2.0, 0.5]),
    "masked": torch.tensor([-INF, 0.3, -INF, -1.0, 1.2, 0.0, -INF]),
    "offset": torch.tensor([0.3, -1.0, 1.2, 0.0]) + 1000,
    "wide": torch.randn(1000, generator=torch.Generator().manual_seed(0)),
}


@backends
@pytest.mark.parametrize("name", LOGITS)
def test_frequencies_follow_the_softmax(backend, name):
    logits = LOGITS[name].to(cases.DEVICE)
    assert statistics.frequency_p(logits, SAMPLED, seed=len(name)) > LEAST_P


@backends
@pytest.mark.parametrize("name", ["geometric", "masked"])
def test_one_hot_samples_follow_the_softmax(backend, name):
    logits = LOGITS[name].to(cases.DEVICE)
    assert statistics.frequency_p(logits, SAMPLED, seed=30, hard=True) > LEAST_P


@backends
@pytest.mark.parametrize("name, k", [("geometric", 2), ("peaked", 3), ("offset", 4), ("two", 2)])
def test_draws_without_replacement(backend, name, k):
    """Ordered pairs, triples and permutations, by Plackett and Luce."""
    logits = LOGITS[name].to(cases.DEVICE)
    draws = min(DRAWS, 2**26)
    assert statistics.without_replacement_p(logits, k, draws, seed=40) > LEAST_P


words = _philox.words


def one_word_twice(seed, rows, cols, row_offset, op):
    drawn = words(seed, rows, cols + cols % 2, row_offset, op)
    drawn[:, 1::2] = drawn[:, ::2]
    return drawn[:, :cols]


def words_of_24_bits(*arguments):
    return words(*arguments) >> 8 << 8


def a_row_twice(seed, rows, cols, row_offset, op):
    return words(seed, rows + 1, cols, row_offset, op)[torch.arange(rows) // 2]


def seeds_in_pairs(seed, *arguments):
    return words(seed & ~1, *arguments)


def half_of_the_key(seed, *arguments):
    return words(seed & 2**32 - 1, *arguments)


def half_of_the_row(seed, rows, cols, row_offset, op):
    return words(seed, rows, cols, row_offset & 2**32 - 1, op)


def one_stream_for_all_ops(seed, rows, cols, row_offset, op):
    return words(seed, rows, cols, row_offset, 0)


def no_tail(*arguments):
    return words(*arguments).clamp(2**32 // 1000, 2**32 - 2**32 // 1000)


def shifted(*arguments):
    return (words(*arguments) * 0.995 + 2**23).long()


def independence():
    return statistics.independence_p([1000], rows=64)


def repeats():
    return {"few": float(statistics.repeats_in_the_winning_tail(2**20, 5) <= 6)}


def frequencies():
    return {"softmax": statistics.frequency_p(LOGITS["geometric"], 2**19, 9)}


def replacement():
    return {"pairs": statistics.without_replacement_p(LOGITS["geometric"], 2, 2**20, 40)}


def of_draws(test, law):
    """The test of a summary, of new draws."""
    def run():
        return test(statistics.summarise(law, 2026, 2**20))

    run.__name__ = f"{test.__name__}-{law}"
    return run


FAULTS = [
    (one_word_twice, independence), (one_word_twice, frequencies), (one_word_twice, replacement),
    (words_of_24_bits, repeats), (a_row_twice, independence), (seeds_in_pairs, independence),
    (half_of_the_key, independence), (half_of_the_row, independence),
    (one_stream_for_all_ops, independence),
    *((no_tail, of_draws(statistics.tail_p, law)) for law in statistics.LAWS),
    *((shifted, of_draws(test, law)) for law in statistics.LAWS
      for test in (statistics.law_p, statistics.moment_p)),
]


@pytest.mark.parametrize("fault, test", FAULTS, ids=lambda function: function.__name__)
def test_a_planted_fault_shows(monkeypatch, fault, test):
    """Each kind of test fails where it should."""
    monkeypatch.setattr(_philox, "words", fault)
    with tw.backend("reference"):
        assert min(test().values()) < LEAST_P
