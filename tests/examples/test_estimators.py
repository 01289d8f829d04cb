"""The estimators' example: its function, its bandit, its VAE, a short run."""

import math

import pytest
import torch

from tests.common.peers import need

need("mlxtend", "rich")

from examples import estimators  # noqa: E402
from examples.common import estimator_cost  # noqa: E402
from tilewise.estimators import Categorical, gradient  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread(threads):
    """So little work in each op is done sooner than a second thread wakes up."""
    threads(1)


def test_errors_are_relative_to_the_gradient():
    truth = gradient(estimators.curved, Categorical(estimators.LOGITS[None].double()), "exact")
    found = {
        kind: estimators.errors(kind, 3000, truth.logits[0], num_samples=2)
        for kind in ("score function", "leave-one-out", "Gumbel-softmax")
    }
    for kind in ("score function", "leave-one-out"):
        assert found[kind]["bias"] < 4 * found[kind]["chance"]
        assert found[kind]["error"] >= found[kind]["spread"]
    assert found["Gumbel-softmax"]["bias"] > 10 * found["Gumbel-softmax"]["chance"]
    assert found["leave-one-out"]["spread"] < found["score function"]["spread"]


def test_a_baseline_helps_a_bandit_whose_rewards_are_far_from_0():
    none, average = (
        sum(estimators.bandit(kind, 150, 50)[-20:]) / 20
        for kind in ("score function", "moving average")
    )
    assert average > none > 0.1 and average > 0.3


@pytest.mark.parametrize("gaussian", [True, False])
def test_every_vae_has_the_same_bound_before_it_learns(gaussian):
    """Its value does not depend on the estimator; nor on relaxing, with one-hot samples."""
    torch.manual_seed(0)
    model, x = estimators.Vae(gaussian), (torch.rand(20, 196) < 0.3).float()
    names = ["score_function", *(["reparameterized"] if gaussian else ["reinmax", "rebar"])]
    found = [model.loss(x, name, 3, seed=1).item() for name in names]
    assert found == pytest.approx([found[0]] * len(found), rel=1e-5)
    _, divergence = model.latents(x)
    assert (divergence > 0).all() and found[0] == pytest.approx(196 * math.log(2), rel=0.1)


def test_a_short_run(tmp_path, monkeypatch):
    monkeypatch.setattr(estimator_cost, "peak_bytes_each", lambda _, cases: [8e6] * len(cases))
    monkeypatch.setattr(estimators, "VAES", dict(list(estimators.VAES.items())[:4]))
    found = estimators.main(["--quick", "--out", str(tmp_path)])
    for curves in found["vae"].values():
        assert curves[0][-1][1] < curves[0][0][1] - 10
    for name in ("variance.png", "uses.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
        assert (tmp_path / name).stat().st_size > 20_000
    text = (tmp_path / "report.txt").read_text()
    assert "1000 kB" in text and "The best VAE with categories" in text
