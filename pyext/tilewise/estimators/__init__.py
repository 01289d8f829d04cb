"""Gradients of expectations: d/dtheta of E f(y) with y drawn from a distribution with theta.

    loss = tw.estimators.reinmax(f, tw.estimators.Categorical(logits), num_samples=4).mean()
    loss.backward()

Every estimator is a function of the same first arguments. It returns the mean of f over the
samples, whose backward pass gives the estimated gradient to what the distribution was made from,
and the ordinary one to f's own parameters.
"""

from tilewise.estimators._distributions import Categorical as Categorical
from tilewise.estimators._distributions import Gaussian as Gaussian
from tilewise.estimators.control_variates import rebar as rebar
from tilewise.estimators.control_variates import relax as relax
from tilewise.estimators.exact import exact as exact
from tilewise.estimators.gradient import gradient as gradient
from tilewise.estimators.pathwise import gumbel_softmax as gumbel_softmax
from tilewise.estimators.pathwise import reparameterized as reparameterized
from tilewise.estimators.score_function import MovingAverage as MovingAverage
from tilewise.estimators.score_function import score_function as score_function
from tilewise.estimators.straight_through import gumbel_rao as gumbel_rao
from tilewise.estimators.straight_through import reinmax as reinmax
from tilewise.estimators.straight_through import straight_through as straight_through
