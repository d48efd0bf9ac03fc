"""Differential privacy of clients: what is added to their numbers, and what that guarantees."""
