"""The scripts that draw the pages' pictures and print their counts still run."""

import torch

from docs.figures import draw, facts


def test_pictures_are_drawn(tmp_path):
    paths = draw.main(tmp_path, rows=64)
    assert {path.stem for path in draw.HERE.glob("*.png")} == {path.stem for path in paths}
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG") and 10_000 < path.stat().st_size < 100_000


def test_counts_that_do_not_depend_on_luck():
    assert facts.tail_values() == (4295, 16)
    assert 1 <= facts.logarithms(torch.zeros(100), rows=50) <= 4
    assert facts.logarithms(100 * torch.arange(128.0), rows=5) == 4  # each step has a new maximum
    assert facts.tied_maxima(torch.bfloat16, 10, rows=10) <= 1
