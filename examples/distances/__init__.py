"""Learning a generative model: the same targets by six distances, beside their known optimum."""
