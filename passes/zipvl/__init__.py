"""ZipVL: leave out tokens that nobody attends to."""

from .zipvl import ZipVL

__all__ = ["ZipVL"]
