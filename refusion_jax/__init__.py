"""ReFusion in JAX: slot-level diffusion language models, trained and decoded on any mesh."""

__version__ = "0.1.0"
