"""The online Hadamard rotation."""

from . import cpu, cuda, op

__all__ = ["cpu", "cuda", "op"]
