"""Multi-layer sparse autoencoders: train them, measure them, look at them."""

__version__ = "0.1.0"
