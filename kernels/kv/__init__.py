"""Keys and values of a cache in mixed precision: their format, and attention over them."""

from . import attention, cpu, cuda, format, plain

__all__ = ["attention", "cpu", "cuda", "format", "plain"]
