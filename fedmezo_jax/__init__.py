"""Federated zeroth-order fine-tuning of LLaMA models in JAX (FedMeZO, arXiv 2402.05926)."""

__version__ = "0.2.0"
