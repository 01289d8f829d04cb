"""The random stream: published vectors, numpy's generator, the counter's layout, the C++ words."""

import random

import numpy as np
import pytest
import torch

from tilewise import _extension
from tilewise.reference import _philox

# Multipliers and key steps of Philox4xW, by the width of a word: Salmon et al., SC 2011.
CONSTANTS = {
    32: (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85),
    64: (0xD2E7470EE14C6C93, 0xCA5A826395121157, 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B),
}
# kat_vectors of Random123: counter, key, result.
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
SEEDS = [0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]
ROWS = [0, 5, 2**32 - 1, 2**32, 2**40 + 3, -1, -(2**32), 2**63 - 1, -(2**63)]


def philox(counter, key, bits):
    """Philox4xW-10 in Python's integers, word by word as the paper has it."""
    c, k = list(counter), list(key)
    m0, m1, w0, w1 = CONSTANTS[bits]
    low = 2**bits - 1
    for _ in range(10):
        p, q = m0 * c[0], m1 * c[2]
        c = [(q >> bits) ^ c[1] ^ k[0], q & low, (p >> bits) ^ c[3] ^ k[1], p & low]
        k = [k[0] + w0 & low, k[1] + w1 & low]
    return tuple(c)


def expected_words(seed, row, cols, op):
    """One row of the stream as the design fixes it: counter (col // 4, row, row >> 32, op)."""
    low = 2**32 - 1
    key = (seed & low, seed >> 32 & low)
    words: list[int] = []
    for call in range(-(-cols // 4)):
        words += philox((call, row & low, row >> 32 & low, op), key, 32)
    return words[:cols]


def reference_words(seed, row, cols, op):
    return _philox.words(torch.tensor(seed), 1, cols, row, op)[0].tolist()


@pytest.mark.parametrize("counter, key, result", PUBLISHED)
def test_published_vectors(counter, key, result):
    assert philox(counter, key, 32) == result
    ours = _philox.philox4x32(*([torch.tensor(v) for v in part] for part in (counter, key)))
    assert tuple(map(int, ours)) == result


def test_the_python_generator_is_numpys_at_64_bits():
    """numpy has the 64-bit words only; it counts up before the first block."""
    generator = random.Random(0)
    for _ in range(50):
        counter, key = generator.randrange(2**256 - 2), generator.randrange(2**128)
        theirs = np.random.Philox(counter=counter, key=key).random_raw(8)
        for block in range(2):
            parts = [counter + 1 + block >> 64 * i & 2**64 - 1 for i in range(4)]
            ours = philox(parts, (key & 2**64 - 1, key >> 64), 64)
            assert ours == tuple(map(int, theirs[4 * block : 4 * block + 4]))


def test_the_reference_is_the_python_generator_at_32_bits():
    generator = random.Random(1)
    numbers = [[generator.randrange(2**32) for _ in range(6)] for _ in range(2000)]
    columns = list(torch.tensor(numbers).unbind(1))
    ours = torch.stack(_philox.philox4x32(columns[:4], columns[4:]), 1)
    assert ours.tolist() == [list(philox(n[:4], n[4:], 32)) for n in numbers]


@pytest.mark.parametrize("seed", SEEDS)
def test_counter_and_key(seed):
    for row in ROWS:
        assert reference_words(seed, row, 10, 1) == expected_words(seed, row, 10, 1)
    for cols in (0, 1, 3, 4, 5, 33):
        assert reference_words(seed, 7, cols, 2) == expected_words(seed, 7, cols, 2)


def test_op_ids():
    ops = _philox.GUMBEL, _philox.GAUSSIAN, _philox.NEGATIVE_TEXTS, _philox.NEGATIVE_IMAGES
    assert ops == (0, 1, 2, 3)
    assert len({tuple(reference_words(3, 4, 8, op)) for op in ops}) == 4


@pytest.mark.parametrize("start", [0, 2**32 - 3, -3, 2**63 - 3])
def test_rows_are_numbered_from_the_offset(start):
    """Past 2^32, past 0, and past 2^63, where the number wraps around."""
    block = _philox.words(torch.tensor(11), 6, 9, start, 0)
    for i, row in enumerate(block.tolist()):
        number = (start + i + 2**63) % 2**64 - 2**63
        assert row == expected_words(11, number, 9, 0)


def test_uniform_is_dense_near_zero_and_never_0_or_1():
    words = torch.tensor([0, 1, 2, 2**20, 2**31, 2**32 - 2**7 - 1, 2**32 - 2, 2**32 - 1])
    u = _philox.uniform(words)
    assert u.dtype == torch.float32
    assert u[:4].tolist() == [2.0**-33, 1.5 * 2.0**-32, 2.5 * 2.0**-32, 2.0**-12 + 2.0**-33]
    assert (u[1:] >= u[:-1]).all() and u[-1] == 1 - 2.0**-24
    exponential = -torch.log1p(-u.double())
    assert exponential.isfinite().all() and (exponential > 0).all()


@pytest.mark.parametrize("word", [0, 1, 2**32 - 1])
def test_no_word_makes_nan_or_infinity(monkeypatch, word):
    monkeypatch.setattr(_philox, "words", lambda s, rows, cols, *_: torch.full((rows, cols), word))
    for noise in (_philox.gumbel, _philox.gaussian):
        assert noise(torch.tensor(0), 2, 6, 0).isfinite().all()


@pytest.mark.skipif(_extension.module is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("seed", SEEDS)
def test_words_of_the_extension(seed):
    for row in ROWS:
        for op in range(4):
            got = _extension.module.random_words(seed, row, 70, op)
            assert got == expected_words(seed, row, 70, op)
    for cols in (0, 1, 3, 5, 15, 16, 17, 31, 64, 65, 1025):
        got = _extension.module.random_words(seed, 9, cols, 0)
        assert got == expected_words(seed, 9, cols, 0)
