"""The online Hadamard rotation."""

from . import cpu, cuda, op, plain

__all__ = ["cpu", "cuda", "op", "plain"]
