"""The VAE's example: its latents, its bounds, what judges samples, a short run."""

import math

import pytest
import torch

from tests.common.peers import need

need("matplotlib", "mlxtend", "rich")

from examples.common import training as shared  # noqa: E402
from examples.vae import __main__ as script  # noqa: E402
from examples.vae import judge, models, training, uses  # noqa: E402
from examples.vae import report as pages  # noqa: E402
from tests.examples.silent import Silent  # noqa: E402

LATENTS = {
    "normal": lambda: models.Normal(2),
    "eager": lambda: models.EagerNormal(2),
    "uniform": lambda: models.Uniform(2),
    "categories": lambda: models.Categories(2, 3, "straight_through"),
    "codes": lambda: models.Codes(2, 3, 4, training.falling(10)),
}


@pytest.fixture(autouse=True)
def one_thread(threads):
    """So little work in each op is done sooner than a second thread wakes up."""
    threads(1)


@pytest.mark.parametrize("kind", LATENTS)
def test_divergence_is_the_mean_of_the_ratio(kind):
    torch.manual_seed(0)
    latents = LATENTS[kind]()
    out = torch.randn(3, latents.outputs)
    with torch.no_grad():
        _, ratio = latents.draw(out, 4000)  # log p - log q
        divergence = latents.divergence(out)
    assert ratio.shape == (4000, 3)
    error = 4 * ratio.std(0) / 4000**0.5 + 1e-4
    assert ((ratio.mean(0) + divergence).abs() < error).all() and (divergence > 0).all()


@pytest.mark.parametrize("kind", LATENTS)
def test_loss_is_the_expectation_and_the_divergence(kind):
    torch.manual_seed(0)
    latents = LATENTS[kind]()
    out = torch.randn(3, latents.outputs).repeat(2000, 1).requires_grad_()
    weights = torch.linspace(1, 2, latents.size)
    f = lambda z: (z * weights).sum(-1).square()  # noqa: E731
    loss = latents.loss(f, out)
    with torch.no_grad():
        z, _ = latents.draw(out[:3], 4000)
        wanted = f(z).mean(0) + latents.divergence(out[:3])
    found = loss.view(2000, 3).detach()
    # a quantiser's loss is the mean divergence of a batch, with every image
    if kind == "codes":
        found, wanted = found.mean(1), wanted.mean()
    error = 4 * (found.std(0) / 2000**0.5 + f(z).std(0).max() / 4000**0.5)
    assert ((found.mean(0) - wanted).abs() < error).all()
    loss.sum().backward()
    assert out.grad.abs().sum() > 0


def test_a_uniform_prior_is_a_normal_one_in_other_coordinates():
    torch.manual_seed(0)
    latents, prior = models.Uniform(2), torch.zeros(1, 4)
    z, ratio = latents.draw(prior, 4000)  # q is the prior
    assert ratio.abs().max() < 1e-5 and latents.divergence(prior).abs().max() < 1e-6
    for points in (z[:, 0], latents.prior(4000)):
        cube = (points / math.sqrt(12) + 0.5).sort(0).values
        assert (cube - torch.linspace(0, 1, 4000)[:, None]).abs().max() < 1.95 / 4000**0.5
        assert points.var().item() == pytest.approx(1, rel=0.05)


def test_more_samples_bring_the_bound_nearer():
    torch.manual_seed(0)
    model = models.Vae(models.Normal(3))
    torch.nn.init.normal_(model.encoder[-1].bias, std=0.7)  # a poor q: its bound is loose
    x = (torch.rand(20, 784) < 0.3).float()
    elbo, *weighted = (
        bound.mean().item()
        for bound in (model.bound(x, 200), *(model.importance_bound(x, k) for k in (1, 10, 300)))
    )
    assert weighted[0] > weighted[1] > weighted[2]
    assert weighted[0] == pytest.approx(elbo, abs=3) and weighted[2] < elbo - 0.3


def test_judges_know_equal_distributions_from_different_ones():
    data = training.digits()
    blank = torch.rand(300, 784, generator=torch.Generator().manual_seed(0)) * 0.1
    copies, real = data.seen[::13][:300], data.heldout[::3][:300]
    found = judge.judge({"copies": copies, "blank": blank}, data.seen[::13], real, steps=40)
    assert found["copies"]["nearest"] < 1e-3 and found["copies"]["different"] == 300
    assert abs(found["copies"]["apart 14"] - 0.5) < 0.1 and found["blank"]["apart 14"] > 0.95
    assert found["blank"]["mmd"] > 10 * abs(found["copies"]["mmd"])
    assert found["blank"]["different"] < 20


def test_half_digits_are_inferred_from_what_is_known():
    torch.manual_seed(0)
    model = models.Vae(models.Normal(2))
    x = (torch.rand(10, 784) < 0.3).float()
    other = torch.where(uses.TOP, x, 1 - x)
    known = uses.TOP.float()
    found = []
    for pixels in (x, other):
        torch.manual_seed(1)
        found.append(uses.infer(model, pixels, known, 5))
    assert torch.equal(*found)
    p = torch.full((4, 10, 784), 0.5)
    assert uses.mixed(p, x, 1 - known) == pytest.approx(392 * math.log(2), rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_goes_on_where_it_stopped(tmp_path):
    data, kind = training.digits(), training.CATEGORICAL[0]

    def run(folder):
        args = script.parse(["--quick", "--out", str(tmp_path / folder)])
        return training.VaeRun(kind, data, args, 6)

    whole, part, resumed = run("whole"), run("part"), run("part")
    shared.train([whole], Silent(), every=3)
    with pytest.raises(KeyboardInterrupt):
        shared.train([part], Silent(stop=4), every=3)
    shared.train([resumed], Silent(), every=3, resume=True)
    for name in ("loss", "bound"):
        assert resumed.history[name] == whole.history[name]
    assert resumed.model.latents.steps == 6
    assert training.falling(6)(0) == 1 and training.falling(6)(4) == pytest.approx(0.4, abs=1e-3)


def test_a_short_run(tmp_path):
    found = script.main(["--quick", "--out", str(tmp_path)])
    bounds = found["bounds"]
    for name, x in bounds.items():
        first, last = x["curve"][0][1], x["curve"][-1][1]
        assert last < first and x.get("importance", 0) < x["elbo"] + 1 < 784 * math.log(2), name
        assert x["kl"] > 0
    ours, eager = (bounds[name]["curve"] for name in ("normal", "normal, eager"))
    assert pages.curve_difference(ours, eager) < 15
    assert found["samples"]["training digits"]["apart 14"] < found["samples"]["GAN"]["apart 14"]
    assert min(found["probe"]["pixels"]) > 0.4
    assert found["anomalies"]["nearest training digit"]["turned by a quarter"] > 0.8
    for name in ("curves.png", "samples.png", "latents.png", "uses.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
        assert (tmp_path / name).stat().st_size > 20_000
    text = (tmp_path / "report.txt").read_text()
    assert "upper bounds of -log p(x)" in text and "with eager operations" in text
