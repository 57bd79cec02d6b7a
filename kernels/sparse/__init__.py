"""MLPs that read only the weights of neurons that are on."""

from . import cpu, cuda, down, mlp

__all__ = ["cpu", "cuda", "down", "mlp"]
