"""The distances' example: what is exact, what has samples only, a short run."""

import math

import pytest
import torch

from tests.common.peers import need

need("matplotlib", "rich")

from examples.common.sample_distances import mmd, sliced_wasserstein, unit_vectors  # noqa: E402
from examples.distances import __main__ as script  # noqa: E402
from examples.distances import exact, free  # noqa: E402
from examples.distances.fit import KINDS, AxisGaussian  # noqa: E402
from examples.distances.targets import TARGETS, grid, mixture, ring  # noqa: E402

INSIDE, SLANTED, BUMPS = TARGETS
MODEL = torch.tensor([0.4, -0.3, 0.2, -0.5], dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """So little work in each op is done sooner than a second thread wakes up."""
    threads(1)


@pytest.mark.parametrize("target", [*TARGETS, ring()], ids=lambda target: target.name)
def test_targets_are_densities_and_sample_from_them(target):
    points, area = grid()
    density = target.log_prob(points).exp() * area
    assert density.sum() == pytest.approx(1, abs=1e-6)
    mean, covariance = target.moments()
    assert density @ points == pytest.approx(mean, abs=1e-5)
    torch.manual_seed(0)
    x = target.sample(20_000).double()
    assert (x.mean(0) - mean).abs().max() < 4 * 2 / 20_000**0.5
    assert (x.T.cov() - covariance).abs().max() < 0.1


def test_divergences_of_gaussians_are_their_closed_forms():
    gaussian = mixture("", [1.0], [MODEL[:2].tolist()], [MODEL[2:].exp().diag().tolist()])
    for kl, a, b in ((exact.forward_kl, INSIDE, gaussian), (exact.reverse_kl, gaussian, INSIDE)):
        (m, s), (n, t) = (
            (x.means[0], x.covariances[0].diagonal()) for x in (a, b)
        )
        closed = ((s / t) - 1 - (s / t).log() + (m - n).square() / t).sum() / 2
        assert kl(MODEL, INSIDE).item() == pytest.approx(closed.item(), abs=1e-5)
    moved = torch.tensor([1.0, -0.5, 1.44, 0.36], dtype=torch.float64)
    moved[2:].log_()
    assert exact.apart(MODEL, moved) == pytest.approx(
        math.dist([0.4, -0.3, *(MODEL[2:] / 2).exp()], [1.0, -0.5, 1.2, 0.6])
    )


@pytest.mark.parametrize("target", [SLANTED, BUMPS], ids=lambda target: target.name)
def test_samples_have_the_exact_distances(target):
    torch.manual_seed(0)
    model = AxisGaussian()
    model.load_state_dict({"mean": MODEL[:2].float(), "logvar": MODEL[2:].float()})
    with torch.no_grad():
        found = torch.tensor([
            [mmd(model(500), target.sample(500), exact.WIDTHS),
             sliced_wasserstein(model(2000), target.sample(2000), unit_vectors(64, 2))]
            for _ in range(8)
        ])  # fmt: skip
    wanted = torch.stack([exact.mmd(MODEL, target), exact.sliced_wasserstein(MODEL, target)])
    assert ((found.mean(0) - wanted).abs() < 4 * found.std(0) / 8**0.5 + 0.02 * wanted).all()


def test_optima_are_those_that_are_known():
    mean, covariance = BUMPS.moments()
    moments = torch.cat([mean, covariance.diagonal().log()])
    assert exact.optimum(exact.forward_kl, BUMPS) == pytest.approx(moments, abs=1e-3)
    precision = torch.linalg.inv(SLANTED.covariances[0]).diagonal()
    assert exact.optimum(exact.reverse_kl, SLANTED)[2:] == pytest.approx(-precision.log(), abs=1e-3)
    bump = exact.optimum(exact.reverse_kl, BUMPS)  # the heavier of the two, and log(1 / 0.6) nats
    assert bump[:2] == pytest.approx(BUMPS.means[0], abs=0.01)
    assert exact.reverse_kl(bump, BUMPS).item() == pytest.approx(math.log(1 / 0.6), abs=1e-2)
    for kind in KINDS.values():
        assert abs(kind.distance(exact.optimum(kind.distance, INSIDE), INSIDE)) < 1e-5


def test_mmd_has_no_bias():
    torch.manual_seed(0)
    found = torch.stack([mmd(*torch.randn(2, 20, 2), (1.0,)) for _ in range(300)])
    assert found.mean().abs() < 4 * found.std() / 300**0.5 and (found < 0).any()


def test_kernel_density_is_one_and_leaves_out():
    torch.manual_seed(0)
    density = free.KernelDensity(BUMPS.sample(300))
    points, area = grid()
    assert (density.log_prob(points.float()).double().exp() * area).sum() == pytest.approx(
        1, abs=1e-3
    )
    x = density.data[:1]
    others = free.KernelDensity(density.data[1:])
    alone = density._log_prob(density.data, density.width, leave_out=True)[0]
    assert alone == pytest.approx(others._log_prob(x, density.width)[0].item(), abs=1e-5)


def test_a_short_run(tmp_path, monkeypatch):
    monkeypatch.setattr(exact, "POINTS", grid(71)[0])
    monkeypatch.setattr(exact, "AREA", grid(71)[1])
    found = script.main(["--quick", "--out", str(tmp_path)])
    assert set(found["fits"]) == {target.name for target in TARGETS}
    for kind, (run,) in found["fits"][SLANTED.name].items():
        first = KINDS[kind].distance(torch.zeros(4, dtype=torch.float64), SLANTED)
        assert found["lowest"][SLANTED.name][kind] - 1e-4 < run["distance"] < first + 0.01
    error = found["sizes"]["error"][BUMPS.name]
    assert error["kernel density"][1] < error["kernel density"][0] < error["Gaussian"][0]
    for name in ("fits.png", "ring.png", "sizes.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
        assert (tmp_path / name).stat().st_size > 20_000
    text = (tmp_path / "report.txt").read_text()
    assert "What a distance asks for" in text and "Inside the family all six end" in text
