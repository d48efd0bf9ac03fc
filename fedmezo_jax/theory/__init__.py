"""Measurements of the theory's assumptions: the Hessian's spectrum, the constants of its bounds, heterogeneity."""
