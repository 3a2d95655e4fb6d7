"""Moestro: the MoE you can see, and the same MoE everywhere."""

__version__ = "0.1.0"
