"""Measurements of what the theory assumes: the Hessian's spectrum, the constants of its bounds, heterogeneity."""
